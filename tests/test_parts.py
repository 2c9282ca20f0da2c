"""One contract per kind of part, run over all that is registered: also toys that only this file knows, and
the backbone that CONTRIBUTING.md shows in full."""

from __future__ import annotations

import copy
import inspect
import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_seg import build_model, load_model
from sparse_seg.cli import main
from sparse_seg.errors import ConfigError
from sparse_seg.masks import MaskPolicy, PolicyInput
from sparse_seg.registry import BACKBONES, HEADS, POLICIES, Registry
from sparse_seg.run.exits import last_exit
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from sparse_seg.sites import Mixed
from tests.reference import (
    SHALLOW,
    VARIANTS,
    plain_network,
    randomise,
    relative_error,
    stage_values,
    variant_model,
)


class Inverted(nn.Module):
    """MobileNetV2's block: 1x1, depthwise 3x3, 1x1, and a shortcut where it keeps its shape."""

    def __init__(self, channels: int, out: int, stride: int, dilation: int, grow: int) -> None:
        super().__init__()
        inner = grow * channels
        self.layers = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
            nn.Conv2d(inner, inner, 3, stride, dilation, dilation, groups=inner, bias=False),
            nn.BatchNorm2d(inner), nn.ReLU6(), nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.adds = stride == 1 and channels == out

    def forward(self, grid: Tensor) -> Tensor:
        return grid + self.layers(grid) if self.adds else self.layers(grid)


