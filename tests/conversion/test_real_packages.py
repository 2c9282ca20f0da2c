"""The same comparisons against the sources' own packages, where they can be imported.

In float64: these networks are deep, and random ones let float32's rounding grow to 1e-5.
"""

import importlib
import warnings
from typing import Any

import pytest
import torch

from sparse_seg import load_model
from sparse_seg.checkpoint import load_backbone
from sparse_seg.conversion import convert, to_dense
from sparse_seg.sparse import rows_to_grid
from tests.conversion.cases import randomise
from tests.reference import block_mask, relative_error

TOLERANCE = 1e-9


def package(name):
    """The module, or skip: it is missing or does not fit this PyTorch."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name} cannot be imported: {error}")


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
            layouts = model.dense_layouts(images, stride)
            rows = model.backbone(images, layouts)
            for ours, layout, theirs in zip(rows, layouts, stages(images), strict=True):
                assert relative_error(rows_to_grid(ours, 1, layout.size), theirs) < TOLERANCE


@pytest.mark.parametrize("head", ["deeplabv3", "fcn"])
@pytest.mark.parametrize("depth", [50, 101])
def test_torchvision(head, depth, tmp_path):
    segmentation = package("torchvision.models.segmentation")
    build = getattr(segmentation, f"{head}_resnet{depth}")
    network = build(weights=None, weights_backbone=None, aux_loss=True)
    aux = network.aux_classifier
    network.aux_classifier = None  # randomise runs the network in training mode
    forward, network.forward = network.forward, lambda images: forward(images)["out"]
    randomise(network)
    network.aux_classifier = aux.eval()
    check_logits(converted(network, tmp_path), network, [(64, 96), (75, 98)], 8)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_torchvision_classifiers(name, tmp_path):
    feature_extraction = package("torchvision.models.feature_extraction")
    network = randomise(getattr(package("torchvision.models"), name)(weights=None))
    layers = [f"layer{number}" for number in (1, 2, 3, 4)]
    extract = feature_extraction.create_feature_extractor(network, layers)
    path = converted(network, tmp_path, allow_missing=["head"])
    extract.double()
    check_features(path, lambda images: extract(images).values(), [(64, 96), (75, 98)], 32)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
@pytest.mark.parametrize("variant", ["", "d"])
def test_timm(name, variant, tmp_path):
    timm = package("timm")
    network = randomise(timm.create_model(name + variant, pretrained=False))
    path = converted(network, tmp_path, allow_missing=["head"], source="timm")
    strides = [8, 16, 32] if not variant else [32]
    for stride in strides:
        dilated = timm.create_model(
            name + variant, features_only=True, output_stride=stride, out_indices=(1, 2, 3, 4)
        )
        dilated.load_state_dict(network.state_dict(), strict=False)
        check_features(path, dilated.eval().double(), [(64, 96), (75, 98)], stride)


def test_timms_dilated_average_pooling_is_another_function(tmp_path):
    """Its window stays one cell and counts zeros at the border: at output stride 8 it differs from ours."""
    timm = package("timm")
    network: Any = randomise(timm.create_model("resnet50d", pretrained=False))
    model = load_backbone(converted(network, tmp_path, allow_missing=["head"])).double()
    dilated = timm.create_model("resnet50d", features_only=True, output_stride=8, out_indices=(4,))
    dilated.load_state_dict(network.state_dict(), strict=False)
    images = images_of((64, 96))
    with torch.no_grad():
        theirs, wide = dilated.double().eval()(images)[0], network.double().forward_features(images)
        layouts = model.dense_layouts(images, 8)
        ours = rows_to_grid(model.backbone(images, layouts)[3], 1, layouts[3].size)
    assert relative_error(ours[:, :, ::4, ::4], wide) < TOLERANCE
    assert relative_error(theirs[:, :, ::4, ::4], wide) > 1e-2


@pytest.mark.parametrize("encoder", ["resnet18", "resnet50"])
@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("name", ["DeepLabV3", "DeepLabV3Plus"])
def test_smp(name, separable, stride, encoder, tmp_path):
    smp = package("segmentation_models_pytorch")
    network = getattr(smp, name)(
        encoder, encoder_weights=None, encoder_output_stride=stride, classes=7,
        decoder_channels=32, decoder_aspp_separable=separable,
    )  # fmt: skip
    randomise(network)
    path = converted(network, tmp_path, output_stride=stride)
    check_logits(path, network, [(64, 96), (80, 112)], stride)
