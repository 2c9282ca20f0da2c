"""The same comparisons against the sources' own packages, where they can be imported.

In float64: these networks are deep, and random ones let float32's rounding grow to 1e-5.
"""

from typing import Any

import pytest
import torch

from sparse_seg import load_model
from sparse_seg.checkpoint import load_backbone
from sparse_seg.conversion import convert, to_dense
from sparse_seg.errors import CheckpointError
from tests.conversion.cases import features, randomise
from tests.conversion.packages import mmseg, mmseg_logits, smp, timm, torchvision, torchvision_classifier
from tests.peers import package
from tests.reference import block_mask, relative_error

TOLERANCE = 1e-9


def some_slow(quick, *others):
    """Of deep networks that take seconds each, the others are left to the full run."""
    return [quick, *(pytest.param(other, marks=pytest.mark.slow) for other in others)]


def images_of(size):
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1)).double()


def converted(network, tmp_path, **options):
    torch.save(network.state_dict(), tmp_path / "source.pth")
    conversion = convert(tmp_path / "source.pth", **options)
    conversion.write(tmp_path / "converted.safetensors")
    dense = to_dense(tmp_path / "converted.safetensors")
    assert dense.keys() == network.state_dict().keys()
    assert all(torch.equal(dense[name], tensor) for name, tensor in network.state_dict().items())
    return tmp_path / "converted.safetensors"


def check_logits(path, network, sizes, stride):
    model = load_model(path).double()
    network.double()
    for size in sizes:
        images = images_of(size)
        with torch.no_grad():
            expected = network(images)
            expected = expected["out"] if isinstance(expected, dict) else expected
            assert relative_error(model.dense(images, stride), expected) < TOLERANCE
            if stride == 8:
                blocks = block_mask("full", (1, -(-size[0] // 16), -(-size[1] // 16)))
                assert relative_error(model(images, fine_blocks=blocks), expected) < TOLERANCE


def check_features(path, stages, sizes, stride):
    model = load_backbone(path).double()
    for size in sizes:
        images = images_of(size)
        with torch.no_grad():
            for ours, theirs in zip(features(model, images, stride), stages(images), strict=True):
                assert relative_error(ours, theirs) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("head", ["deeplabv3", "fcn"])
@pytest.mark.parametrize("depth", [50, 101])
def test_torchvision(head, depth, tmp_path):
    network: Any = torchvision(f"{head}_resnet{depth}")
    aux = network.aux_classifier
    network.aux_classifier = None  # randomise runs the network in training mode
    forward, network.forward = network.forward, lambda images: forward(images)["out"]
    randomise(network)
    network.aux_classifier = aux.eval()
    check_logits(converted(network, tmp_path), network, [(64, 96), (75, 98)], 8)


@pytest.mark.parametrize("name", some_slow("resnet18", "resnet34", "resnet50", "resnet101"))
def test_torchvision_classifiers(name, tmp_path):
    feature_extraction = package("torchvision.models.feature_extraction")
    network = randomise(torchvision_classifier(name))
    layers = [f"layer{number}" for number in (1, 2, 3, 4)]
    extract = feature_extraction.create_feature_extractor(network, layers)
    path = converted(network, tmp_path, allow_missing=["head"])
    extract.double()
    check_features(path, lambda images: extract(images).values(), [(64, 96), (75, 98)], 32)


@pytest.mark.parametrize("name", some_slow("resnet18", "resnet34", "resnet50", "resnet101"))
@pytest.mark.parametrize("variant", ["", "d"])
def test_timm(name, variant, tmp_path):
    network = randomise(timm(name + variant))
    path = converted(network, tmp_path, allow_missing=["head"], source="timm")
    strides = [8, 16, 32] if not variant else [32]
    for stride in strides:
        dilated = package("timm").create_model(
            name + variant, features_only=True, output_stride=stride, out_indices=(1, 2, 3, 4)
        )
        dilated.load_state_dict(network.state_dict(), strict=False)
        check_features(path, dilated.eval().double(), [(64, 96), (75, 98)], stride)


def test_timms_dilated_average_pooling_is_another_function(tmp_path):
    """Its window stays one cell and counts zeros at the border: at output stride 8 it differs from ours."""
    network: Any = randomise(timm("resnet50d"))
    model = load_backbone(converted(network, tmp_path, allow_missing=["head"])).double()
    dilated = package("timm").create_model("resnet50d", features_only=True, output_stride=8, out_indices=(4,))
    dilated.load_state_dict(network.state_dict(), strict=False)
    images = images_of((64, 96))
    with torch.no_grad():
        theirs, wide = dilated.double().eval()(images)[0], network.double().forward_features(images)
        ours = features(model, images, 8)[3]
    assert relative_error(ours[:, :, ::4, ::4], wide) < TOLERANCE
    assert relative_error(theirs[:, :, ::4, ::4], wide) > 1e-2


@pytest.mark.parametrize("encoder", some_slow("resnet18", "resnet50"))
@pytest.mark.parametrize("stride", some_slow(8, 16))
@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("name", ["DeepLabV3", "DeepLabV3Plus"])
def test_smp(name, separable, stride, encoder, tmp_path):
    network = randomise(smp(name, encoder, separable, stride, 7, decoder_channels=32))
    path = converted(network, tmp_path, output_stride=stride)
    check_logits(path, network, [(64, 96), (80, 112)], stride)


@pytest.mark.parametrize("backbone", some_slow("ResNetV1c", "ResNet"))
@pytest.mark.parametrize("stride", some_slow(8, 16))
@pytest.mark.parametrize("depth", some_slow(18, 50))
@pytest.mark.parametrize("head", ["deeplabv3", "deeplabv3plus"])
def test_mmsegmentation(head, depth, stride, backbone, tmp_path):
    network: Any = randomise(mmseg(head, depth, stride, backbone, channels=32))
    network.auxiliary_head.eval()
    path = converted(network, tmp_path, output_stride=stride)
    network.forward = lambda images: mmseg_logits(network, images)
    check_logits(path, network, [(64, 96), (75, 98)], stride)


def test_mmsegmentations_one_logit_has_its_threshold(tmp_path):
    """Foreground from 0.3 on, as its own postprocessing takes it."""
    network: Any = randomise(mmseg("deeplabv3plus", 18, channels=32, logits=1))
    network.double()
    images = images_of((64, 96))
    with torch.no_grad():  # logits around those of 0.3 and 0.5
        network.decode_head.conv_seg.bias -= mmseg_logits(network, images).median() + 0.4
        model = load_model(converted(network, tmp_path)).double()
        logits = mmseg_logits(network, images)
        (expected,) = network.postprocess_result(logits)
        found = model.dense(images, 8)
    classes = expected.pred_sem_seg.data[0]
    assert 0.1 < classes.mean() < 0.9
    assert ((logits > 0) != classes).any(), "0.5 would be another function"
    assert torch.equal(found.argmax(1)[0], classes.long())


@pytest.mark.parametrize("name", ["resnetblur18", "resnetaa34d"])
def test_timms_anti_aliasing_has_no_tensors(name, tmp_path):
    """So files of such networks are refused by their names, and what is assumed of the others is said."""
    network = timm(name)
    plain = timm(name.replace("blur", "").replace("aa", ""))
    assert network.state_dict().keys() == plain.state_dict().keys()
    torch.save(network.state_dict(), tmp_path / f"{name}-84f4748f.pth")
    with pytest.raises(CheckpointError, match=rf"it is timm's {name} by its name: that it pools before stri"):
        convert(tmp_path / f"{name}-84f4748f.pth", allow_missing=["head"])
