"""The static form gives the model's blocks, logits and classes; its shapes depend on nothing."""

import pytest
import torch

from sparse_seg.export import ExportOptions, StaticNetwork
from tests.export.kinds import KINDS, POLICIES, cases, compare, kind_model
from tests.export.networks import captured
from tests.reference import relative_error


def _check(kind: str, policy: str, options: ExportOptions, images: int) -> None:
    model = kind_model(kind, policy)
    network = StaticNetwork(model, options)
    names = ["classes", "logits"] if options.dense else ["classes", "fine_blocks", "logits"]
    for inputs, normalised in cases(network, images):
        outputs = network(*inputs)
        compare(model, network, inputs, normalised, dict(zip(names, outputs, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_selective(kind):
    _check(kind, "edge", ExportOptions((64, 96), given=True, logits=True), 2)
    _check(kind, "edge", ExportOptions((47, 101), 3, logits=True, ghosts=False, tiles=False), 2)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["lite", "plus", "8 16 32", "4 8 16"])
@torch.no_grad()
def test_policies(kind, policy):
    _check(kind, policy, ExportOptions((47, 101), 3, logits=True), 2)


@torch.no_grad()
def test_a_coarse_pass_beside_a_lattice_that_the_mask_changes():
    _check("undilated", "entropy", ExportOptions((47, 101), 2, logits=True), 2)


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("kind", ["lite", "smp's plus", "undilated", "4 8 16"])
@torch.no_grad()
def test_dense(kind, stride):
    _check(kind, "edge", ExportOptions((47, 96), 2, dense=stride, logits=True), 1)


@pytest.mark.parametrize("kind", ["deeplabv3", "4 8 16"])
@torch.no_grad()
def test_bytes_as_input(kind):
    _check(kind, "entropy", ExportOptions((64, 65), input="uint8", logits=True), 2)


@pytest.mark.parametrize("fraction", [0.07, 1.0])
@pytest.mark.parametrize("kind", ["deeplabv3", "8 16 32"])
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


@pytest.mark.parametrize(
    ("kind", "policy"),
    [("lite", "gain"), ("deeplabv3", "entropy"), ("8 16 32", "gain"), ("4 8 16", "entropy")],
)
@torch.no_grad()
def test_patch_is_the_models(kind, policy):
    """The same blocks and logits as the model's own, on odd sizes and a batch."""
    _check(kind, policy, ExportOptions((75, 101), 2, merge="patch", logits=True), 2)


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
@pytest.mark.parametrize("model", [kind_model, captured], ids=["own", "captured"])
@pytest.mark.parametrize("kind", ["8 16 32"])
@torch.no_grad()
def test_it_is_one_graph_of_fixed_shapes(kind, model):
    """torch.export and torch.compile take it whole: no branch and no shape depends on the data."""
    network = StaticNetwork(model(kind, "entropy"), ExportOptions((64, 96), ghosts=False, tiles=False))
    inputs, _ = cases(network, 1)[0]
    expected = network(*inputs)
    program = torch.export.export(network, network.example())
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    for outputs in (program.module()(*inputs), compiled(*inputs)):
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    values = [node.meta.get("val") for node in program.graph.nodes]
    assert not [value for value in values if isinstance(value, torch.SymInt)]
