"""P1 and P2 of docs/method.md: the selective network against dense networks of `nn.Conv2d` alone."""

import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from sparse_seg.sites import Grid, Mixed
from tests.reference import (
    MASKS,
    SHALLOW,
    at_sites,
    block_mask,
    dense_reference,
    random_model,
    relative_error,
    stage_values,
)
from tests.slow_reference import SlowSites

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
SIZES = [(32, 32), (33, 47), (101, 137)]
BACKBONES = [("resnet18", "lite"), ("resnet50", "deeplabv3")]
OTHERS = [("resnet18", "deeplabv3"), ("resnet50", "lite")]


class Case(NamedTuple):
    """A network, images, and what the dense networks of output stride 8, 16 and 32 make of them."""

    model: SelectiveNetwork
    images: Tensor
    features: dict[int, list[Tensor]]
    grid_logits: dict[int, Tensor]
    logits: dict[int, Tensor]
    tolerance: float


@functools.cache
@torch.no_grad()
def make_case(
    backbone: str,
    head: str,
    size: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    width: float = 0.125,
    depths: tuple[int, ...] | None = SHALLOW,
) -> Case:
    model = random_model(backbone, head, width, dtype, device, depths=depths)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    features, grid_logits, logits = {}, {}, {}
    for stride in (8, 16, 32):
        reference = dense_reference(model, stride, backbone, head, width)
        features[stride] = reference.backbone(images)
        grid_logits[stride] = reference.head(features[stride][3])
        logits[stride] = reference(images)
    return Case(model, images, features, grid_logits, logits, TOLERANCE[dtype])


def block_shape(size: tuple[int, int]) -> tuple[int, int, int]:
    return 2, -(-size[0] // 16), -(-size[1] // 16)


def grid_size(grid: Tensor) -> tuple[int, int]:
    return grid.shape[2], grid.shape[3]


def mixed_values(case: Case, mask: Tensor) -> list[Mixed]:
    """Of layer3 and layer4."""
    values = stage_values(case.model.start(case.images).take(mask))
    assert [type(value) for value in values] == [Grid, Grid, Mixed, Mixed]
    return values[2:]  # type: ignore[return-value]


def lattice_of(case: Case, mask: Tensor) -> Tensor:
    """Of layer4, `[B, C, Hc, Wc]`."""
    return mixed_values(case, mask)[1].lattice.tensor


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("backbone", "head"), BACKBONES)
@torch.no_grad()
def test_features_of_any_mask(
    backbone: str, head: str, size: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    """P1 under every mask (the lattice is OS16's and never moves), P2 at both ends."""
    case = make_case(backbone, head, size, dtype, device)
    lattices: list[list[Tensor]] = []
    for kind in MASKS:
        mask = block_mask(kind, block_shape(size))
        values = mixed_values(case, mask)
        lattices.append([value.lattice.tensor for value in values])
        for stage, value in zip((2, 3), values, strict=True):
            fine, coarse = case.features[8][stage], case.features[16][stage]
            lattice = lattices[-1][stage - 2]
            assert relative_error(lattice, coarse) < case.tolerance, f"P1 against OS16: {kind}"
            assert relative_error(lattice, fine[:, :, ::2, ::2]) < case.tolerance, f"P1: {kind}"
            assert relative_error(lattice, lattices[0][stage - 2]) < 1e-6, f"the lattice moved: {kind}"
            if kind == "empty":
                assert value.rows[8].shape[0] == 0
            if kind == "full":
                sites = SlowSites(2, grid_size(fine), [mask])
                assert relative_error(at_sites(value, sites), sites.read(fine)) < case.tolerance, "P2"


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("backbone", "head"), [*BACKBONES, *(pytest.param(*one, marks=pytest.mark.slow) for one in OTHERS)]
)
@torch.no_grad()
def test_logits_at_the_ends(backbone: str, head: str, size: tuple[int, int], device: str) -> None:
    """P2's all-fine half and `dense` at 8, 16 and 32."""
    case = make_case(backbone, head, size, torch.float64, device)
    all_fine = case.model(case.images, fine_blocks=block_mask("full", block_shape(size)))
    assert relative_error(all_fine, case.logits[8]) < case.tolerance
    assert relative_error(case.model.dense(case.images), case.logits[8]) < case.tolerance
    for stride in (8, 16, 32):
        run = case.model.start(case.images).follow(Way.dense(stride))
        for ours, theirs in zip(stage_values(run), case.features[stride], strict=True):
            assert isinstance(ours, Grid)
            assert relative_error(ours.tensor, theirs) < case.tolerance
        assert relative_error(run.grid_logits(), case.grid_logits[stride]) < case.tolerance


