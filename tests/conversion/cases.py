"""Networks of every source: how to build them, small or in full size, and what the conversion is told."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_seg import load_model
from sparse_seg.checkpoint import load_backbone
from sparse_seg.conversion import convert, to_dense
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.values import Interpreter
from tests.conversion.networks import Head, Mmseg, ResNet, Smp, Torchvision, VainF

SMALL = {"width": 8, "depths": (2, 1, 2, 2)}
TV, VAINF, SMP, MMSEG, CAD = "torchvision", "vainf", "smp", "mmseg", "cad"
V3, PLUS = "deeplabv3", "deeplabv3plus"
NETWORKS: dict[str, Any] = {TV: Torchvision, VAINF: VainF, SMP: Smp, MMSEG: Mmseg, CAD: VainF}


@dataclass(frozen=True)
class Case:
    """One network of a source.

    Args:
        head: empty of a classifier.
        depth, stem, pooled: of its ResNet.
        more: fields of its `Head`; `channels` and `skip` in full size.
        stride: the source's own output stride.
        options: of `convert`.
        rename: the network's state dict to that of the source's file.
        peer: name of the list of the real file's tensors.
        p1: whether P1 holds.
    """

    source: str
    head: str
    depth: int
    stem: str = "conv7"
    pooled: bool = False
    more: dict[str, Any] = field(default_factory=dict)
    stride: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    peer: str | None = None
    p1: bool = True

    def build(self, stride: int, small: bool = True) -> nn.Module:
        """Its network for an output stride, small or in full size."""
        style = self.source if self.source in (SMP, MMSEG) else TV
        sizes: dict[str, Any] = SMALL if small else {}
        classes = None if self.head else 1000
        backbone = ResNet(self.depth, stride, style, self.stem, self.pooled, classes=classes, **sizes)
        if not self.head:
            return backbone
        more = self.more | ({"channels": 6, "skip": 5} if small else {})
        return NETWORKS[self.source](backbone, Head(self.head, stride, **more))


PARTS = {"0": "conv1", "1": "norm1"}


def edge_mask_names(state: Mapping[str, Tensor], first: int = 3) -> dict[str, Tensor]:
    """CAD's edge-mask file: stages from layer`first` on have 1-D convolutions."""
    renamed = {}
    for name, tensor in state.items():
        if re.search(rf"layer[{first}-4]\.", name):
            name = re.sub(r"downsample\.[01]", lambda m: "downsample." + PARTS[m[0][-1]], name)
            if tensor.ndim == 4:
                tensor = tensor.flatten(2)
                if "conv2" in name:
                    name, tensor = name.replace("conv2", "conv2.conv"), tensor[..., None]
        renamed[name] = tensor
    return renamed


def learned_mask_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CAD's learned-mask file: two twins of the last stages, of one set of weights, and the mask net."""
    generator = torch.Generator().manual_seed(0)
    renamed = {}
    for name, tensor in state.items():
        late = re.search(r"layer[34](?=\.)", name)
        for kind in ("high", "low") if late else ("",):
            twin = name.replace(late[0], f"{late[0]}_{kind}_res") if late else name
            renamed[twin] = tensor * 1.5 if kind == "high" and "running" in name else tensor
    inside = state["backbone.layer2.0.bn3.weight"].shape[0]
    for number, (outside, taps) in {0: (128, inside), 2: (64, 128), 5: (64, 64), 7: (2, 64)}.items():
        renamed[f"backbone.mask_estimator.{number}.weight"] = torch.randn(
            outside, taps, 3, 3, generator=generator
        )
        renamed[f"backbone.mask_estimator.{number}.bias"] = torch.randn(outside, generator=generator)
    channels = state["backbone.layer4.0.bn3.weight"].shape[0]
    renamed["backbone.fc.weight"] = torch.randn(1000, channels, generator=generator)
    renamed["backbone.fc.bias"] = torch.randn(1000, generator=generator)
    return renamed


def old_smp_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """smp before version 0.4."""
    old = {"aspp": "0", "conv": "1", "bn": "2"}
    return {
        re.sub(r"decoder\.(aspp|conv|bn)\.", lambda m: f"decoder.{old[m[1]]}.", name): tensor
        for name, tensor in state.items()
    }


