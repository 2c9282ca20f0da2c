"""Compare a graph in onnxruntime with the model that it was made from."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from sparse_seg.errors import SparseSegError
from sparse_seg.export.network import StaticNetwork
from sparse_seg.export.onnx_file import interface
from sparse_seg.export.runtime import open_session
from sparse_seg.models.segmentor import SelectiveSegmentor
from sparse_seg.models.way import Way

TOLERANCE = 1e-4  # of logits, relative to the largest; float32 in another order gives 1e-6 to 1e-5
# Blocks whose scores are equal to rounding may be chosen otherwise: this share of all, or one for another
MOST_BLOCKS = 0.01


@torch.no_grad()
def check_graph(graph: bytes, model: SelectiveSegmentor, network: StaticNetwork, images: int = 2) -> None:
    """Run random images through a graph, and compare blocks, classes and logits with the model's.

    Classes may differ where two logits are equal to rounding.

    Raises:
        SparseSegError: they differ, or onnxruntime is not installed.
    """
    session, generator = open_session(graph, "onnxruntime"), torch.Generator().manual_seed(0)
    outside = copy.deepcopy(model).float().eval()
    for _ in range(images):
        inputs, normalised = random_inputs(network, generator)
        names = interface(network)[0]
        found = session(**{name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        logits, blocks = _expected(outside, network, inputs, normalised, found)
        if blocks is not None:
            wrong = int((blocks.numpy() != found["fine_blocks"]).sum())
            _require(wrong <= max(2, MOST_BLOCKS * blocks.numel()), f"{wrong} blocks are chosen otherwise")
        scale = logits.abs().max().item()
        if "logits" in found:
            error = np.abs(found["logits"] - logits.numpy()).max() / scale
            _require(error <= TOLERANCE, f"logits differ by {error:.1e} of the largest")
        top = logits.topk(2, 1).values
        clear = ((top[:, 0] - top[:, 1]) > TOLERANCE * scale).numpy()
        classes = logits.argmax(1).numpy()
        differing = ((found["classes"] != classes) & clear).mean()
        _require(differing == 0, f"{100 * differing:.2f} % of the classes differ")


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
    mean, std = (torch.tensor(value).float().reshape(1, 3, 1, 1) for value in (options.mean, options.std))
    others = []
    if len(interface(network)[0]) > 1:
        counts = [network.ranking.fine, network.ranking.middle]
        total = network.blocks[0] * network.blocks[1]
        ranks = torch.stack([torch.randperm(total, generator=generator) for _ in range(options.batch)])
        others = list(ranks[:, : sum(counts)].split(counts if counts[1] else counts[:1], 1))
    return (first, *others), (images - mean) / std


def _expected(
    model: SelectiveSegmentor,
    network: StaticNetwork,
    inputs: tuple[Tensor, ...],
    normalised: Tensor,
    found: dict[str, np.ndarray],
) -> tuple[Tensor, Tensor | None]:
    """The logits that a graph should have given with the blocks that it chose, and the model's own blocks."""
    options = network.options
    if options.dense is not None:
        return model.dense(normalised, options.dense), None
    blocks = None
    if network.choice is not None and options.fine_fraction is None:
        blocks = model.classify(normalised, policy=options.policy)[1]
        assert blocks is not None
        blocks = blocks if blocks.dtype == torch.bool else blocks == len(network.strides) - 1
    mask = torch.from_numpy(found["fine_blocks"])
    if network.ranking.middle:
        chosen = network.grid_logits(*inputs)[1]
        assert chosen is not None
        levels = torch.zeros(mask.shape, dtype=torch.int64).flatten(1)
        mask = levels.scatter(1, chosen, 1).reshape(mask.shape).where(~mask, 2)
    return model.start(normalised).take(mask, Way(merge=network.merge)).logits(), blocks


def _require(holds: bool | np.bool_, message: str) -> None:
    if not holds:
        raise SparseSegError(f"the exported graph differs from the model: {message}; nothing is written")
