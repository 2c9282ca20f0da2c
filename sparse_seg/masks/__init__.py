"""Mask policies: which blocks are worth full resolution."""

from sparse_seg.masks.base import MaskPolicy, PolicyInput, block_levels, block_shape, blur_scores, top_blocks
from sparse_seg.masks.build import POLICIES, build_policy, parse_policy
from sparse_seg.masks.confidence import ConfidencePolicy
from sparse_seg.masks.gain import gain_net
from sparse_seg.masks.learned import LearnedPolicy, cad_mask_net, mask_net, straight_through
from sparse_seg.masks.oracle import OraclePolicy, block_mean, label_boundary

__all__ = [
    "POLICIES",
    "ConfidencePolicy",
    "LearnedPolicy",
    "MaskPolicy",
    "OraclePolicy",
    "PolicyInput",
    "block_levels",
    "block_mean",
    "block_shape",
    "blur_scores",
    "build_policy",
    "cad_mask_net",
    "gain_net",
    "label_boundary",
    "mask_net",
    "parse_policy",
    "straight_through",
    "top_blocks",
]
