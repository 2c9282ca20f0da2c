"""What a network is exported for, and what cannot be exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_seg.errors import SparseSegError
from sparse_seg.masks import MaskPolicy
from sparse_seg.run.images import MIN_SIZE
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way

INPUTS = ("float", "uint8")


@dataclass(frozen=True)
class ExportOptions:
    """What a static network is for.

    Args:
        size: `(H, W)` of the images, px; batch: how many.
        dense: output stride of a dense network; None for a selective one.
        fine_fraction: share of fine blocks; None for the policy's own.
        given: whether the fine blocks are an input, in place of the policy.
        merge: `whole` or `patch`, see `SelectiveNetwork`; None for the model's own.
        input: `float`, `[B, 3, H, W]` in 0..1; or `uint8`, `[B, H, W, 3]`.
        mean, std: of the normalisation, which the network does itself; None for those of the model's card,
            which are ImageNet's where it has none.
        logits: whether the logits `[B, K, H, W]` are an output, too.
        ghosts: whether ghosts are made for the needed cells only; their number, the one shape that depends
            on the data, makes it faster on CPUs.
        tiles: whether pixels are interpolated where classes meet only, which makes shapes depend on the
            data, too.
        policy: chooses the fine blocks; None for the model's own.
    """

    size: tuple[int, int]
    batch: int = 1
    dense: int | None = None
    fine_fraction: float | None = None
    given: bool = False
    merge: str | None = None
    input: str = "float"
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    logits: bool = False
    ghosts: bool = True
    tiles: bool = True
    policy: MaskPolicy | None = None


def check_options(model: SelectiveNetwork, options: ExportOptions) -> None:
    """Raises a SparseSegError, of one line, where a model cannot be exported with these options; a ValueError
    for a stride or merge that it cannot have."""
    if min(options.size) < MIN_SIZE:
        size = "x".join(map(str, options.size))
        raise SparseSegError(f"size {size} is too small; images must have at least {MIN_SIZE}x{MIN_SIZE} px")
    way = Way(options.dense, merge=options.merge)
    if not way.is_dense and model.separates(way):
        raise SparseSegError(
            "exchange separate makes the coarse lattice depend on the mask; such a network can be exported "
            "with --dense only, or with another rule (--set model.exchange=linear)"
        )
    model.check_way(way)
    if way.is_dense:
        return
    policy = options.policy or model.policy
    if policy.is_bound and not options.given:
        raise SparseSegError(
            f"mask policy {policy.name} reads what no mask can know, labels or the dense network, and "
            "cannot be exported; use --policy given, with the blocks as an input, or another policy"
        )
    if policy.name == "random" and not options.given:
        raise SparseSegError(
            "mask policy random draws anew each time, which no graph does; use --policy given, with the "
            "blocks as an input, or another policy"
        )
    if policy.fine_fraction is None and options.fine_fraction is None:
        raise SparseSegError(
            "a threshold gives another number of blocks for each image; export with --fine-fraction F"
        )
