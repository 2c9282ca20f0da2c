"""Multiply-adds against PyTorch's own counter, and of extra sites by arithmetic."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparse_seg import build_model
from sparse_seg.evaluation.cost import count_macs, count_parameters


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_dense_count_is_pytorchs(backbone, output_stride):
    model = build_model({"backbone": backbone, "width": 0.25, "num_classes": 7}).eval()
    images = torch.randn(2, 3, 75, 98)
    layouts = model.dense_layouts(images, output_stride)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.outputs(images, layouts)
    counts = count_macs(model, images, layouts)
    assert 2 * sum(counts.values()) == counter.get_total_flops()
    assert list(counts) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]


def test_selective_count_lies_on_the_line_between_all_coarse_and_all_fine():
    model = build_model({"backbone": "resnet50", "width": 0.25, "head": "deeplabv3"}).eval()
    images = torch.randn(1, 3, 64, 128)

    def layer4(fine: int) -> int:
        blocks = torch.zeros(32, dtype=torch.bool)
        blocks[torch.randperm(32)[:fine]] = True
        return count_macs(model, images, model.selective_layouts(images, blocks.view(1, 4, 8)))["layer4"]

    ends = layer4(0), layer4(32)
    assert layer4(8) - ends[0] == (ends[1] - ends[0]) / 4


def test_counting_leaves_no_hooks_and_keeps_the_mode():
    model = build_model({"width": 0.125}).train()
    count_macs(model, torch.randn(1, 3, 64, 64), model.dense_layouts(torch.randn(1, 3, 64, 64), 8))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_parameters_are_those_of_inference():
    plain = build_model({"width": 0.125})
    assert count_parameters(plain) == sum(p.numel() for p in plain.parameters())
    assert count_parameters(build_model({"width": 0.125, "auxiliary": True})) == count_parameters(plain)
