"""Run a graph: dense at any stride, mixed under a mask, refined; the network that `selective` makes."""
