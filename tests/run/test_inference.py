"""The module itself, a plain dense network, and the form for inference give the network's numbers."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sparse_seg import build_model
from sparse_seg.networks.encoder_decoder import EncoderDecoder, build_module
from sparse_seg.run.network import SelectiveNetwork
from tests.reference import VARIANTS, random_model, randomise, relative_error, variant_model

MASK = torch.rand(1, 6, 8, generator=torch.Generator().manual_seed(0)) < 0.3


def fresh(backbone: str = "resnet18", head: str = "lite") -> SelectiveNetwork:
    torch.manual_seed(0)
    model = build_model({"backbone": backbone, "head": head, "width": 0.125, "num_classes": 5})
    randomise(model)
    return model.eval()


def twin(model: SelectiveNetwork, output_stride: int) -> EncoderDecoder:
    """The plain network of the same weights at an output stride."""
    plain = build_module(model.settings, output_stride).to(next(model.parameters()))
    plain.load_state_dict(model.module.state_dict())
    return plain.train(model.training)


def check(model: SelectiveNetwork, size: tuple[int, int]) -> None:
    """Dense at every stride, all fine, and folded in both precisions."""
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    blocks = torch.rand(2, -(-size[0] // 16), -(-size[1] // 16)) < 0.3
    fast, single = model.for_inference(), copy.deepcopy(model).float().for_inference()
    pairs = [(model(images, torch.ones_like(blocks)), twin(model, 8)(images))]
    for stride in (4, 8, 16, 32):
        expected = twin(model, stride)(images)
        pairs += [(model.dense(images, stride), expected), (fast.dense(images, stride), expected)]
    pairs += [(fast(images, mask), model(images, mask)) for mask in (blocks, torch.ones_like(blocks))]
    for found, expected in pairs:
        assert relative_error(found, expected) < 1e-12
    assert relative_error(single(images.float(), blocks).double(), model(images, blocks)) < 1e-5
    assert not any(node.op == "batch_norm" for node in fast.graph.nodes), "all are folded"


@pytest.mark.parametrize(("backbone", "head"), [("resnet18", "lite"), ("resnet50", "deeplabv3")])
@torch.no_grad()
def test_networks(backbone, head):
    model = random_model(backbone, head, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    check(model, (75, 98))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_variants(variant):
    check(variant_model(variant), (47, 101))


def test_gradients_equal_in_training():
    """Batch statistics and gradients too."""
    model = copy.deepcopy(random_model("resnet18", "deeplabv3", dtype=torch.float64)).train()
    plain = twin(model, 8)
    for module in (*model.modules(), *plain.modules()):
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()  # its draws would differ
    images, gradients = torch.randn(2, 3, 64, 96, dtype=torch.float64), []
    for network, run in ((plain, plain), (model.module, model.dense)):
        run(images).square().sum().backward()
        gradients.append(
            {name: grad for name, one in network.named_parameters() if (grad := one.grad) is not None}
        )
    assert gradients[0].keys() == gradients[1].keys() == dict(plain.named_parameters()).keys()
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < 1e-9, name


def test_a_folded_bias_has_a_gradient():
    """Whoever thaws the form's weights gets the right one, on the lattice and on extra sites."""
    fast, images = fresh().double().for_inference(), torch.randn(1, 3, 96, 128, dtype=torch.float64)
    node = next(node for node in fast.graph.nodes if node.layer == "backbone.layer4.0.conv1")
    bias, step, values = fast.tensors[node.tensors["bias"]], 1e-6, []
    bias.requires_grad_(True)
    fast(images, MASK).square().sum().backward()
    assert bias.grad is not None
    with torch.no_grad():
        for sign in (1, -1):
            bias[0] += sign * step
            values.append(fast(images, MASK).square().sum().item())
            bias[0] -= sign * step
    assert bias.grad[0].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_what_trains_is_not_folded_and_what_is_folded_does_not_train():
    with pytest.raises(ValueError, match=r"call model\.eval\(\) before for_inference"):
        build_model({"width": 0.125}).train().for_inference()
    fast = fresh().for_inference()
    assert fast.for_inference() is fast
    assert not fast.eval().training
    with pytest.raises(ValueError, match="cannot train: train the one it was made of"):
        fast.train()


def test_copies_moves_autocast_and_no_gradients():
    fast, images = fresh().for_inference(), torch.randn(1, 3, 64, 96)
    before, expected = images.clone(), fast(images)
    assert not expected.requires_grad
    assert torch.equal(images, before)
    assert torch.equal(copy.deepcopy(fast)(images), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(images), expected)
    assert relative_error(fast.double()(images.double()), expected.double()) < 1e-5


def all_ways(model: SelectiveNetwork, images: Tensor) -> list[Tensor]:
    refined = model.start(images).start_coarse().take(MASK)
    return [model.dense(images, 8), model(images, MASK), refined.logits(), *model.refine(images, [0, 0.2])]


@pytest.mark.parametrize(("backbone", "head"), [("resnet18", "lite"), ("resnet50", "deeplabv3")])
@pytest.mark.parametrize("fault", ["pixel", "infinite pixel", "overflow in layer1", "overflow in layer4"])
@torch.no_grad()
def test_it_hides_nothing_that_is_not_finite(fault: str, backbone: str, head: str) -> None:
    model, images = fresh(backbone, head), torch.randn(1, 3, 96, 128)
    if "pixel" in fault:
        images[0, 0, 40, 40] = torch.nan if fault == "pixel" else torch.inf
    else:  # infinity minus infinity behind it: NaN that arises inside, from finite weights and images
        model.get_parameter(f"module.backbone.{fault[-6:]}.0.bn1.weight").mul_(1e38)
    plain, fast = all_ways(model, images), all_ways(model.for_inference(), images)
    for expected, found in zip(plain, fast, strict=True):
        assert not expected.isfinite().all()
        assert torch.equal(found.isfinite(), expected.isfinite())
