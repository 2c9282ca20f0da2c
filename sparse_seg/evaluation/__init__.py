"""Quality (mIoU, boundary mIoU) and cost (multiply-adds, latency, memory) of a model."""
