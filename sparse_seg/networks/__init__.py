"""Dense networks: plain modules with torchvision's and timm's names, which know no sites."""