class MobileToy(nn.Module):
    """A backbone: from the stage on that would pass `output_stride`, it dilates in place of striding."""

    stages: ClassVar[dict[str, int]] = {"stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}

    def __init__(self, output_stride: int = 32, grow: int = 2) -> None:
        super().__init__()
        self.channels = [8, 12, 16, 24]
        self.stem = nn.Conv2d(3, 8, 3, 4, 1)
        channels, before = 8, 4
        for (name, natural), out in zip(self.stages.items(), self.channels, strict=True):
            stride = min(natural, output_stride)
            entry = Inverted(channels, out, stride // before, max(1, natural // 2 // before), grow)
            self.add_module(name, nn.Sequential(entry, Inverted(out, out, 1, natural // stride, grow)))
            channels, before = out, stride

    def forward(self, images: Tensor) -> list[Tensor]:
        grid, features = self.stem(images), []
        for name in self.stages:
            grid = self.get_submodule(name)(grid)
            features.append(grid)
        return features


class TwoStepHead(nn.Module):
    """Two 1x1 and a classifier."""

    def __init__(self, channels: Sequence[int], num_classes: int, inner: int = 12) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels[-1], inner, 1), nn.BatchNorm2d(inner), nn.ReLU(), nn.Conv2d(inner, inner, 1)
        )
        self.classifier = nn.Conv2d(inner, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.classifier(self.layers(features[-1]))


class Surprise(MaskPolicy):
    """Uncertain logits where features are strong: reads both."""

    ranks_refinement = True

    def __init__(self, fine_fraction: float | None = None, power: float = 1.0, **more: Any) -> None:
        super().__init__(fine_fraction, **more)
        self.power = power

    def scores(self, run: PolicyInput) -> Tensor:
        features = run.features().abs().mean(1, keepdim=True)
        logits = run.coarse_logits(every=self.block)
        strength = F.adaptive_avg_pool2d(features, (logits.shape[2], logits.shape[3])).squeeze(1)
        return (1 - logits.softmax(1).amax(1)) * strength.pow(self.power)


BACKBONES.register("toy", MobileToy)
HEADS.register("toy", TwoStepHead)
POLICIES.register("toy", Surprise)
PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
(SHOWN,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
exec(textwrap.dedent(SHOWN), {"nn": nn, "Tensor": Tensor, "BACKBONES": BACKBONES, "__name__": "shown"})
OPTIONS = {"backbone": {"backbone_options": {"grow": 3}}, "head": {"head_options": {"inner": 10}}}


def network(part: str = "", name: str = "", **settings: Any) -> SelectiveNetwork:
    """A small network with one part of a name, the toy's with an option of its own."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"width": 0.125, "depths": list(SHALLOW)}
    if part == "backbone":
        small = {"width": 0.125} if "width" in inspect.signature(BACKBONES[name]).parameters else {}
    config = {"num_classes": 5, "head_channels": 8} | small | settings
    if part:
        config |= {part: name} | (OPTIONS[part] if name == "toy" else {})
    model = build_model(config)
    randomise(model)
    return model.double().eval()


def images_of(size: tuple[int, int] = (65, 97)) -> Tensor:
    return torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def mask_of(images: Tensor, share: float) -> Tensor:
    shape = images.shape[0], -(-images.shape[2] // 16), -(-images.shape[3] // 16)
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) < share


PARTS = [("backbone", name) for name in BACKBONES] + [("head", name) for name in HEADS]
PARTS += [("variant", name) for name in VARIANTS]
FAST = [("head", "deeplabv3"), ("backbone", "shown")]


@pytest.mark.parametrize(
    ("part", "name"), [one if one in FAST else pytest.param(*one, marks=pytest.mark.slow) for one in PARTS]
)
@torch.no_grad()
def test_a_backbone_or_head(part: str, name: str) -> None:
    """P1, P2 and P4; dense at every stride as the plain network, with its own count of multiply-adds; and the
    form for inference, in both precisions."""
    model = variant_model(name) if part == "variant" else network(part, name)
    before, images, small = copy.deepcopy(model.state_dict()), images_of(), images_of((33, 49))
    mask, fast = mask_of(images, 0.3), model.for_inference()
    logits, fine = model(images, mask), torch.ones_like(mask)
    assert relative_error(model(images, fine), model.dense(images, 8)) < 1e-12, "P2"
    for one, expected in ((mask, logits), (fine, model(images, fine))):
        assert relative_error(fast(images, one), expected) < 1e-12
    single = copy.deepcopy(model).float().for_inference()
    assert relative_error(single(images.float(), mask).double(), logits) < 1e-5
    assert not any(node.op == "batch_norm" for node in fast.graph.nodes), "all are folded"
    coarsest = max(model.module.get_submodule("backbone").stages.values())
    for stride in (one for one in (4, 8, 16, 32) if one <= coarsest):
        with FlopCounterMode(display=False) as counter:
            expected = plain_network(model, stride)(small)
        run = model.start(small).follow(Way.dense(stride))
        for found in (run.logits(), fast.dense(small, stride)):
            assert relative_error(found, expected) < 1e-12
        flops = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
        assert 2 * sum(run.macs().values()) == flops
    if model.geometry.refines:
        runs = model.start(images).take(mask), model.start(images).follow(Way.dense(16))
        values = [stage_values(run)[-1] for run in runs]
        lattices = [one.lattice.tensor if isinstance(one, Mixed) else one.tensor for one in values]
        assert relative_error(*lattices) < 1e-12, "P1"
        run = model.start(images).start_coarse()
        run.grid_logits()
        assert relative_error(run.take(mask).logits(), logits) < 1e-12, "P4"
    run = model.start(images).take(mask)
    macs, fewer = run.macs(), fast.start(images).take(mask).macs()
    if model.settings.head.startswith("deeplab") and model.settings.aspp_projection:
        width = model.module.head.aspp.out_channels
        # the projection of the pooled vector: once an image, not at each site
        fewer["rows"] += (int(last_exit(run)[1].sum()) - len(images)) * width**2
    assert fewer == macs
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", list(POLICIES))
@torch.no_grad()
def test_a_policy(name: str) -> None:
    """The budget is exact, in eval the mask is the same again, the fast form's too; and it can be counted."""
    fraction = 1.0 if name == "uniform" else 0.25
    model, images = network(mask={"policy": name, "fine_fraction": fraction}), images_of()
    labels = (images[:, 0] > 0).long()
    run = model.start(images, labels).follow()
    assert run.mask is not None
    assert run.mask.shape == (2, 5, 7)
    assert run.mask.flatten(1).sum(1).tolist() == [round(fraction * 35)] * 2
    assert relative_error(run.logits(), model(images, run.mask)) < 1e-12
    for one in (model, model.for_inference()):
        again = one.start(images, labels).follow()
        assert again.mask is not None
        assert torch.equal(again.mask, run.mask)
    assert sum(run.macs().values()) > 0
    way = Way.policy(name, fraction)
    assert way.name == f"selective, {name}, f={fraction:g}"
    assert type(model.policy_for(way)) is type(model.policy)


@pytest.mark.parametrize(
    ("name", "merge"), [*((name, "whole") for name in POLICIES), ("edge", "patch"), ("confidence", "patch")]
)
def test_gradients_in_eval_mode(name: str, merge: str) -> None:
    """Those under the mask that the policy chooses, of images and weights; without autograd it refines."""
    fraction = 1.0 if name == "uniform" else 0.25
    model = network(mask={"policy": name, "fine_fraction": fraction}, merge=merge)
    images = images_of((64, 64))
    inputs = [images.requires_grad_(), *model.module.get_submodule("backbone").parameters()]
    labels = (images[:, 0] > 0).long()
    run = model.start(images, labels).follow()
    assert run.mask is not None
    own = torch.autograd.grad(run.logits().square().sum(), inputs)
    given = torch.autograd.grad(model(images, run.mask).square().sum(), inputs)
    assert all(relative_error(a, b) < 1e-9 for a, b in zip(own, given, strict=True))
    if model.policy.ranks_refinement:
        for fast in (model.requires_grad_(False), model.for_inference()):
            assert fast.start(images.detach()).follow().memory is not None


def test_a_registry() -> None:
    registry = Registry("thing", {"path": "pathlib:Path", "missing": "no.such:Part"})

    @registry.register("mine")
    class Mine:
        pass

    assert registry.register("other", 3) == 3
    assert list(registry) == ["path", "missing", "mine", "other"], "listing imports nothing"
    assert registry.declared == ("path", "missing")
    assert (registry["path"], registry["mine"]) == (Path, Mine)
    with pytest.raises(ModuleNotFoundError):
        registry["missing"]
    with pytest.raises(ValueError, match="there is a thing 'mine' already; choose another name"):
        registry.register("mine", 4)


def test_options_of_parts_from_outside() -> None:
    shapes = {name: list(value.shape) for name, value in network("head", "toy").state_dict().items()}
    assert shapes["module.head.classifier.weight"] == [5, 10, 1, 1]
    shapes = {name: list(value.shape) for name, value in network("backbone", "toy").state_dict().items()}
    assert shapes["module.backbone.stage1.0.layers.0.weight"] == [24, 8, 1, 1]
    assert network(mask={"policy": "toy", "options": {"power": 2.0}}).policy.power == 2.0
    for config, message in (
        ({"head": "toy", "head_options": {"iner": 3}}, r"model.head_options.iner.*did you mean 'inner'"),
        ({"backbone": "toy", "backbone_options": {"x": 3}}, r"backbone_options.x: the backbone 'toy' has no"),
        ({"mask": {"policy": "toy", "options": {"x": 3}}}, r"model.mask.options.x: the mask policy 'toy'"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_model(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"backbone_options": {"stem": "deep"}}, "model.backbone_options.stem: model.stem sets it; set that"),
        ({"mask": {"options": {"fine_fraction": 0.3}}}, "mask.options.fine_fraction: model.mask.fine_f"),
        ({"mask": {"options": {"middle_threshold": 0.3}}}, "options.middle_threshold: model.mask.middle_thr"),
        ({"mask": {"options": {"rule": "cad"}}}, "model.mask.options.rule: model.mask.edge sets it"),
        ({"mask": {"options": {"block": 32}}}, "model.mask.options.block: model.strides sets it"),
        ({"head_options": {"dropout": "x"}}, "model.head_options is {'dropout': 'x'}, which does not fit: "),
        ({"head_options": {"dropout": 2}}, "head_options is {'dropout': 2}, which does not fit: dropout"),
        ({"backbone": "toy", "backbone_options": {"grow": "x"}}, "model.backbone_options is {'grow': 'x'}"),
    ],
)
def test_options_that_cannot_be_are_named(config: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model({"num_classes": 5} | ({} if "backbone" in config else {"width": 0.125}) | config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_toys_train_evaluate_refine_and_benchmark_by_command(tmp_path: Path, capsys: Any) -> None:
    """Without a change anywhere else, from a config alone."""
    scenes = str(tmp_path / "scenes")
    assert main(["make_scenes", scenes, "--size", "64x96", "--count", "6"]) == 0
    config = tmp_path / "toy.yaml"
    mask = {"policy": "toy", "fine_fraction": 0.25, "options": {"power": 0.5}}
    model = {"backbone": "toy", "head": "toy", "backbone_options": {"grow": 3}, "mask": mask}
    train = {"iterations": 2, "batch_size": 2, "eval_every": 2, "network": "selective"}
    data = {"dataset": "scenes", "root": scenes, "crop": [64, 64]}
    config.write_text(json.dumps({"model": model, "data": data, "train": train}))
    work = str(tmp_path / "run")
    assert main(["train", str(config), "--work-dir", work]) == 0
    checkpoint = f"{work}/best.pt"
    fractions = ["--policies", "toy", "edge", "--json", f"{work}/c.json"]
    assert main(["evaluate", str(config), checkpoint, "--compare", "0.2", *fractions]) == 0
    rows = json.loads(Path(f"{work}/c.json").read_text())["rows"]
    assert [row["policy"] for row in rows] == [None, None, "toy", "edge"]
    assert rows[2]["gmacs"] == rows[3]["gmacs"], "no layer is late: the coarse pass is part of the mixed one"
    trained = load_model(checkpoint)
    assert len(list(trained.refine(torch.zeros(1, 3, 64, 96), fractions=[0, 0.2, 0.5]))) == 3
    small = ["--size", "64x96", "--fine-fraction", "0.2", "--repeats", "1", "--no-memory"]
    engines = ["--engines", "gather", "--policies", "toy", "--scopes", "network"]
    assert main(["benchmark", str(config), *small, *engines]) == 0
    assert "toy f=0.2" in capsys.readouterr().out
