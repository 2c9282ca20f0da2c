"""P1 to P4 of docs/method.md, values, gradients and multiply-adds: networks drawn at random, and ours."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_seg.config import ModelConfig
from sparse_seg.errors import SparseSegError
from sparse_seg.graph import capture
from sparse_seg.run.check import check_graph
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.selective import build_network
from sparse_seg.run.way import Way
from sparse_seg.sites import EXCHANGES, Mixed
from tests.fast import one_fast
from tests.graph.definitions import Definitions
from tests.graph.drawn import FAMILIES, draw_network
from tests.graph.layers import Drawn, as_layers
from tests.graph.reference import Reference
from tests.reference import random_model, relative_error, without_dropout

TOLERANCE = 1e-10
SIZES = ((64, 96), (70, 53), (49, 64))
# a network that fails is small as it is, and each try takes a second
few = settings(max_examples=3, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


def drawn_settings(strides: Sequence[int]) -> ModelConfig:
    return ModelConfig(module="drawn", strides=list(strides))


def networks(module: Drawn) -> Iterator[SelectiveNetwork]:
    """At two choices of strides."""
    graph, constants = capture(module, (64, 64))
    own = max(layer.stride for layer in module.layers)
    pairs, three = ((own // 2, own), (own, 2 * own)), (own // 2, own, 2 * own)
    for strides in (pairs[int(torch.randint(2, ()))], three):
        yield build_network(graph, module, constants, drawn_settings(strides)).eval()


def draw_images(draw: st.DataObject) -> Tensor:
    size, batch = draw.draw(st.sampled_from(SIZES)), draw.draw(st.sampled_from((1, 2)))
    return torch.randn(batch, 3, *size, dtype=torch.float64)


def draw_levels(network: SelectiveNetwork, images: Tensor) -> Tensor:
    block = network.strides[-1]
    shape = len(images), -(-images.shape[2] // block), -(-images.shape[3] // block)
    return torch.randint(0, len(network.strides), shape)


def check_dense(network: SelectiveNetwork, module: Drawn, images: Tensor) -> None:
    """The module's own logits at its own stride; those of the reference at others; and multiply-adds."""
    own = network.geometry.own
    expected = module(images)
    assert relative_error(
        network.dense(images, own)[:, :, : expected.shape[2], : expected.shape[3]], expected
    ) < (TOLERANCE if expected.shape[2:] == images.shape[2:] else torch.inf)
    for stride in {own, *network.strides}:
        reference = Reference(module, network.strides, images, stride=stride)
        run = network.start(images).follow(Way.dense(stride))
        assert relative_error(run.grid_logits(), reference.output) < TOLERANCE
        assert sum(run.macs().values()) == reference.macs
        if stride == own and expected.shape[2:] != images.shape[2:]:
            assert relative_error(run.grid_logits(), expected) < TOLERANCE


def check_mixed(network: SelectiveNetwork, module: Drawn, images: Tensor) -> None:
    """P1, P2, values under any exchange rule (at all sites, where names are the graph's), multiply-adds."""
    levels, strides, geometry = draw_levels(network, images), network.strides, network.geometry
    coarse = network.start(images)._run.dense(strides[-1], geometry.kept_lattices)
    for exchange in EXCHANGES:
        reference, way = Reference(module, strides, images, None, levels, exchange), Way(exchange=exchange)
        run = network.start(images).take(levels, way)
        assert relative_error(run.grid_logits(), reference.output) < TOLERANCE
        assert sum(run.macs().values()) == reference.macs
        assert run._values is not None
        for name, value in run._values.items():
            if not isinstance(value, Mixed):
                continue
            if name in reference.values and reference.cell(name) > reference.finest:
                sites, grid = reference.sites(reference.cell(name)), value.densify("none").tensor
                assert sites.rebuild(sites.read(grid), "none").equal(grid), "a value where there is no site"
                expected = sites.read(reference.values[name])
                assert relative_error(sites.read(grid), expected) < TOLERANCE, name
            if name in coarse and name not in geometry.masked and network.refines(way):
                assert torch.equal(value.lattice.tensor, coarse[name].tensor)
    fine = torch.full_like(levels, len(strides) - 1)
    if not lattice_pools(network, module, images):
        expected = network.start(images).follow(Way.dense(strides[0])).grid_logits()
        for exchange in ("linear", "separate"):
            found = network.start(images).take(fine, Way(exchange=exchange)).grid_logits()
            assert relative_error(found, expected) < TOLERANCE
    if geometry.refines:
        none = network.start(images).take(torch.zeros_like(levels))
        none.grid_logits()
        for name in geometry.exits:
            assert none._values is not None
            value = none._values[name]
            if isinstance(value, Mixed) and name in coarse:
                assert relative_error(value.lattice.tensor, coarse[name].tensor) < TOLERANCE