@pytest.mark.slow
@torch.no_grad()
def test_full_width() -> None:
    size = (65, 97)
    case = make_case("resnet18", "deeplabv3", size, torch.float32, "cpu", 1.0, None)
    lattice = lattice_of(case, block_mask("random", block_shape(size)))
    assert relative_error(lattice, case.features[16][3]) < case.tolerance
    all_fine = case.model(case.images, fine_blocks=block_mask("full", block_shape(size)))
    assert relative_error(all_fine, case.logits[8]) < case.tolerance


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet34", "resnet50", "resnet101"])
@torch.no_grad()
def test_the_deeper_ones(backbone: str) -> None:
    size = (49, 70)
    case = make_case(backbone, "lite", size, torch.float64, "cpu", depths=None)
    mask = block_mask("random", block_shape(size))
    assert relative_error(lattice_of(case, mask), case.features[16][3]) < case.tolerance
    all_fine = case.model(case.images, fine_blocks=torch.ones_like(mask))
    assert relative_error(all_fine, case.logits[8]) < case.tolerance


@pytest.mark.parametrize("head", ["lite", "deeplabv3"])
@torch.no_grad()
def test_trained_at_stride_16(head: str) -> None:
    """A network trained at OS16 runs at OS16 as the dense one, upsampling included."""
    model = random_model(head=head, dtype=torch.float64, trained_stride=16)
    reference = dense_reference(model, 16, "resnet18", head)
    images = torch.randn(2, 3, 70, 101, dtype=torch.float64)
    assert relative_error(model.dense(images, output_stride=16), reference(images)) < 1e-12


@torch.no_grad()
def test_the_cases_are_not_trivial() -> None:
    """Features are alive, of order one, depend on the image, and OS8 has detail that OS16 lacks."""
    case = make_case("resnet18", "lite", (65, 97), torch.float64, "cpu")
    fine, coarse = (case.features[stride][3] for stride in (8, 16))
    assert 0.05 < (fine > 0).double().mean().item() < 0.95
    assert 0.1 < fine.std().item() < 100
    assert relative_error(fine[0], fine[1]) > 0.1
    repeated = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., : fine.shape[2], : fine.shape[3]]
    assert relative_error(repeated, fine) > 0.1


@torch.no_grad()
def test_extra_sites_out_of_reach_of_coarse_blocks() -> None:
    """P3: an extra site differs from dense OS8 exactly where its receptive field meets a coarse block."""
    size = (200, 216)
    case = make_case("resnet18", "lite", size, torch.float64, "cpu")
    mask = torch.ones(block_shape(size), dtype=torch.bool)
    mask[0, 0, 0] = mask[1, -1, 4] = False
    expected = case.features[8][3]
    sites = SlowSites(2, grid_size(expected), [mask])
    rows = at_sites(mixed_values(case, mask)[1], sites)
    reached = torch.tensor([cell in _reached(sites) for cell in sites.cells])
    error = (rows - sites.read(expected)).abs().amax(1) / expected.abs().max()
    extra = torch.arange(len(error)) >= case.features[16][3][:, 0].numel()
    assert (extra & ~reached).sum() > 300
    assert (extra & reached).sum() > 300
    assert error[~reached].max() < 1e-12
    assert (error[reached] > 1e-9).double().mean() > 0.9


@functools.cache
def _reached(sites: SlowSites) -> set[tuple[int, int, int]]:
    """Cells whose receptive field, in convolutions on mixed levels, holds a cell without a site."""
    height, width = sites.size
    missing = {(b, y, x) for b in range(sites.batch) for y in range(height) for x in range(width)}
    missing -= set(sites.cells)
    # resnet18 at OS8: layer3's first convolution reads the dense stage; then 2, 2, 2 cells; then 2, 4, 4, 4
    reached: set[tuple[int, int, int]] = set()
    for dilation in (2, 2, 2, 2, 4, 4, 4):
        steps = [(dy, dx) for dy in (-dilation, 0, dilation) for dx in (-dilation, 0, dilation)]
        reached = {(b, y + dy, x + dx) for b, y, x in reached | missing for dy, dx in steps}
    return reached & set(sites.cells)