OS16: dict[str, Any] = {"stride": 16, "options": {"output_stride": 16}}
BODY, SEPARABLE = {"kind": "body"}, {"kind": "smp"}
WIDE, NARROW = {"channels": 512}, {"channels": 128, "skip": 12}  # of mmsegmentation
CASES = {
    "torchvision deeplabv3": Case(TV, V3, 50, more={"classes": 21}, peer="torchvision_deeplabv3_resnet50"),
    "torchvision fcn": Case(TV, "fcn", 50, more={"classes": 21}, peer="torchvision_fcn_resnet50"),
    "vainf deeplabv3": Case(VAINF, V3, 50, peer="vainf_deeplabv3_resnet50"),
    "vainf deeplabv3 16": Case(VAINF, V3, 50, **OS16),
    "vainf deeplabv3 separable": Case(VAINF, V3, 50, more=BODY, peer="vainf_deeplabv3_separable_resnet50"),
    "vainf deeplabv3plus": Case(VAINF, PLUS, 50, peer="vainf_deeplabv3plus_resnet50"),
    "vainf deeplabv3plus 16": Case(VAINF, PLUS, 50, **OS16),
    "vainf deeplabv3plus separable": Case(
        VAINF, PLUS, 50, more=BODY, peer="vainf_deeplabv3plus_separable_resnet50"
    ),
    "smp deeplabv3": Case(SMP, V3, 50, peer="smp_deeplabv3_resnet50"),
    "smp deeplabv3 old": Case(SMP, V3, 50, rename=old_smp_names),
    "smp deeplabv3 separable": Case(SMP, V3, 18, more=SEPARABLE, peer="smp_deeplabv3_separable_resnet18"),
    "smp deeplabv3plus": Case(SMP, PLUS, 50, more=SEPARABLE, stride=16, peer="smp_deeplabv3plus_resnet50"),
    "smp deeplabv3plus 8": Case(
        SMP, PLUS, 18, options={"output_stride": 8}, peer="smp_deeplabv3plus_plain_resnet18"
    ),
    "mmseg deeplabv3 r18": Case(MMSEG, V3, 18, MMSEG, more=NARROW, peer="mmseg_deeplabv3_r18-d8", p1=False),
    "mmseg deeplabv3 r50": Case(MMSEG, V3, 50, MMSEG, more=WIDE, peer="mmseg_deeplabv3_r50-d8"),
    "mmseg deeplabv3 16": Case(MMSEG, V3, 50, more=WIDE, peer="mmseg_deeplabv3_resnet50-d16", **OS16),
    "mmseg deeplabv3plus r18": Case(
        MMSEG, PLUS, 18, MMSEG, more=NARROW, peer="mmseg_deeplabv3plus_r18-d8", p1=False
    ),
    "mmseg deeplabv3plus r50": Case(MMSEG, PLUS, 50, MMSEG, more=WIDE, peer="mmseg_deeplabv3plus_r50-d8"),
    "cad fcn": Case(CAD, "fcn", 50, peer="cad_fcn_resnet50"),
    "cad edge mask": Case(CAD, V3, 101, rename=edge_mask_names, peer="cad_deeplabv3_batch_ap_resnet101"),
    "cad edge mask 16": Case(CAD, V3, 50, stride=16, rename=functools.partial(edge_mask_names, first=4)),
    "cad learned mask": Case(CAD, V3, 101, rename=learned_mask_names, peer="cad_deeplabv3_ad_resnet101"),
}
BACKBONES = {
    f"{source} {name}": Case(source, "", depth, stem, pooled, stride=32, peer=f"{source}_{name}")
    for source, name, depth, stem, pooled in (
        (TV, "resnet18", 18, "conv7", False),
        (TV, "resnet50", 50, "conv7", False),
        ("timm", "resnet50d", 50, "timm", True),
        ("timm", "resnet18d", 18, "timm", True),
    )
}


@torch.no_grad()
def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, affine and statistics, near what keeps activations of order one; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            fan = parameter[0].numel()
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2 / fan) ** 0.5)
        else:
            low = 0.5 if name.endswith("weight") else -0.5
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + low)
    for norm in norms:
        norm.momentum = 1.0
    network.train()(torch.randn(4, 3, 64, 96, generator=generator))
    for norm in norms:
        assert norm.running_var is not None
        assert norm.running_mean is not None
        norm.running_var.add_(0.05).mul_(torch.rand(norm.num_features, generator=generator) * 0.9 + 0.7)
        norm.running_mean.add_(torch.randn(norm.num_features, generator=generator) * 0.2)
    return network.eval()


@functools.cache
def network_of(name: str) -> Any:
    """The small network of a case at its own output stride, in eval mode. Shared: do not change it."""
    case = (CASES | BACKBONES)[name]
    return randomise(case.build(case.stride))


def state_of(name: str) -> dict[str, Tensor]:
    """The tensors of its file."""
    return (CASES | BACKBONES)[name].rename(network_of(name).state_dict())


@functools.cache
def at_stride(name: str, stride: int) -> Any:
    """The network of a case with the same weights at another output stride. Shared: do not change it."""
    network = (CASES | BACKBONES)[name].build(stride)
    network.load_state_dict(network_of(name).state_dict())
    return network.eval()


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """The same tensors by the same names, bit for bit."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in expected.items()
    )


def converted(state: Mapping[str, Tensor], folder: Path, told: str, **options: Any) -> SelectiveNetwork:
    """The network of a file whose tensors are those of the source `told`; the way back is exact."""
    path = folder / "net.safetensors"
    torch.save(dict(state), folder / "source.pth")
    conversion = convert(folder / "source.pth", allow_missing=["head"], **options)
    conversion.write(path)
    assert same(to_dense(path), state)
    assert conversion.checkpoint.origin.source == told
    return load_model(path) if conversion.checkpoint.origin.has_head else load_backbone(path)


def stages(model: SelectiveNetwork) -> list[str]:
    """The values that the four stages give."""
    return [node.name for node in model.graph.nodes if "natural" in node.options]


def features(model: SelectiveNetwork, images: Tensor, stride: int) -> list[Tensor]:
    """Of the four stages, dense."""
    values = Interpreter(model.geometry, model.tensors, images).dense(stride, model.geometry.nodes)
    return [values[name].tensor for name in stages(model)]