def lattice_pools(network: SelectiveNetwork, module: Drawn, images: Tensor) -> bool:
    """See `Definitions.lattice_pools`, of the dense network at the finest stride."""
    size, finest = (int(images.shape[2]), int(images.shape[3])), network.strides[0]
    return Definitions(module, network.strides, size, finest).lattice_pools


def check_gradients(
    network: SelectiveNetwork,
    module: nn.Module,
    twin: nn.Module,
    layers: Drawn,
    images: Tensor,
    exchange: str,
) -> None:
    """Of weights and images, and running statistics, as autograd's through the reference of a twin."""
    levels, target = draw_levels(network, images), torch.randn(5, dtype=torch.float64).view(1, 5, 1, 1)
    ours, theirs = (images.clone().requires_grad_() for _ in range(2))
    logits = network.start(ours).take(levels, Way(exchange=exchange)).grid_logits()
    expected = Reference(layers, network.strides, theirs, levels=levels, exchange=exchange).output
    assert relative_error(logits, expected) < TOLERANCE
    (logits * target).tanh().sum().backward()
    (expected * target).tanh().sum().backward()
    pairs = [("images", ours, theirs)]
    pairs += [(name, one, twin.get_parameter(name)) for name, one in module.named_parameters()]
    for name, own, other in pairs:
        if other.grad is not None:
            assert own.grad is not None, name
            assert (own.grad - other.grad).norm() < 1e-8 * (1 + other.grad.norm()), name
    for (name, buffer), twins in zip(module.named_buffers(), twin.buffers(), strict=True):
        if "running" in name:
            assert relative_error(buffer, twins) < TOLERANCE, name


def check_patch(network: SelectiveNetwork, module: Drawn, images: Tensor) -> None:
    """P2 and P4 by merge `patch`, where late values can be computed in blocks alone."""
    patch, strides = Way(merge="patch"), network.strides
    try:
        network.check_way(patch)
    except SparseSegError:
        return
    levels = draw_levels(network, images)
    pools = lattice_pools(network, module, images)
    for level, stride in enumerate(reversed(strides)):
        if not level or not pools:
            found = network.start(images).take(torch.full_like(levels, level), patch).logits()
            assert relative_error(found, network.dense(images, stride)) < TOLERANCE, stride
    once = network.start(images).take(levels, patch).logits()
    with torch.enable_grad():
        assert relative_error(network.start(images).take(levels, patch).logits(), once) < TOLERANCE


def check_refinement(network: SelectiveNetwork, module: Drawn, images: Tensor) -> None:
    """P4: the first step is one pass with its mask; later ones keep what is there, and compute new sites."""
    first = draw_levels(network, images)
    second = torch.maximum(first, draw_levels(network, images))
    with torch.no_grad():
        run = network.start(images).start_coarse()
        assert (
            relative_error(run.take(first).grid_logits(), network.start(images).take(first).grid_logits())
            < 1e-12
        )
        refined = run.take(second).grid_logits()
    before = Reference(module, network.strides, images, levels=first)
    after = Reference(module, network.strides, images, levels=second, before=before)
    assert relative_error(refined, after.output) < TOLERANCE


