"""A way to run a network, as a value: dense at a stride, or selective under a mask policy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from sparse_seg.config import MaskConfig
from sparse_seg.errors import ConfigError
from sparse_seg.masks import parse_policy


@dataclass(frozen=True)
class Way:
    """One way to run a network; without arguments, selective under its own policy.

    Args:
        output_stride: run dense at this stride (px) instead of selectively.
        mask: a policy with options, such as `confidence:entropy,max`; None for the model's own.
        fine_fraction, middle_fraction: of that policy; override the configured ones.
        exchange, engine: of the convolutions at extra sites; override the model's own.
        merge: of the levels, `whole` or `patch`; overrides the model's own.
    """

    output_stride: int | None = None
    mask: str | None = None
    fine_fraction: float | None = None
    middle_fraction: float | None = None
    exchange: str | None = None
    engine: str | None = None
    merge: str | None = None

    @classmethod
    def dense(cls, output_stride: int) -> Way:
        """Dense at `output_stride`.

        Raises:
            ValueError: none is given.
        """
        if output_stride is None:
            raise ValueError("a dense run needs an output stride, px, not None, which is a selective run's")
        return cls(output_stride)

    @classmethod
    def policy(cls, mask: str, fine_fraction: float | None = None, **options: str | float | None) -> Way:
        """Selective, under a policy."""
        return cls(None, mask, fine_fraction, **options)  # type: ignore[arg-type]

    @property
    def is_dense(self) -> bool:
        return self.output_stride is not None

    @property
    def name(self) -> str:
        """For people: `dense OS8`, or `selective, confidence, f=0.2, linear`."""
        if self.is_dense:
            return f"dense OS{self.output_stride}"
        share = "" if self.fine_fraction is None else f"f={self.fine_fraction:g}"
        share += "" if self.middle_fraction is None else f"+{self.middle_fraction:g}"
        return ", ".join(filter(None, ("selective", self.mask, share, self.exchange, self.merge)))

    def mask_config(self, configured: MaskConfig) -> MaskConfig:
        """The mask settings of this way over the configured ones.

        Raises:
            ConfigError: an unknown policy or option.
        """
        mask = configured if self.mask is None else parse_policy(self.mask, configured)
        if mask != configured and mask.threshold is not None and self.fine_fraction is None:
            raise ConfigError(
                f"the threshold {mask.threshold:g} was found for another policy than {self.mask}: give a "
                "fine fraction"
            )
        if self.fine_fraction is not None:
            mask = dataclasses.replace(
                mask, fine_fraction=self.fine_fraction, threshold=None, middle_threshold=None
            )
        if self.middle_fraction is not None:
            mask = dataclasses.replace(mask, middle_fraction=self.middle_fraction)
        return mask
