"""All blocks coarse, or all fine: the two ends every other policy lies between."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_seg.masks.base import MaskPolicy, PolicyInput, block_shape


class UniformPolicy(MaskPolicy):
    """`fine_fraction` 0 (all coarse) or 1 (all fine); every block scores 0.5 against a `threshold`."""

    def __init__(self, *cut: float | None, **levels: Any) -> None:
        super().__init__(*cut, **levels)
        if self.fine_fraction not in (None, 0, 1):
            raise ValueError(
                f"the uniform policy takes fine_fraction 0 or 1, not {self.fine_fraction}; random takes any"
            )

    def scores(self, run: PolicyInput) -> Tensor:
        return run.images.new_full(block_shape(run.images, self.block), 0.5)
