"""Training: losses, schedule, checkpoints and the loop that joins them."""
