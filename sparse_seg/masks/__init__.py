"""Mask policies: which blocks are worth full resolution."""

from sparse_seg.masks.base import BLOCK, MaskPolicy, block_levels, block_shape, blur_scores, top_blocks
from sparse_seg.masks.confidence import REDUCTIONS, UNCERTAINTIES, ConfidencePolicy
from sparse_seg.masks.edge import RULES, EdgePolicy, cad_edges, gradient_magnitude
from sparse_seg.masks.learned import LearnedPolicy, cad_mask_net, mask_net, straight_through
from sparse_seg.masks.oracle import ORACLES, OraclePolicy, block_mean, label_boundary
from sparse_seg.masks.random import RandomPolicy
from sparse_seg.masks.uniform import UniformPolicy
from sparse_seg.registry import POLICIES

__all__ = [
    "BLOCK",
    "ORACLES",
    "POLICIES",
    "REDUCTIONS",
    "RULES",
    "UNCERTAINTIES",
    "ConfidencePolicy",
    "EdgePolicy",
    "LearnedPolicy",
    "MaskPolicy",
    "OraclePolicy",
    "RandomPolicy",
    "UniformPolicy",
    "block_levels",
    "block_mean",
    "block_shape",
    "blur_scores",
    "cad_edges",
    "cad_mask_net",
    "gradient_magnitude",
    "label_boundary",
    "mask_net",
    "straight_through",
    "top_blocks",
]
