"""Checkpoints: one file with a network's weights and all that is needed to run it on images."""

from sparse_seg.checkpoint.captured import save_model
from sparse_seg.checkpoint.content import IMAGENET_MEAN, IMAGENET_STD, Checkpoint, Origin
from sparse_seg.checkpoint.digest import digest_of
from sparse_seg.checkpoint.file import find, is_checkpoint, load, save
from sparse_seg.checkpoint.loading import load_backbone, load_model, network_of, network_settings

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Checkpoint",
    "Origin",
    "digest_of",
    "find",
    "is_checkpoint",
    "load",
    "load_backbone",
    "load_model",
    "network_of",
    "network_settings",
    "save",
    "save_model",
]