@pytest.mark.parametrize("family", one_fast("all", *FAMILIES, "resizing"))
@few
@given(st.data())
def test_dense_and_mixed(family: str, data: st.DataObject):
    module = draw_network(data.draw, family)
    images = draw_images(data)
    with torch.no_grad():
        for network in networks(module):
            check_dense(network, module, images)
            check_mixed(network, module, images)
            check_refinement(network, module, images)
            check_patch(network, module, images)


@pytest.mark.parametrize("exchange", ["linear", "separate"])
@pytest.mark.parametrize("family", one_fast("all", "convolution", "groups", "channels", "places"))
@few
@given(st.data())
def test_training_equals_autograd_through_the_reference(family: str, exchange: str, data: st.DataObject):
    """Batch norm over all existing sites, with its running statistics."""
    module = draw_network(data.draw, family, training=True)
    images = draw_images(data)
    for network in networks(module):
        twin = copy.deepcopy(module).train()
        network.train()
        for norm in (*module.modules(), *twin.modules()):
            if isinstance(norm, nn.BatchNorm2d):
                norm.reset_running_stats()
        check_gradients(network, module, twin, twin, images, exchange)
        module.zero_grad()
        network.eval()


OURS = {
    "three strides": ("resnet18", "deeplabv3", (8, 16, 32)),
    "small": ("resnet18", "lite", (8, 16)),
    "bottlenecks": ("resnet50", "deeplabv3", (8, 16)),
    "from 4 px": ("resnet50", "lite", (4, 8, 16)),
}


@pytest.mark.parametrize("name", one_fast(*OURS))
@torch.no_grad()
def test_networks_of_ours(name: str):
    torch.manual_seed(0)
    backbone, head, strides = OURS[name]
    network = random_model(backbone, head, dtype=torch.float64, strides=strides)
    module, images = as_layers(network), torch.randn(2, 3, 48, 70, dtype=torch.float64)
    check_mixed(network, module, images)
    check_refinement(network, module, images)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(
    "case", one_fast(("resnet18", "deeplabv3", True), ("resnet50", "lite", True), ("resnet18", "lite", False))
)
def test_gradients_of_networks_of_ours(case: tuple[str, str, bool], exchange: str):
    torch.manual_seed(0)
    backbone, head, train = case
    network = copy.deepcopy(random_model(backbone, head, dtype=torch.float64))
    network = without_dropout(network) if train else network
    twin, images = copy.deepcopy(network), torch.randn(2, 3, 70, 53, dtype=torch.float64)
    check_gradients(network, network.module, twin.module, as_layers(twin), images, exchange)


@few
@given(st.data())
def test_mixing(data: st.DataObject):
    """A convolution on rows whose taps mix phases: values and P2 hold; P1 and P4 do not."""
    module = draw_network(data.draw, "convolution", mixing=True)
    images = draw_images(data)
    graph, constants = capture(module, (64, 64))
    own = max(layer.stride for layer in module.layers)
    network = build_network(graph, module, constants, drawn_settings((own, 2 * own))).eval()
    assert not network.geometry.refines
    with torch.no_grad():
        check_dense(network, module, images)
        check_mixed(network, module, images)
        with pytest.raises(ValueError, match="depend on the mask"):
            network.start(images).start_coarse()


@pytest.mark.parametrize("family", one_fast("resizing", *FAMILIES))
@settings(few, max_examples=2)
@given(st.data())
def test_folded_networks_keep_values(family: str, data: st.DataObject):
    module = draw_network(data.draw, family)
    images = draw_images(data)
    with torch.no_grad():
        for network in networks(module):
            folded, levels = network.for_inference(), draw_levels(network, images)
            check_graph(folded, module, (64, 96))
            for stride in network.strides:
                assert relative_error(folded.dense(images, stride), network.dense(images, stride)) < 1e-9
            assert relative_error(folded(images, levels), network(images, levels)) < 1e-9
