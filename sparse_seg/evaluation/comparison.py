"""One set of weights, several ways to run it: accuracy against cost without retraining."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sparse_seg.data.dataset import IGNORE_INDEX, SegmentationDataset
from sparse_seg.data.loader import evaluation_loader
from sparse_seg.evaluation.cost import count_run
from sparse_seg.evaluation.metrics import SegmentationMetrics
from sparse_seg.masks import ConfidencePolicy, MaskPolicy
from sparse_seg.models.build import policy_for
from sparse_seg.models.refinement import Refinement, now
from sparse_seg.models.segmentor import SelectiveSegmentor
from sparse_seg.schema import DataConfig, MaskConfig


@dataclass
class Setting:
    """One way to run a network: dense at `output_stride`, or selective with `policy`.

    `spec` names the policy (see `parse_policy`); `exchange` replaces the network's own rule.
    """

    name: str
    output_stride: int | None = None
    policy: MaskPolicy | None = None
    spec: str | None = None
    exchange: str | None = None
    gmacs: float = 0.0  # multiply-adds of the first image, in billions
    milliseconds: list[float] = field(default_factory=list)  # one per image, with the mask, but for bounds
    metrics: SegmentationMetrics | None = None
    images: int = 0

    def as_row(self) -> dict[str, Any]:
        """Plain values: percent, GMACs, median milliseconds."""
        assert self.metrics is not None
        result = self.metrics.result()
        return {
            "network": self.name,
            "policy": self.spec,
            "exchange": self.exchange,
            "fine_fraction": self.policy.fine_fraction if self.policy else None,
            "middle_fraction": self.policy.middle_fraction if self.policy else None,
            "output_stride": self.output_stride,
            "miou": 100 * result.miou,
            "boundary_miou": 100 * result.boundary_miou,
            "class_iou": [100 * iou for iou in result.class_iou],
            "gmacs": self.gmacs,
            "milliseconds": statistics.median(self.milliseconds) if self.milliseconds else None,
            "images": self.images,
        }


def settings(
    model: SelectiveSegmentor,
    mask: MaskConfig,
    policies: Sequence[str],
    fractions: Sequence[float],
    exchanges: Sequence[str] = (),
) -> list[Setting]:
    """The dense network at each of the model's strides, then each policy at each fine fraction.

    Args:
        mask: settings of the policies, but for what `policies` (see `parse_policy`) name.
        exchanges: run under each of these rules; by default the model's own.

    Raises:
        ConfigError: an unknown policy or option, or a learned mask where the model has none.
    """
    rows = [Setting(f"dense OS{stride}", stride) for stride in model.strides]
    rules: Sequence[str | None] = exchanges or [None]
    for spec, exchange, fraction in itertools.product(policies, rules, fractions):
        cut = dataclasses.replace(mask, fine_fraction=fraction, threshold=None)
        policy = policy_for(model, cut, spec)
        share = "" if policy.middle_fraction is None else f"+{policy.middle_fraction:g}"
        name = f"selective, {spec}, f={fraction:g}{share}" + (f", {exchange}" if exchange else "")
        rows.append(Setting(name, policy=policy, spec=spec, exchange=exchange))
    return rows


def groups(rows: Sequence[Setting]) -> list[list[Setting]]:
    """The settings in parts that can be measured one by one: dense ones, then each policy under each rule."""
    return [list(part) for _, part in itertools.groupby(rows, lambda row: (row.spec, row.exchange))]


@contextlib.contextmanager
def exchanging(model: SelectiveSegmentor, exchange: str | None) -> Iterator[None]:
    """Run under another exchange rule."""
    convs: list[Any] = [module for module in model.modules() if hasattr(module, "exchange")]
    before = [conv.exchange for conv in convs]
    for conv in convs:
        conv.exchange = exchange or conv.exchange
    try:
        yield
    finally:
        for conv, rule in zip(convs, before, strict=True):
            conv.exchange = rule


@torch.inference_mode()
def compare(
    model: SelectiveSegmentor,
    dataset: SegmentationDataset,
    data: DataConfig,
    rows: Sequence[Setting],
    limit: int | None = None,
    progress: bool = False,
    timed: bool = True,
) -> list[dict[str, Any]]:
    """Run every setting on every image; returns `Setting.as_row` of each.

    The settings take turns on each image, so that drift of the machine falls on all alike. Without `timed`
    all but learned masks refine one coarse pass, which gives the same numbers to rounding (P4,
    docs/method.md), several times faster. The oracles that run the dense network do so off the clock and the
    count.
    """
    device = next(model.parameters()).device
    model.eval()
    count = len(dataset) if limit is None else min(limit, len(dataset))
    for setting in rows:
        setting.metrics, setting.milliseconds = SegmentationMetrics(len(dataset.classes), IGNORE_INDEX), []
        setting.images = 0
    loader = evaluation_loader(dataset, data.mean, data.std, data.workers)
    for image, label, index in tqdm(loader, total=count, disable=not progress, desc="compare", leave=False):
        if index >= count:
            break
        image, label = image.to(device), label.to(device)
        coarse = None if timed else Refinement(model, image)
        for setting in rows:
            with exchanging(model, setting.exchange):
                if index == 0:  # counts the cost, and warms up
                    macs = count_run(model, image, label, setting.output_stride, setting.policy)
                    setting.gmacs = macs / 1e9
                if coarse is not None and _refines(setting):
                    classes = _refined(coarse, label, setting)
                else:
                    classes, milliseconds = _timed(model, image, label, setting)
                    setting.milliseconds += [milliseconds] if timed else []
            setting.images += 1
            assert setting.metrics is not None
            setting.metrics.update(classes, label)
    return [setting.as_row() for setting in rows]


def _refines(setting: Setting) -> bool:
    return setting.policy is not None and setting.policy.reads != "features"


def _refined(coarse: Refinement, label: Tensor, setting: Setting) -> Tensor:
    """Classes `[B, H, W]` of a selective setting, from a coarse pass that others use too."""
    run, policy = coarse.fork(), setting.policy
    assert policy is not None
    if isinstance(policy, ConfidencePolicy):
        run.refine(policy.cut(run.scores(policy)))
    else:
        run.refine(run.model.choose(run.images, label, policy))
    return run.classes()


def _timed(model: SelectiveSegmentor, image: Tensor, label: Tensor, setting: Setting) -> tuple[Tensor, float]:
    policy, bound = setting.policy, None
    if policy is not None and policy.reads == "dense":
        bound = model.choose(image, label, policy)
    start = now(image.device)
    classes, _ = model.classify(image, setting.output_stride, policy, label, bound)
    return classes, 1000 * (now(image.device) - start)
