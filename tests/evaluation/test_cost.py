"""Multiply-adds against PyTorch's own counter, published figures, and brute force; bytes against a file."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from sparse_seg import build_model
from sparse_seg.evaluation.cost import (
    Macs,
    checkpoint_bytes,
    count_cost,
    count_macs,
    count_modules,
    count_parameters,
    layer_macs,
)
from sparse_seg.masks import EdgePolicy
from sparse_seg.models.plain import PlainSegmentor
from sparse_seg.sparse import SelectiveConv2d, SiteLayout
from tests.reference import VARIANTS, random_model, variant_model

PARTS = ["stem", "layer1", "layer2", "layer3", "layer4", "neck", "head"]


@pytest.mark.parametrize(
    ("backbone", "head"), [("resnet18", "lite"), ("resnet50", "lite"), ("resnet50", "deeplabv3")]
)
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_dense_count_is_pytorchs(backbone, head, output_stride):
    """Exactly its count for backbone and head, but for image pooling's bmm; upsampling is not counted."""
    model = build_model({"backbone": backbone, "head": head, "width": 0.25, "num_classes": 7}).eval()
    images = torch.randn(2, 3, 75, 98)
    layouts = model.dense_layouts(images, output_stride)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.head(model.backbone(images, layouts)[3], layouts[3])
    flops = counter.get_flop_counts()["Global"]
    layers = sum(count for op, count in flops.items() if op is not torch.ops.aten.bmm)
    counts = count_macs(model, images, layouts)
    if head == "deeplabv3":  # the pooled vector is multiplied once an image, and counted once a row
        layers += 2 * (layouts[3].num_sites - len(images)) * 256**2
    assert 2 * sum(counts.values()) == layers
    assert list(counts) == PARTS

    plain = PlainSegmentor(model, output_stride)
    with torch.no_grad():
        assert count_modules(plain, lambda: plain(images))["all"].total == sum(counts.values())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("output_stride", [8, 16])
@torch.no_grad()
def test_dense_count_of_variants_is_pytorchs(variant, output_stride):
    """Of `deeplabv3plus` all but the upsampling inside: a product of matrices where strides differ."""
    model, images = variant_model(variant), torch.randn(2, 3, 75, 98, dtype=torch.float64)
    layouts = model.dense_layouts(images, output_stride)
    with FlopCounterMode(display=False) as counter:
        model.grid_logits(model.backbone(images, layouts), layouts)
    flops = counter.get_flop_counts()["Global"]
    counts = count_cost(model, images, layouts)
    products = (torch.ops.aten.bmm, torch.ops.aten.mm)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    in_linear = count_modules(
        torch.nn.ModuleList(linear), lambda: model.grid_logits(model.backbone(images, layouts), layouts)
    )
    convolved = sum(count for op, count in flops.items() if op not in products)
    total = sum(macs.total for macs in counts.values())
    assert 2 * (total - in_linear.get("all", Macs()).total) == convolved
    plain = PlainSegmentor(model, output_stride)
    theirs = count_modules(plain, lambda: plain(images))["all"]
    assert theirs.total == total
    assert theirs.hits == sum(macs.hits for macs in counts.values())
    assert ("neck" in counts) == (variant != "fcn")


@pytest.mark.parametrize(("output_stride", "backbone", "whole"), [(8, 1417.98, 1929.24), (16, 414.57, None)])
def test_published_figures_of_deeplabv3_resnet101(output_stride, backbone, whole):
    """1024x2048, 19 classes: convolutions alone, padding counted. On meta tensors: only shapes."""
    with torch.device("meta"):
        model = build_model({"backbone": "resnet101", "head": "deeplabv3", "num_classes": 19})
        plain, images = PlainSegmentor(model, output_stride).eval(), torch.empty(1, 3, 1024, 2048)
        with torch.no_grad():
            counts = count_modules(plain, lambda: plain(images), lambda name: name.split(".")[0])
    assert round((counts["stem"] + counts["stages"]).total / 1e9, 2) == backbone
    if whole:
        assert round(sum(macs.total for macs in counts.values()) / 1e9, 2) == whole


def test_selective_count_lies_on_the_line_between_all_coarse_and_all_fine():
    model = build_model({"backbone": "resnet50", "width": 0.25, "head": "deeplabv3"}).eval()
    images = torch.randn(1, 3, 64, 128)

    def layer4(fine: int) -> int:
        blocks = torch.zeros(32, dtype=torch.bool)
        blocks[torch.randperm(32)[:fine]] = True
        return count_macs(model, images, model.selective_layouts(images, blocks.view(1, 4, 8)))["layer4"]

    ends = layer4(0), layer4(32)
    assert layer4(8) - ends[0] == (ends[1] - ends[0]) / 4


