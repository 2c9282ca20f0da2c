"""From a checkpoint and a picture, folder, video or camera to what is in it."""
