"""One set of weights, several ways to run it: accuracy against cost without retraining."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_seg.config import DataConfig
from sparse_seg.data.batches import evaluation_loader
from sparse_seg.data.dataset import SegmentationDataset
from sparse_seg.data.transforms import normalise
from sparse_seg.errors import ConfigError, SparseSegError, first_line
from sparse_seg.evaluation.cost import count_macs
from sparse_seg.evaluation.metrics import SegmentationMetrics
from sparse_seg.export.runner import AUTO, PIXELS, TORCH, runtime_segmentor
from sparse_seg.export.runtime import RUNTIMES
from sparse_seg.export.segmentor import GRAPHS, RuntimeSegmentor
from sparse_seg.masks import MaskPolicy, block_shape
from sparse_seg.progress import bar
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from sparse_seg.timing import now


def comparison_ways(
    model: SelectiveNetwork,
    policies: Sequence[str],
    fractions: Sequence[float],
    exchanges: Sequence[str] = (),
    merges: Sequence[str] = (),
) -> list[Way]:
    """The dense network at each of the model's strides, then each policy at each fine fraction.

    Args:
        policies: see `parse_policy`.
        exchanges, merges: run under each of these rules; by default the model's own.

    Raises:
        ConfigError: an unknown policy or option, a learned mask where the model has none, or merge `patch`
            where no coarse pass can be refined.
    """
    middle = model.mask.middle_fraction if len(model.strides) == 3 else None
    rules: Sequence[str | None] = exchanges or [None]
    joins: Sequence[str | None] = merges or [None]
    ways = [
        Way.policy(spec, fraction, middle_fraction=middle, exchange=exchange, merge=merge)
        for spec, exchange, merge, fraction in itertools.product(policies, rules, joins, fractions)
    ]
    for way in ways:
        model.policy_for(way)
        if (way.merge or model.merge) == "patch" and not model.refines(way):
            raise ConfigError(f"{way.name}: merge patch needs a coarse pass that no mask changes; drop it")
    return [*(Way.dense(stride) for stride in model.strides), *ways]


def comparison_runtime(
    model: SelectiveNetwork, dataset: SegmentationDataset, data: DataConfig, ways: Sequence[Way], asked: str
) -> tuple[RuntimeSegmentor | None, str]:
    """What runs all ways, with its graphs for the first image, or None for PyTorch; and why nothing else, if
    that is to be said.

    Args:
        asked: `torch`, a runtime, or `auto`: onnxruntime, on the CPU, if it can run all ways, and images have
            one size that gets a graph.

    Raises:
        SparseSegError: the runtime that is asked for is not installed, or cannot run one of the ways.
    """
    if asked == TORCH:
        return None, ""
    try:
        if asked == AUTO:
            _check_auto(model, dataset)
        runtime = RUNTIMES[0] if asked == AUTO else asked
        fast = runtime_segmentor(model, runtime, most=max(GRAPHS, len(ways)))
        image = normalise(dataset.load(0)[0], data.mean, data.std)[None].to(model.device)
        for way in ways:
            _prepare(fast, way, image)
    except Exception as error:  # whatever exporter or runtime raise: PyTorch can do it
        if asked != AUTO:
            raise
        return None, first_line(error)
    return fast, ""


def _check_auto(model: SelectiveNetwork, dataset: SegmentationDataset) -> None:
    if model.device.type != "cpu":
        raise SparseSegError(f"on {model.device.type}")
    sizes = {dataset.load(index)[0].shape[:2] for index in (0, len(dataset) // 2, len(dataset) - 1)}
    if len(sizes) > 1 or math.prod(next(iter(sizes))) > PIXELS:
        raise SparseSegError("images are large, or of several sizes, each of which needs its graphs")


def _prepare(fast: RuntimeSegmentor, way: Way, image: Tensor) -> None:
    """Make the graph of a way; bounds get their blocks from PyTorch. Raises a SparseSegError where none can
    run it."""
    policy = fast.policy_for(way)
    try:
        if policy is None or not policy.is_bound:
            fast.start(image).follow(way, policy).prepare(logits=False)
            return
        fast.check_sites(way)
        blocks = math.prod(block_shape(image, fast.strides[-1]))
        if round((policy.fine_fraction or 0) * blocks) == 0:
            raise SparseSegError(f"a graph needs a fine block, and this gives none of {blocks}")
    except SparseSegError as error:
        raise SparseSegError(f"{way.name}: {error}") from None


def groups(ways: Sequence[Way]) -> list[list[Way]]:
    """The ways in parts that can be measured one by one: dense ones, then each policy under each rule."""
    return [
        list(part) for _, part in itertools.groupby(ways, lambda way: (way.mask, way.exchange, way.merge))
    ]


@dataclass
class _Result:
    """What is measured of one way."""

    way: Way
    policy: MaskPolicy | None
    metrics: SegmentationMetrics
    gmacs: float = 0.0  # of the first image
    milliseconds: list[float] = field(default_factory=list)  # one per image, with the mask, but for bounds

    def as_row(self, images: int) -> dict[str, Any]:
        """Plain values: percent, GMACs, median milliseconds."""
        result, way = self.metrics.result(), self.way
        return {
            "network": way.name,
            "policy": way.mask,
            "exchange": way.exchange,
            "merge": way.merge,
            "fine_fraction": way.fine_fraction,
            "middle_fraction": way.middle_fraction,
            "output_stride": way.output_stride,
            "miou": 100 * result.miou,
            "boundary_miou": 100 * result.boundary_miou,
            "class_iou": [100 * iou for iou in result.class_iou],
            "gmacs": self.gmacs,
            "milliseconds": statistics.median(self.milliseconds) if self.milliseconds else None,
            "images": images,
        }


@torch.inference_mode()
def compare(
    model: SelectiveNetwork,
    dataset: SegmentationDataset,
    data: DataConfig,
    ways: Sequence[Way],
    limit: int | None = None,
    timed: bool = True,
    fast: RuntimeSegmentor | None = None,
) -> list[dict[str, Any]]:
    """Run every way on every image; returns a row of plain values for each.

    The ways take turns on each image, so that drift of the machine falls on all alike. Without `timed` all
    masks refine one coarse pass, which gives the same numbers to rounding (P4 of docs/method.md) several
    times faster. The oracles that run the dense network do so off the clock and the count.

    Args:
        fast: runs the ways, in place of the model; what it takes to make graphs is not timed.
    """
    device = model.device
    model.eval()
    count = len(dataset) if limit is None else min(limit, len(dataset))
    policies = [None if way.is_dense else (fast or model).policy_for(way) for way in ways]
    results = [
        _Result(way, policy, SegmentationMetrics(len(dataset.classes)))
        for way, policy in zip(ways, policies, strict=True)
    ]
    loader = evaluation_loader(dataset, data, range(count))
    for image, label, index in bar(loader, "compare", count):
        image, label = image.to(device), label.to(device)
        coarse = model.start(image, label).start_coarse() if not timed and model.refines(Way()) else None
        for result in results:
            if result.policy is not None and dataset.starts(index):
                result.policy.remember(None)
            looks_back = result.policy is not None and not result.policy.reads_image_alone
            if index == 0 or (index == 1 and looks_back):  # the first frame of such has another's cost
                macs = count_macs(model, image, result.way, label, result.policy)
                result.gmacs = sum(macs.values()) / 1e9
            if coarse is not None and result.policy is not None and model.refines(result.way):
                run = coarse.fork().follow(result.way, result.policy)
                classes = run.classes()
                result.policy.remember(run)
            else:
                classes, milliseconds = _timed(model, fast, image, label, result)
                result.milliseconds += [milliseconds] if timed else []
            result.metrics.update(classes, label)
    return [result.as_row(count) for result in results]


def _timed(
    model: SelectiveNetwork, fast: RuntimeSegmentor | None, image: Tensor, label: Tensor, result: _Result
) -> tuple[Tensor, float]:
    """Classes `[B, H, W]` and milliseconds; a bound's mask is made before the clock starts, and so is a
    graph."""
    policy, way = result.policy, result.way
    bound = policy(model.start(image, label)) if policy is not None and policy.is_bound else None

    def asked(run: Any) -> Any:
        return run.follow(way, policy) if bound is None else run.take(bound, way)

    if fast is not None:
        asked(fast.start(image)).prepare(logits=False)
    start = now(model.device)
    run = asked((fast or model).start(image, label))
    classes = run.classes()
    if policy is not None:
        policy.remember(run)
    return classes, 1000 * (now(model.device) - start)
