"""Three strides: every level exact in P1's sense, ends as dense networks."""

import pytest
import torch
from torch import Tensor

from sparse_seg import build_model
from sparse_seg.ops.upsample import upsample_logits
from sparse_seg.run.way import Way
from sparse_seg.sites import Mixed
from tests.reference import dense_reference, plain_network, random_model, relative_error, stage_values

STRIDES = [(8, 16, 32), (4, 8, 16)]
SIZES = [(33, 47), (70, 101), (96, 64)]


def random_images(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def block_levels(kind: str, images: Tensor, block: int, seed: int = 0) -> Tensor:
    """coarse, middle, fine: all blocks alike; random; split: each 1 or 2; one: a single fine block."""
    shape = (len(images), -(-images.shape[2] // block), -(-images.shape[3] // block))
    low, high = {"coarse": (0, 1), "middle": (1, 2), "fine": (2, 3), "one": (0, 1), "split": (1, 3)}.get(
        kind, (0, 3)
    )
    levels = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))
    if kind == "one":
        levels[0, -1, 0] = 2
    return levels


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("strides", STRIDES, ids=str)
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@torch.no_grad()
def test_levels_are_exact(backbone: str, strides: tuple[int, ...], size: tuple[int, int]) -> None:
    """P1 level by level: the lattice is the plain strided network's under any mask; where all blocks are
    split once, the sites of the middle grid are the dense middle network's under any finer mask."""
    model, images = random_model(backbone, dtype=torch.float64, strides=strides), random_images(size)
    dense = {s: dense_reference(model, s, backbone).backbone(images)[3] for s in strides}
    finest, middle, coarsest = strides
    for kind in ("coarse", "middle", "fine", "random", "split", "one"):
        value = stage_values(model.start(images).take(block_levels(kind, images, coarsest)))[3]
        assert isinstance(value, Mixed)
        grid = value.densify("none")
        assert (value.lattice.stride, grid.stride) == (coarsest, finest)
        assert relative_error(value.lattice.tensor, dense[coarsest]) < 1e-12, kind
        if kind in ("middle", "split", "fine"):
            assert relative_error(grid.thinned(middle), dense[middle]) < 1e-12, kind
        if kind == "fine":
            assert relative_error(grid.tensor, dense[finest]) < 1e-12


@pytest.mark.parametrize("strides", STRIDES, ids=str)
@pytest.mark.parametrize("head", ["lite", "deeplabv3"])
@torch.no_grad()
def test_all_fine_is_dense(head: str, strides: tuple[int, ...]) -> None:
    """As `dense`, as the plain `nn.Conv2d` network, and by a bool mask too; the fast form likewise."""
    model, images = random_model(head=head, dtype=torch.float64, strides=strides), random_images((70, 101))
    reference = dense_reference(model, strides[0], "resnet18", head)
    size = (images.shape[2], images.shape[3])
    expected = upsample_logits(reference.grid_logits(images), size, strides[0], 8)
    fine = block_levels("fine", images, strides[-1])
    runs = [model(images, fine), model(images, fine.bool()), model.dense(images, strides[0])]
    runs += [plain_network(model, strides[0])(images), model.for_inference()(images, fine)]
    for logits in runs:
        assert relative_error(logits, expected) < 1e-12


@torch.no_grad()
def test_the_head_keeps_its_trained_spacing() -> None:
    """Dense OS4 holds the dense OS8 network in its phase 0, the head's 3x3 included."""
    model, images = random_model(dtype=torch.float64), random_images((70, 101))
    grids = []
    for stride in (4, 8):
        grids.append(model.start(images).follow(Way.dense(stride)).grid_logits())
    assert relative_error(grids[0][:, :, ::2, ::2], grids[1]) < 1e-12


@torch.no_grad()
def test_policies_cut_twice() -> None:
    model = build_model({"width": 0.125, "strides": [8, 16, 32], "mask": {"fine_fraction": 0.25}}).eval()
    images = torch.randn(2, 3, 128, 256)
    levels = model.policy(model.start(images))
    assert levels.shape == (2, 4, 8)
    for one in levels:
        assert one.flatten().bincount(minlength=3).tolist() == [32 - 8 - 6, 6, 8]
    assert torch.equal(model(images), model(images, levels))
