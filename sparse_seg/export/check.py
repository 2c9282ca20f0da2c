"""Compare a graph in a runtime with the model that it was made from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from sparse_seg.errors import SparseSegError
from sparse_seg.export.options import ExportOptions
from sparse_seg.export.runtime import open_session
from sparse_seg.export.static import StaticNetwork
from sparse_seg.masks import MaskPolicy, blur_scores
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.passes import Pass
from sparse_seg.run.way import Way

TOLERANCE = 1e-4  # of logits, relative to the largest; float32 in another order gives 1e-6 to 1e-5
_Module = TypeVar("_Module", bound=torch.nn.Module)
# Blocks whose scores are equal to rounding may be chosen otherwise: this share of all, or one for another
MOST_BLOCKS = 0.01


@torch.no_grad()
def check_onnx(graph: bytes, model: SelectiveNetwork, network: StaticNetwork, images: int = 2) -> None:
    """Run random images through a graph, and compare blocks, classes and logits with the model's.

    Classes may differ where two logits are equal to rounding.

    Raises:
        SparseSegError: they differ, or onnxruntime is not installed.
    """
    session, generator = open_session(graph, "onnxruntime"), torch.Generator().manual_seed(0)
    outside = plain_copy(model)
    for _ in range(images):
        inputs, normalised = random_inputs(network, generator)
        names = network.interface()[0]
        arrays = session(**{name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        found = {name: torch.from_numpy(value) for name, value in arrays.items()}
        mask = chosen_levels(network, inputs, found)
        if problem := _problem(outside, network.options, normalised, found, mask):
            raise SparseSegError(f"the exported graph differs from the model: {problem}; nothing is written")


@torch.no_grad()
def check_run(
    model: SelectiveNetwork,
    options: ExportOptions,
    images: Tensor,
    found: Mapping[str, Tensor],
    tolerance: float = TOLERANCE,
) -> None:
    """Compare what a graph with these options gave with PyTorch, as `check_onnx` does.

    Args:
        model: runs where the images are.
        images: normalised, `[B, 3, H, W]`.
        found: the graph's outputs by name.
        tolerance: of logits, relative to the largest.

    Raises:
        SparseSegError: they differ.
    """
    mask = None if options.dense is not None else found["fine_blocks"]
    if problem := _problem(model, options, images, found, mask, tolerance):
        raise SparseSegError(
            f"the graph gives other results than PyTorch: {problem}; run this network in PyTorch "
            "(--runtime torch)"
        )


def random_inputs(network: StaticNetwork, generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
    """A network's inputs, of smooth noise, and the images normalised, as the model takes them."""
    options = network.options
    small = torch.rand(options.batch, 3, *(-(-length // 8) for length in options.size), generator=generator)
    images = torch.nn.functional.interpolate(small, options.size, mode="bilinear")
    images = (images + 0.2 * torch.rand(images.shape, generator=generator)).clamp(0, 1)
    first = images
    if options.input == "uint8":
        first = (images * 255).round().permute(0, 2, 3, 1).to(torch.uint8)
        images = first.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(value).float().reshape(1, 3, 1, 1) for value in network.normalisation)
    total = network.blocks[0] * network.blocks[1] if network.lists else 0
    ranks = torch.stack([torch.randperm(total, generator=generator) for _ in range(options.batch)])
    blocks = ranks[:, : sum(network.lists)].split(network.lists, 1)
    return (first, *blocks), (images - mean) / std


def _problem(
    model: SelectiveNetwork,
    options: ExportOptions,
    images: Tensor,
    found: Mapping[str, Tensor],
    mask: Tensor | None,
    tolerance: float = TOLERANCE,
) -> str:
    """What is wrong with a graph's outputs by the model's own, under the mask that the graph chose (None:
    dense); nothing if they are right."""
    run, problem = model.start(images), ""
    if options.dense is not None:
        return _difference(found, run.follow(Way.dense(options.dense)).logits(), tolerance)
    assert mask is not None
    if not options.given and options.fine_fraction is None:
        policy, fine = copy.deepcopy(options.policy or model.policy).to(images).eval(), found["fine_blocks"]
        wrong = _clearly_otherwise(policy, run, fine, tolerance)
        if wrong > max(2, MOST_BLOCKS * fine.numel()):
            problem = f"{wrong} blocks are chosen otherwise"
    return problem or _difference(found, run.take(mask, Way(merge=options.merge)).logits(), tolerance)


def chosen_levels(
    network: StaticNetwork, inputs: tuple[Tensor, ...], found: Mapping[str, Tensor]
) -> Tensor | None:
    """The mask that a graph chose, with three strides the blocks' levels; None when dense."""
    if network.options.dense is not None:
        return None
    mask = found["fine_blocks"]
    if not network.ranking.middle:
        return mask
    chosen = network.grid_logits(*inputs)[1]
    assert chosen is not None
    levels = torch.zeros(mask.shape, dtype=torch.int64).flatten(1)
    return levels.scatter(1, chosen, 1).reshape(mask.shape).where(~mask, 2)


def plain_copy(module: _Module) -> _Module:
    """On the CPU, in float32 and eval mode."""
    return copy.deepcopy(module).cpu().float().eval()


def _clearly_otherwise(policy: MaskPolicy, run: Pass, fine: Tensor, tolerance: float) -> int:
    """How many of the fine blocks, bool `[B, Hc, Wc]`, a policy chooses otherwise, but for ties: scores that
    are equal to rounding may rank blocks otherwise, however many; an empty image has such."""
    own, scores = policy(run).flatten(1), policy.scores(run)
    own = own if own.dtype == torch.bool else own == 2
    scores = (blur_scores(scores) if policy.blur else scores).flatten(1)
    cut = scores.sort(1, descending=True).values[:, fine[0].sum() - 1, None]
    clear = (scores - cut).abs() > tolerance * max(1.0, scores.abs().max().item())
    return int(((own != fine.flatten(1)) & clear).sum())


def _difference(found: Mapping[str, Tensor], logits: Tensor, tolerance: float) -> str:
    """What is wrong with a graph's logits or classes by the model's logits; nothing if they are right.

    Places where the model's are not finite are left out.
    """
    scale = logits.where(logits.isfinite(), 0).abs().max().item()
    if "logits" in found:
        error = (found["logits"] - logits).abs()[logits.isfinite()]
        largest = error.max().item() if len(error) else 0.0
        if not largest <= tolerance * scale:
            return f"logits differ by {largest / scale:.1e} of the largest"
    top = logits.topk(min(2, logits.shape[1]), 1).values
    clear = top[:, 0] - top[:, -1] > tolerance * scale
    differing = (found["classes"] != logits.argmax(1)) & clear
    return f"{100 * differing.float().mean():.2f} % of the classes differ" if differing.any() else ""
