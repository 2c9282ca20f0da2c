"""Policy `learned` runs the mask net of a converted learned-mask network of CAD."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg import load_model
from sparse_seg.config import load_config
from sparse_seg.conversion import convert
from sparse_seg.errors import CheckpointError, ConfigError
from sparse_seg.run.network import SelectiveNetwork
from tests.conversion.cases import network_of, state_of
from tests.fast import one_fast
from tests.reference import relative_error

NAME = "cad learned mask"
MASK_NET = "backbone.mask_estimator."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cad_mask")
    (root / "data.yaml").write_text(f"data: {{root: {root}}}")
    mask_net = {name: tensor for name, tensor in state_of(NAME).items() if name.startswith(MASK_NET)}
    write(root, "net", state_of(NAME))
    write(root, "edge", state_of("cad edge mask"))
    write(root, "v2", state_of("cad edge mask") | mask_net)  # CAD's ad_v2, whose late stages are 1-D
    less = {name: tensor for name, tensor in state_of(NAME).items() if name != f"{MASK_NET}5.bias"}
    write(root, "less", less)
    return root


def write(root, name: str, state: dict[str, Tensor]) -> None:
    torch.save({"model_state": state}, root / f"{name}.pth")
    convert(root / f"{name}.pth").write(root / f"{name}.safetensors")


def learned(folder, *settings: str, name: str = "net") -> SelectiveNetwork:
    config = load_config(folder / "data.yaml", ["model.mask.policy=learned", *settings])
    return load_model(folder / f"{name}.safetensors", config).double()


def images_of(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def cad_logits(images: Tensor) -> Tensor:
    """CAD's two logits per block, first that of the fine resolution, in plain PyTorch."""
    state = {name: tensor.double() for name, tensor in state_of(NAME).items()}
    x = copy.deepcopy(network_of(NAME)).double().backbone(images)[1]
    for index in (0, 2, 5, 7):
        if index == 5:  # the largest of 2x2, of fewer at an odd border
            x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), value=-torch.inf)
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).amax(4)
        x = F.conv2d(x, state[f"{MASK_NET}{index}.weight"], state[f"{MASK_NET}{index}.bias"], padding=1)
        x = x if index == 7 else x.relu()
    return x


@pytest.mark.parametrize("size", one_fast((67, 93), (64, 96)))
@torch.no_grad()
def test_the_mask_that_the_model_runs_with(size, folder):
    """With threshold 0 the likelier resolution of each block, with a fraction those of the highest scores."""
    images, logits = images_of(size), cad_logits(images_of(size))
    scores = logits[:, 0] - logits[:, 1]
    for name in ("net", "v2"):
        model = learned(folder, name=name)
        assert relative_error(model.policy.scores(model.start(images)), scores) < 1e-6  # cut in float32
    kth = scores.flatten(1).sort(descending=True).values[:, round(0.25 * scores[0].numel()) - 1]
    for setting, mask in (
        ("model.mask.threshold=0", logits.argmax(1) == 0),
        ("model.mask.fine_fraction=0.25", scores >= kth.view(2, 1, 1)),
    ):
        assert 0 < mask.sum() < mask.numel()
        model = learned(folder, setting)
        found, fast = model.start(images).follow(), model.for_inference()
        for run in (found, model.start(images).follow(), fast.start(images).follow()):  # deterministic
            assert equal(run.mask, mask)
        assert relative_error(found.logits(), model(images, mask)) < 1e-12
        assert relative_error(fast(images), found.logits()) < 1e-9


def equal(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and torch.equal(found, expected)


def test_files_that_have_no_such_net(folder):
    with pytest.raises(CheckpointError, match=r"edge\.safetensors holds no net of a mask: train one with"):
        learned(folder, name="edge")
    with pytest.raises(CheckpointError, match=r"less\.safetensors does not fit .*net\.5\.bias is missing"):
        learned(folder, name="less")
    with pytest.raises(ConfigError, match=r"blocks two cells wide, not 4: use strides \[8, 16\]"):
        learned(folder, "model.strides=[8,16,32]")
