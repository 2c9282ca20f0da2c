"""Networks: ResNet stages on rows, heads, and the segmentor that joins them."""
