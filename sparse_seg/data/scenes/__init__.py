"""Synthetic street scenes in Cityscapes' file layout: to try and test with, without a download."""

from sparse_seg.data.dataset import SMALLEST_SIDE
from sparse_seg.data.scenes.files import FRAMES, ScenesDataset, write_scenes
from sparse_seg.data.scenes.street import render_scene

__all__ = ["FRAMES", "SMALLEST_SIDE", "ScenesDataset", "render_scene", "write_scenes"]
