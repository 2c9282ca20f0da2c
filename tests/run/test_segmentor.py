"""The segmentor as its users call it: calls, precision, errors, building and printing."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_seg import build_model
from sparse_seg.errors import ConfigError
from sparse_seg.networks.heads import DeepLabV3Head
from sparse_seg.run.exits import auxiliary_logits
from tests.reference import block_mask, random_model, relative_error


@torch.no_grad()
def test_the_policy_is_the_default_mask() -> None:
    model, images = random_model(), torch.randn(2, 3, 65, 97)
    mask = model.policy(model.start(images))
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(model(images), model(images, fine_blocks=mask))
    assert model(images).shape == (2, 5, 65, 97)
    assert relative_error(model(images, fine_blocks=~mask), model(images)) > 1e-3, "the mask matters"


def test_training_keeps_no_copies() -> None:
    """With every block fine, backward keeps about what it keeps of the dense network."""
    settings = {"backbone": "resnet18", "width": 0.125, "head": "lite", "num_classes": 5}
    model, images, kept = build_model(settings).train(), torch.randn(2, 3, 64, 128), list[int]()
    for fine in (True, False):
        storages: dict[int, int] = {}

        def note(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            blocks = torch.full((2, 4, 8), fine)
            (model(images, blocks) if fine else model.dense(images, output_stride=8)).sum()
        kept.append(sum(storages.values()))
    assert kept[0] < 1.08 * kept[1], "1.13 with copies of what windows read"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 31, 64), r"at least 32x32 px, not \[31, 64\]"),
        (torch.zeros(2, 3, 64, 31), r"at least 32x32 px, not \[64, 31\]"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), r"must be float .* got torch.uint8 \[2, 3, 64, 64\]"),
        (torch.zeros(2, 1, 64, 64), r"must be float \[B, 3, H, W\], normalised; got .* \[2, 1, 64, 64\]"),
        (torch.zeros(3, 64, 64), r"got torch.float32 \[3, 64, 64\]"),
        (torch.zeros(1, 3, 40, 40).double(), r"are torch\.float64 and the network is torch\.float32; pass"),
        (torch.zeros(1, 3, 40, 40).numpy(), r"images must be a tensor \[B, 3, H, W\], not ndarray"),
    ],
)
def test_bad_images(images: Any, message: str) -> None:
    for call in (random_model(), random_model().dense):
        with pytest.raises(ValueError, match=message):
            call(images)


def test_bad_masks_and_strides() -> None:
    images, levels = torch.zeros(2, 3, 65, 97), torch.zeros(2, 5, 7, dtype=torch.int64)
    says = r"bool or int64 levels \[2, 5, 7\] for images \[2, 3, 65, 97\], not torch."
    masks = levels[:, 1:].bool(), levels[:1].bool(), levels.float(), levels[:, None].bool()
    for mask, told in zip(masks, ("bool .2, 4", "bool .1, 5", "float32 .2, 5", "bool .2, 1, 5"), strict=True):
        with pytest.raises(ValueError, match=says + told):
            random_model()(images, fine_blocks=mask)
    with pytest.raises(ValueError, match=r"levels must lie in 0..1 for the strides \[8, 16\]"):
        random_model()(images, levels + 2)
    three = random_model(strides=(8, 16, 32))
    with pytest.raises(ValueError, match=r"levels must lie in 0..2 for the strides \[8, 16, 32\]"):
        three(images, torch.full((2, 3, 4), 3))
    with pytest.raises(ValueError, match=r"must be bool or int64 levels \[2, 3, 4\]"):
        three(images, levels)
    with pytest.raises(ValueError, match="output_stride must be 4, 8, 16 or 32, not 2"):
        three.dense(images, output_stride=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("backbone", "head"), [("resnet18", "lite"), ("resnet50", "deeplabv3")])
def test_autocast(backbone: str, head: str, dtype: torch.dtype, device: str) -> None:
    """Runs, stays near float32, and trains with float32 gradients."""
    model = copy.deepcopy(random_model(backbone, head, device=device))
    images = torch.randn(2, 3, 65, 97, device=device, generator=torch.Generator(device).manual_seed(0))
    mask = block_mask("random", (2, 5, 7))
    with torch.no_grad():
        full = model(images, fine_blocks=mask)
        with torch.autocast(device, dtype):
            half = model(images, fine_blocks=mask)
            model(images.to(dtype), fine_blocks=mask)  # images of its dtype are taken, too
    assert half.dtype == torch.float32, "logits are for the loss"
    error = (half - full).square().mean().sqrt() / full.std()
    assert error < (0.1 if dtype == torch.bfloat16 else 0.02)
    assert error > 1e-6, "autocast did nothing"

    model.train()
    with torch.autocast(device, dtype):
        loss = model(images, fine_blocks=mask).square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("head", ["lite", "deeplabv3"])
@torch.no_grad()
def test_plain_bfloat16(head: str) -> None:
    model = random_model(head=head)
    half = copy.deepcopy(model).to(torch.bfloat16)
    images, mask = torch.randn(2, 3, 65, 97), block_mask("random", (2, 5, 7))
    full = model(images, fine_blocks=mask)
    logits = half(images.bfloat16(), fine_blocks=mask)
    assert (logits.float() - full).square().mean().sqrt() / full.std() < 0.15


def test_auxiliary_head_in_training_only() -> None:
    torch.manual_seed(0)
    model = build_model({"width": 0.125, "auxiliary": True, "num_classes": 4})
    images = torch.randn(2, 3, 48, 50)
    run = model.start(images).follow()
    logits, auxiliary = run.logits(), auxiliary_logits(run)
    assert auxiliary is not None
    assert logits.shape == auxiliary.shape == (2, 4, 48, 50)
    assert auxiliary_logits(model.eval().start(images).follow()) is None


def test_build_from_a_plain_dict() -> None:
    model = build_model({"backbone": "resnet34", "head": "deeplabv3", "num_classes": 7, "width": 0.25})
    assert isinstance(model.module.head, DeepLabV3Head)
    assert model.module.head.classifier.out_channels == model.num_classes == 7
    assert len(model.module.backbone.layer3) == 6
    spacings: dict[str, set[int]] = {}
    for node in model.graph.nodes:
        if node.op == "conv2d" and model.geometry.window(node) is not None:
            part = node.layer.split(".")[1] if node.layer.startswith("backbone") else node.layer[:9]
            spacings.setdefault(part, set()).add(model.geometry.spacing(node))
    stages = {"conv1": {1}, "layer1": {4}, "layer2": {4, 8}, "layer3": {8, 16}, "layer4": {16, 32}}
    assert spacings == stages | {"head.aspp": {96, 192, 288}, "head.refi": {8}}
    assert build_model({"width": 0.125})(torch.zeros(1, 3, 32, 32)).shape[1] == 19
    policy = build_model({"mask": {"policy": "random", "threshold": 0.4, "seed": 9}}).policy
    assert (policy.threshold, policy.fine_fraction, policy.seed) == (0.4, None, 9)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mask": {"polcy": "edge"}}, "unknown key 'mask.polcy'; did you mean 'mask.policy'"),
        ({"head": "psp"}, "model.head is 'psp'; choose one of lite, deeplabv3, deeplabv3plus, lr"),
        ({"exchange": "cubic"}, "model.exchange is 'cubic'.*linear, nearest, none"),
        ({"mask": {"policy": "uniform"}}, "uniform policy takes fine_fraction 0 or 1, not 0.15"),
        ({"width": 0.3}, "width 0.3 makes 19.2 of 64 channels"),
        ({"trained_stride": 4}, "model.trained_stride is 4"),
        ({"strides": [8, 32]}, r"model.strides is \[8, 32\]"),
        ({"strides": [16, 8]}, r"model.strides is \[16, 8\]"),
        ({"strides": [8, 16, 32], "head": "deeplabv3", "aspp_rates": [6, 12]}, "must divide by 32"),
        ({"strides": [8, 16, 32], "mask": {"threshold": 0.1}}, "needs model.mask.middle_threshold"),
        ({"strides": [8, 16, 32], "mask": {"fine_fraction": 0.9}}, "must add up to 1 at most"),
        ({"mask": {"edge": "canny"}}, "model.mask.edge is 'canny'"),
    ],
)
def test_bad_configs(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(config)


def test_print() -> None:
    text = str(random_model())
    assert "strides=[8, 16], convolutions: 6 early, 11 rows, 3 late" in text
    assert "EdgePolicy(fine_fraction=0.15)" in text


def test_modules_carry_no_hidden_state() -> None:
    """A forward leaves parameters, buffers and attributes as they were in eval mode."""
    model: nn.Module = random_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    model(torch.randn(1, 3, 40, 56))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_images_in_bytes_are_told() -> None:
    model, images = random_model(), torch.rand(1, 3, 64, 64)
    with pytest.warns(
        UserWarning, match=r"images reach 2\d\d.* look like 0..255; normalise them: \(images / 255"
    ):
        model(255 * images)
    model(images)
    model(255 * images - 100)  # normalised by a mean and std of bytes
