"""Multiply-adds against PyTorch's own counter, layers one by one, published figures; a file's bytes."""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparse_seg import build_model
from sparse_seg.evaluation.cost import checkpoint_bytes, count_macs, count_parameters
from sparse_seg.models.plain import PlainSegmentor
from sparse_seg.run.way import Way
from tests.counting import count_modules
from tests.reference import VARIANTS, grid_logits, random_model, variant_model

PARTS = ["stem", "layer1", "layer2", "layer3", "layer4", "neck", "head"]


@pytest.mark.slow
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
    counts = count_macs(model, images, Way.dense(output_stride))
    if head == "deeplabv3":  # the pooled vector is multiplied once an image, and counted once a row
        layers += 2 * (layouts[3].num_sites - len(images)) * 256**2
    assert 2 * sum(counts.values()) == layers
    assert list(counts) == PARTS

    plain = PlainSegmentor(model, output_stride)
    with torch.no_grad():
        assert count_modules(plain, lambda: plain(images))["all"] == sum(counts.values())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_counts_of_variants_are_those_of_their_layers(variant):
    """Dense and selective, layer by layer and in the plain and the folded form."""
    model, images = variant_model(variant), torch.randn(2, 3, 75, 98, dtype=torch.float64)
    for output_stride in (8, 16):
        counts = count_macs(model, images, Way.dense(output_stride))
        layouts = model.dense_layouts(images, output_stride)
        layers = count_modules(model, functools.partial(grid_logits, model, images, layouts))["all"]
        assert sum(counts.values()) == layers
        plain = PlainSegmentor(model, output_stride)
        assert count_modules(plain, functools.partial(plain, images))["all"] == layers
    mask = torch.rand(2, 5, 7) < 0.3
    run = model.start(images).take(mask)
    assert sum(run.macs().values()) == count_modules(model, lambda: model(images, mask))["all"]
    assert run.macs() == model.for_inference().start(images).take(mask).macs()


@pytest.mark.slow
@pytest.mark.parametrize(("output_stride", "backbone", "whole"), [(8, 1417.98, 1929.24), (16, 414.57, None)])
def test_published_figures_of_deeplabv3_resnet101(output_stride, backbone, whole):
    """1024x2048, 19 classes: convolutions alone, padding counted. On meta tensors: only shapes."""
    with torch.device("meta"):
        model = build_model({"backbone": "resnet101", "head": "deeplabv3", "num_classes": 19})
        plain, images = PlainSegmentor(model, output_stride).eval(), torch.empty(1, 3, 1024, 2048)
        with torch.no_grad():
            counts = count_modules(plain, lambda: plain(images), lambda name: name.split(".")[0])
    assert round(sum(counts[part] for part in ("stem", "layer1", "later")) / 1e9, 2) == backbone
    if whole:
        assert round(sum(counts.values()) / 1e9, 2) == whole


def test_selective_count_lies_on_the_line_between_all_coarse_and_all_fine():
    model = build_model({"backbone": "resnet50", "width": 0.25, "head": "deeplabv3"}).eval()
    images = torch.randn(1, 3, 64, 128)

    def layer4(fine: int) -> int:
        blocks = torch.zeros(32, dtype=torch.bool)
        blocks[torch.randperm(32)[:fine]] = True
        with torch.no_grad():
            return model.start(images).take(blocks.view(1, 4, 8)).macs()["layer4"]

    ends = layer4(0), layer4(32)
    assert layer4(8) - ends[0] == (ends[1] - ends[0]) / 4


def test_a_policy_counts_with_the_passes_it_asks_for():
    model, images = random_model(), torch.randn(1, 3, 64, 64)
    given = count_macs(model, images)
    assert list(given) == ["mask", *PARTS]
    assert given["mask"] == 0, "an edge policy multiplies nothing that counts"
    coarse = count_macs(model, images, Way.dense(16))
    counts = count_macs(model, images, Way.policy("confidence", 0.25))
    assert counts["stem"] == coarse["stem"], "run once"
    assert coarse["layer4"] < counts["layer4"] < count_macs(model, images, Way.dense(8))["layer4"]
    assert counts["head"] == coarse["head"] + given["head"], "on the coarse and on the fine grid"


def test_counting_keeps_the_mode():
    model = build_model({"width": 0.125}).train()
    count_macs(model, torch.randn(1, 3, 64, 64), Way.dense(8))
    assert model.training


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