def brute_hits(owned: torch.Tensor, taken: torch.Tensor, spacing: int, exchange: str) -> int:
    """(site, tap) pairs, place by place: `owned`, `taken` are bool `[H, W]` of source and output sites."""
    height, width = owned.shape
    hits = 0
    for y, x in taken.nonzero().tolist():
        for dy in (-spacing, 0, spacing):
            for dx in (-spacing, 0, spacing):
                inside = 0 <= y + dy < height and 0 <= x + dx < width
                hits += inside and (exchange != "none" or bool(owned[y + dy, x + dx]))
    return hits


@pytest.mark.parametrize("exchange", ["linear", "nearest", "none"])
@pytest.mark.parametrize("size", [(8, 10), (9, 13)])
@pytest.mark.parametrize("spacing", [16, 32])
def test_hits_are_those_of_brute_force(exchange, size, spacing):
    torch.manual_seed(0)
    blocks = torch.rand(1, -(-size[0] // 2), -(-size[1] // 2)) < 0.4
    layout = SiteLayout.from_fine_blocks(blocks, size)
    conv = SelectiveConv2d(3, 5, spacing, exchange)
    rows = torch.randn(layout.num_sites, 3)
    macs = layer_macs(conv, (rows, layout, layout), conv(rows, layout, layout))
    sites = layout.site[0] >= 0
    assert macs.total == layout.num_sites * 9 * 15
    assert macs.hits == brute_hits(sites, sites, spacing // 8, exchange) * 15

    dense = SiteLayout(1, size, 8)  # the entry of a stage: from a dense grid, 8 px apart
    entry = SelectiveConv2d(3, 5, 8, exchange)
    rows = torch.randn(dense.num_sites, 3)
    macs = layer_macs(entry, (rows, dense, layout), entry(rows, dense, layout))
    assert macs.hits == brute_hits(torch.ones(size, dtype=torch.bool), sites, 1, exchange) * 15


@pytest.mark.parametrize(("stride", "dilation", "groups"), [(1, 1, 1), (2, 1, 1), (1, 4, 1), (1, 1, 6)])
def test_hits_of_a_dense_convolution_leave_padding_out(stride, dilation, groups):
    conv = torch.nn.Conv2d(6, 12, 3, stride, dilation, dilation, groups, bias=False)
    images = torch.randn(2, 6, 9, 14)
    ones = F.conv2d(torch.ones(1, 1, 9, 14), torch.ones(1, 1, 3, 3), None, stride, dilation, dilation)
    macs = layer_macs(conv, (images,), conv(images))
    assert macs == Macs(2 * ones.numel() * 9 * 72 // groups, 2 * int(ones.sum()) * 72 // groups)


def test_dense_hits_equal_those_of_the_plain_network():
    model = random_model("resnet50", "deeplabv3")
    images = torch.randn(1, 3, 75, 98)
    for stride in (8, 16):
        ours = count_cost(model, images, model.dense_layouts(images, stride))
        plain = PlainSegmentor(model, stride).eval()
        with torch.no_grad():
            theirs = count_modules(plain, functools.partial(plain, images))["all"]
        assert sum(macs.hits for macs in ours.values()) == theirs.hits < theirs.total


def test_a_policy_counts_as_mask():
    class Convolving(EdgePolicy):
        def scores(self, images, labels):
            return super().scores(F.conv2d(images, torch.ones(3, 3, 1, 1)), labels)

    model, images = random_model(), torch.randn(1, 3, 64, 64)
    layouts = model.selective_layouts(images)
    assert count_cost(model, images, layouts, EdgePolicy(0.1))["mask"] == Macs(0, 0)
    counts = count_cost(model, images, layouts, Convolving(0.1))
    assert counts["mask"].total == 9 * 64 * 64
    assert list(counts) == [*PARTS, "mask"]


def test_counting_leaves_no_hooks_and_keeps_the_mode():
    model = build_model({"width": 0.125}).train()
    count_macs(model, torch.randn(1, 3, 64, 64), model.dense_layouts(torch.randn(1, 3, 64, 64), 8))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_parameters_are_those_of_inference():
    plain = build_model({"width": 0.125})
    assert count_parameters(plain) == sum(p.numel() for p in plain.parameters())
    assert count_parameters(build_model({"width": 0.125, "auxiliary": True})) == count_parameters(plain)


def test_checkpoint_bytes_are_those_of_a_file(tmp_path):
    model = build_model({"width": 0.125})
    with (tmp_path / "weights.pt").open("wb") as file:
        torch.save(dict(model.state_dict()), file)
    assert checkpoint_bytes(model) == (tmp_path / "weights.pt").stat().st_size
    assert checkpoint_bytes(build_model({"width": 0.125, "auxiliary": True})) == checkpoint_bytes(model)
    assert checkpoint_bytes(model) > 4 * count_parameters(model)
