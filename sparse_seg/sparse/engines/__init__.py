"""Engines: ways to run a 3x3 convolution over a layout, all sharing one KRSC weight."""
