"""Cells of several seeds as rows: accuracy, cost, and both against the baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_seg.config import TrainConfig
from sparse_seg.lab.ablation.costs import cost_key
from sparse_seg.lab.ablation.grid import Cell
from sparse_seg.lab.ablation.runner import Ablation

COSTS = ("parameters", "checkpoint_mb", "gmacs", "milliseconds", "peak_mib")


def summarise(
    ablation: Ablation, results: Sequence[Mapping[str, Any]], measured: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row for each network and way to run it; the first is the baseline, to which the ratios refer.

    Args:
        results: of `ablation.grid.cells`, in their order.
        measured: see `measure_costs`.

    Returns:
        Rows of plain values. Accuracy in percent: means over the seeds, `miou_std` the sample's standard
        deviation (None of one seed), `miou_change` against the baseline. `*_share`: percent of its.
    """
    groups: dict[tuple[Any, ...], list[tuple[Cell, Mapping[str, Any]]]] = {}
    for cell, result in zip(ablation.grid.cells, results, strict=True):
        groups.setdefault((cell.network, cell.run), []).append((cell, result))
    rows = [_row(ablation, members, measured) for members in groups.values()]
    for row in rows:
        row["miou_change"] = row["miou"] - rows[0]["miou"]
        row |= {f"{name}_share": 100 * row[name] / rows[0][name] for name in COSTS}
    return rows


def _row(
    ablation: Ablation,
    members: Sequence[tuple[Cell, Mapping[str, Any]]],
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    cell, metrics = members[0][0], [result["metrics"] for _, result in members]
    mious = [100 * one["miou"] for one in metrics]
    train = ablation.grid.configs[cell.network].train
    return {
        "network": cell.network,
        "run": cell.run.name,
        "dense": cell.run.output_stride is not None,
        "policy": cell.run.policy,
        "exchange": cell.run.exchange,
        "distillation": ablation.grid.networks[cell.network].teacher is not None
        or train.distill.teacher is not None,
        "boundary": emphasises_detail(train),
        "seeds": [member.seed for member, _ in members],
        "mious": mious,
        "miou": statistics.fmean(mious),
        "miou_std": statistics.stdev(mious) if len(mious) > 1 else None,
        "boundary_miou": 100 * statistics.fmean(one["boundary_miou"] for one in metrics),
        "class_iou": [
            statistics.fmean([100 * value for value in values if value is not None] or [math.nan])
            for values in zip(*(one["class_iou"] for one in metrics), strict=True)
        ],
        "step_seconds": measured["steps"].get(cell.network),
        **{name: measured["costs"][cost_key(ablation, cell)][name] for name in COSTS},
    }


def emphasises_detail(train: TrainConfig) -> bool:
    """Whether any of the weights that stress detail is on."""
    loss = train.loss
    return loss.reads_coarse_logits or max(loss.boundary_weight, loss.fine_weight) > 0
