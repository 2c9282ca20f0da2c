"""The fast path has the same interface and the same numbers."""

import copy

import pytest
import torch

from sparse_seg import build_model
from sparse_seg.sparse.fused import FusedLayer
from sparse_seg.sparse.tuning import Tuner
from tests.reference import VARIANTS, randomise, relative_error, variant_model


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "head"), [("resnet18", "lite"), ("resnet50", "deeplabv3")])
@pytest.mark.parametrize("size", [(64, 96), (75, 98)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", [0, -1], ids=["first form", "last form"])
def test_same_logits_dense_and_selective(backbone, head, size, dtype, form, monkeypatch):
    """Whichever form of a kernel is chosen."""
    tried = set()

    def choose(tuner, layer, shape, forms):
        tuner.fastest[layer][shape] = list(forms)[form]
        tried.update(forms)

    monkeypatch.setattr(Tuner, "try_forms", choose)
    torch.manual_seed(0)
    model = build_model({"backbone": backbone, "width": 0.25, "head": head, "num_classes": 5})
    randomise(model)
    model = model.to(dtype).eval()
    fast = model.for_inference()
    images = torch.randn(2, 3, *size, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = (-(-size[0] // 16), -(-size[1] // 16))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    with torch.no_grad():
        pairs = [(model.dense(images, stride), fast.dense(images, stride)) for stride in (8, 16, 32)]
        for fraction in (0, 0.3, 1):
            mask = torch.rand(2, *blocks) < fraction
            pairs.append((model(images, mask), fast(images, mask)))
        pairs.append((model(images), fast(images)))
    for expected, found in pairs:
        assert (found - expected).abs().max() / expected.abs().max() < tolerance
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    if dtype == torch.float32:
        linear = {"linear", "convolution"} if backbone == "resnet50" else set()
        assert tried == {"direct", "winograd"} | linear


def test_the_fastest_form_is_remembered(monkeypatch):
    """By the shortest of its runs, the first apart, on a clock that each run sets forward."""
    clock, runs = [0.0], []
    monkeypatch.setattr("sparse_seg.sparse.tuning.time.perf_counter", lambda: clock[0])

    def form(name, seconds):
        def run():
            runs.append(name)
            clock[0] += seconds.pop(0)

        return run

    tuner = Tuner()
    assert tuner.wants_trial("layer", 0)
    forms = {"noisy": form("noisy", [1, 9, 2, 9]), "slow start": form("slow start", [9, 1, 1, 1])}
    tuner.try_forms("layer", 0, forms | {"slow": form("slow", [3, 3, 3, 3])})
    assert not tuner.wants_trial("layer", 0)
    assert tuner.choice("layer", 0, "slow") == "slow start"
    assert copy.deepcopy(tuner).fastest == tuner.fastest
    assert len(runs) == 12


def test_trials_end():
    """Masks by a threshold make ever new numbers of rows."""
    tuner, tried = Tuner(), 0
    for shape in range(100):
        if tuner.wants_trial("layer", shape):
            tuner.try_forms("layer", shape, {"a": lambda: None})
            tried += 1
    assert 0 < tried < 50
    assert tuner.choice("layer", 99, "default") == "default"


def test_layers_share_what_was_found():
    fast = build_model({"width": 0.125}).eval().for_inference()
    fast(torch.randn(1, 3, 64, 64))
    tuners = {id(layer.tuner) for layer in fast.modules() if isinstance(layer, FusedLayer)}
    assert len(tuners) == 1


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_variants(variant):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = variant_model(variant, dtype)
        fast = model.for_inference()
        images = torch.randn(2, 3, 75, 98, dtype=dtype)
        mask = torch.rand(2, 5, 7) < 0.3
        for stride in (8, 16):
            assert relative_error(fast.dense(images, stride), model.dense(images, stride)) < tolerance
        for blocks in (mask, torch.ones_like(mask)):
            assert relative_error(fast(images, blocks), model(images, blocks)) < tolerance
        norms = [m for m in fast.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        assert not norms, "all are folded"


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"call model\.eval\(\) before for_inference"):
        build_model({"width": 0.125}).train().for_inference()


def test_copies_moves_and_autocast():
    torch.manual_seed(0)
    model = build_model({"width": 0.125, "num_classes": 5})
    randomise(model)
    fast = model.eval().for_inference()
    images = torch.randn(1, 3, 64, 96)
    expected = fast(images)
    assert torch.equal(copy.deepcopy(fast)(images), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(images), expected)
    double = fast.double()(images.double())
    assert double.dtype == torch.float64
    assert (double - expected).abs().max() / expected.abs().max() < 1e-5


def test_nothing_wants_gradients_and_images_stay_as_they_are():
    fast = build_model({"width": 0.125}).eval().for_inference()
    images = torch.randn(1, 3, 64, 64)
    before = images.clone()
    assert not fast(images).requires_grad
    assert torch.equal(images, before)
