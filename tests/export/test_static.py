"""The static form gives the model's blocks, logits and classes; its shapes depend on nothing."""

import pytest
import torch

from sparse_seg.export import ExportOptions, StaticNetwork
from sparse_seg.run.way import Way
from tests.export.kinds import KINDS, POLICIES, cases, compare, kind_model
from tests.reference import relative_error

SIZES = [((64, 96), 1), ((47, 101), 3)]


def _check(kind: str, policy: str, options: ExportOptions, images: int) -> None:
    model = kind_model(kind, policy)
    network = StaticNetwork(model, options)
    names = ["classes", "logits"] if options.dense else ["classes", "fine_blocks", "logits"]
    for inputs, normalised in cases(network, images):
        outputs = network(*inputs)
        compare(model, network, inputs, normalised, dict(zip(names, outputs, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "batch"), SIZES)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("ghosts", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_selective(kind, ghosts, given, size, batch):
    options = ExportOptions(size, batch, given=given, logits=True, ghosts=ghosts, tiles=ghosts)
    _check(kind, "edge", options, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "batch"), SIZES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["lite", "plus", "8 16 32", "4 8 16"])
@torch.no_grad()
def test_policies(kind, policy, size, batch):
    _check(kind, policy, ExportOptions(size, batch, logits=True), 2)


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_dense(kind, stride):
    _check(kind, "edge", ExportOptions((47, 96), 2, dense=stride, logits=True), 1)


@pytest.mark.parametrize("kind", ["lite", "deeplabv3", "8 16 32", "4 8 16"])
@torch.no_grad()
def test_bytes_as_input(kind):
    _check(kind, "entropy", ExportOptions((64, 65), input="uint8", logits=True), 2)


@pytest.mark.parametrize("fraction", [0.07, 1.0])
@pytest.mark.parametrize("kind", ["lite", "deeplabv3", "8 16 32"])
@torch.no_grad()
def test_one_block_and_all(kind, fraction):
    _check(kind, "entropy", ExportOptions((96, 160), fine_fraction=fraction, given=True, logits=True), 2)


@pytest.mark.parametrize("size", [(64, 96), (75, 101)], ids=str)
@pytest.mark.parametrize("kind", ["lite", "deeplabv3", "8 16 32", "4 8 16"])
@torch.no_grad()
def test_patch_is_dense_where_all_blocks_are_alike(kind, size):
    """All fine it is dense at the finest stride; two blocks from the only fine one, dense at the coarsest."""
    model = kind_model(kind)
    options = ExportOptions(size, given=True, merge="patch", logits=True)
    every = StaticNetwork(model, ExportOptions(**{**vars(options), "fine_fraction": 1.0}))
    (inputs, images), *_ = cases(every, 1)
    finest, coarsest = model.strides[0], model.strides[-1]
    assert relative_error(every(*inputs)[2], model.dense(images, finest)) < 1e-5
    if every.ranking.middle or len(model.strides) == 3:
        return
    fraction = 1 / (every.blocks[0] * every.blocks[1])
    one = StaticNetwork(model, ExportOptions(**{**vars(options), "fine_fraction": fraction}))
    inputs = (inputs[0], torch.zeros(1, 1, dtype=torch.int64))
    far = (slice(None), slice(None), slice(2 * coarsest, None), slice(2 * coarsest, None))
    assert relative_error(one(*inputs)[2][far], model.dense(images, coarsest)[far]) < 1e-5


@pytest.mark.parametrize("policy", ["entropy", "gain"])
@pytest.mark.parametrize("kind", ["lite", "deeplabv3", "8 16 32", "4 8 16"])
@torch.no_grad()
def test_patch_is_the_models(kind, policy):
    """The same blocks and logits as the model's own, on odd sizes and a batch."""
    model = kind_model(kind, policy)
    network = StaticNetwork(model, ExportOptions((75, 101), 2, merge="patch", logits=True))
    for inputs, images in cases(network, 2):
        found, run = network(*inputs), model.start(images).follow(Way(merge="patch"))
        assert torch.equal(found[1], run.levels == len(model.strides) - 1)
        assert relative_error(found[2], run.logits()) < 1e-5


@pytest.mark.parametrize("kind", ["lite", "deeplabv3"])
@torch.no_grad()
def test_patch_equals_whole_inside_fine_blocks(kind):
    model, size = kind_model(kind), (80, 128)
    networks = [StaticNetwork(model, ExportOptions(size, given=True, merge=m)) for m in ("whole", "patch")]
    inputs, _ = cases(networks[0], 1)[0]
    whole, patch = (network.grid_logits(*inputs)[0] for network in networks)
    fine = networks[0](*inputs)[1].repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    assert relative_error(whole[fine.expand_as(whole)], patch[fine.expand_as(patch)]) < 1e-5
    assert relative_error(whole, patch) > 1e-3  # elsewhere it keeps the coarse pass's


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lite", "deeplabv3", "8 16 32"])
@torch.no_grad()
def test_it_is_one_graph_of_fixed_shapes(kind):
    """torch.export and torch.compile take it whole: no branch and no shape depends on the data."""
    network = StaticNetwork(kind_model(kind, "entropy"), ExportOptions((64, 96), ghosts=False, tiles=False))
    inputs, _ = cases(network, 1)[0]
    expected = network(*inputs)
    program = torch.export.export(network, network.example())
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    for outputs in (program.module()(*inputs), compiled(*inputs)):
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    dynamic = [
        v for node in program.graph.nodes for v in [node.meta.get("val")] if isinstance(v, torch.SymInt)
    ]
    assert not dynamic
