"""Mask policies: which blocks are worth full resolution."""

from sparse_seg.masks.base import (
    Frames,
    MaskPolicy,
    PolicyInput,
    block_levels,
    block_shape,
    blur_scores,
    top_blocks,
)
from sparse_seg.masks.build import POLICIES, build_policy, parse_policy
from sparse_seg.masks.confidence import REDUCTIONS, UNCERTAINTIES, ConfidencePolicy
from sparse_seg.masks.edge import RULES, EdgePolicy, gradient_magnitude
from sparse_seg.masks.gain import GainPolicy, gain_net
from sparse_seg.masks.learned import LearnedPolicy, cad_mask_net, mask_net, straight_through
from sparse_seg.masks.oracle import ORACLES, OraclePolicy, block_mean, label_boundary
from sparse_seg.masks.random import RandomPolicy
from sparse_seg.masks.uniform import UniformPolicy

__all__ = [
    "ORACLES",
    "POLICIES",
    "REDUCTIONS",
    "RULES",
    "UNCERTAINTIES",
    "ConfidencePolicy",
    "EdgePolicy",
    "Frames",
    "GainPolicy",
    "LearnedPolicy",
    "MaskPolicy",
    "OraclePolicy",
    "PolicyInput",
    "RandomPolicy",
    "UniformPolicy",
    "block_levels",
    "block_mean",
    "block_shape",
    "blur_scores",
    "build_policy",
    "cad_mask_net",
    "gain_net",
    "gradient_magnitude",
    "label_boundary",
    "mask_net",
    "parse_policy",
    "straight_through",
    "top_blocks",
]
