"""Mask policies: which blocks are worth full resolution."""

from .base import BLOCK, MaskPolicy, block_shape, top_blocks
from .edge import EdgePolicy, gradient_magnitude
from .oracle import OraclePolicy
from .random import RandomPolicy
from .uniform import UniformPolicy

POLICIES: dict[str, type[MaskPolicy]] = {
    "uniform": UniformPolicy,
    "random": RandomPolicy,
    "edge": EdgePolicy,
    "oracle": OraclePolicy,
}

__all__ = [
    "BLOCK",
    "POLICIES",
    "EdgePolicy",
    "MaskPolicy",
    "OraclePolicy",
    "RandomPolicy",
    "UniformPolicy",
    "block_shape",
    "gradient_magnitude",
    "top_blocks",
]
