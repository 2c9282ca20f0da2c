"""A file carries its graph: it loads without the code behind the network, and nothing in it is trusted."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparse_seg
from sparse_seg import load_model, save_model, selective
from sparse_seg.checkpoint import load
from sparse_seg.config import config_from_dict
from sparse_seg.conversion import to_dense
from sparse_seg.errors import CheckpointError
from sparse_seg.run.card import Card
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from tests import captured
from tests.checkpoint.stored import write_changed
from tests.conversion.cases import same
from tests.reference import relative_error

SIZE = (64, 64)


def network(**options: Any) -> SelectiveNetwork:
    return selective(captured.trained(), size=SIZE, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "net.safetensors"
    save_model(network(), path)
    return path


def images() -> torch.Tensor:
    return torch.randn(2, 3, 70, 90, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_same_logits_in_every_way(saved: Path) -> None:
    found, own, x = load_model(saved), network(), images()
    blocks = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(2)) < 0.4
    assert torch.equal(found(x), own(x))
    assert torch.equal(found(x, blocks), own(x, blocks))
    assert all(torch.equal(found.dense(x, stride), own.dense(x, stride)) for stride in (8, 16))
    for theirs, ours in zip(found.refine(x, [0, 0.3]), own.refine(x, [0, 0.3]), strict=True):
        assert torch.equal(theirs, ours)
    assert relative_error(found.dense(x, 8), own.module(x)["out"]) < 1e-5
    assert (found.settings, found.report()) == (own.settings, own.report())
    names = {name for name, _ in found.named_parameters()}
    assert names == {name for name, _ in own.named_parameters() if "auxiliary" not in name}


def test_the_code_may_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone_nets.py").write_text(Path(captured.__file__).read_text())
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("gone_nets").trained()
    save_model(selective(module, size=SIZE), tmp_path / "net.safetensors")
    expected = module(images())["out"]
    del sys.modules["gone_nets"], module
    (tmp_path / "gone_nets.py").unlink()
    found = load_model(tmp_path / "net.safetensors")
    assert relative_error(found.dense(images(), 8), expected) < 1e-5
    assert "gone_nets" not in sys.modules


def test_what_is_known_of_the_classes_is_in_the_file(tmp_path: Path) -> None:
    card = Card(
        ("a", "b", "c"),
        ((1, 2, 3), (4, 5, 6), (7, 8, 9)),
        (5, 6, 7),
        (0.5, 0.5, 0.5),
        (0.2, 0.2, 0.2),
        frame=(360, 480),
    )
    save_model(network(card=card), tmp_path / "net.safetensors")
    found = load_model(tmp_path / "net.safetensors")
    assert found.card == card
    save_model(found, tmp_path / "again.safetensors")  # what was loaded is saved as well
    assert load_model(tmp_path / "again.safetensors").card == card
    assert load(tmp_path / "again.safetensors").weights.keys() == {
        name for name in load(tmp_path / "net.safetensors").weights if not name.startswith("source.")
    }


def test_a_parameter_by_two_names_is_saved(tmp_path: Path) -> None:
    module = captured.trained()
    first, second = (module.late.get_submodule(f"{number}.0") for number in (0, 1))
    second.weight = first.weight
    module.auxiliary = module.head
    save_model(selective(module, size=SIZE), tmp_path / "net.safetensors")
    expected = module(images())["out"]
    assert relative_error(load_model(tmp_path / "net.safetensors").dense(images(), 8), expected) < 1e-5


def test_a_config_says_how_it_runs(saved: Path) -> None:
    def loaded(**model: Any) -> SelectiveNetwork:
        config = config_from_dict({"model": {"num_classes": 3, **model}}, "test")
        return load_model(saved, config)

    assert loaded().strides == (8, 16)
    assert loaded(strides=[16, 32]).strides == (16, 32)
    assert loaded(exchange="none").exchange == "none"
    assert loaded(mask={"policy": "edge", "fine_fraction": 0.3}).policy.fine_fraction == 0.3
    assert loaded(merge="patch", strides=[8, 16, 32]).merge == "patch"
    with pytest.raises(CheckpointError, match="holds no net of a mask"):
        loaded(mask={"policy": "learned"})


@torch.no_grad()
def test_what_mixes_phases_asks_a_coarse_pass_of_its_own(tmp_path: Path) -> None:
    own = selective(captured.trained(mixing=True), size=SIZE).eval()
    save_model(own, tmp_path / "net.safetensors")
    loaded = load_model(tmp_path / "net.safetensors")
    logits = loaded(images())
    assert torch.equal(logits, own(images()))
    policy: Any = own.policy
    coarse = own.start(images()).follow(Way.dense(own.strides[-1]))
    blocks = policy.cut(policy.logit_scores(coarse.upsample(coarse.grid_logits(), policy.sample)))
    assert torch.equal(logits, own(images(), blocks))


def test_what_is_not_saved(tmp_path: Path) -> None:
    refused: list[tuple[Any, str]] = [
        (network().for_inference(), "save the one it was made of"),
        (captured.trained(), "what selective.. made, not a Net"),
        (network(card=Card.unnamed(4)), "4 class names are given, and the network has 3 classes"),
    ]
    for wrong, message in refused:
        with pytest.raises(CheckpointError, match=message):
            save_model(wrong, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_network_of_ours_is_saved_as_well(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = sparse_seg.build_model({"width": 0.0625, "depths": [1, 1, 1, 1], "num_classes": 3}).eval()
    path, wider = tmp_path / "net.safetensors", tmp_path / "wider.safetensors"
    save_model(own, path)
    found = load_model(path)
    assert torch.equal(found(images()), own(images()))
    assert found.settings == own.settings
    assert same(to_dense(path), own.module.state_dict())
    write_changed(path, wider, lambda content: content["model"].update(width=1.0))
    assert torch.equal(load_model(wider)(images()), own(images())), "the graph is what runs"


# -- what a graph may not say --------------------------------------------------------------------------------


def node(graph: dict[str, Any], op: str) -> dict[str, Any]:
    return next(one for one in graph["nodes"] if one["op"] == op)


def cycle(graph: dict[str, Any]) -> None:
    graph["nodes"][1]["inputs"] = [graph["nodes"][2]["name"]]


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an operator": (lambda g: node(g, "relu").update(op="system"), "unknown operator 'system'"),
    "padding": (lambda g: node(g, "relu").update(op="pad"), "unknown operator 'pad'"),
    "a second image": (lambda g: node(g, "relu").update(op="image", inputs=[]), "the image stands first"),
    "a cycle": (cycle, "which is not made before"),
    "two of a name": (lambda g: g["nodes"][2].update(name=g["nodes"][1]["name"]), "is made twice"),
    "too long": (lambda g: g.update(nodes=[0] * 20_001), "has no list of nodes"),
    "no list": (lambda g: g.update(nodes={}), "has no list of nodes"),
    "no output": (lambda g: g.update(output="nothing"), "its output 'nothing' is no value"),
    "a key": (lambda g: g.update(code="import os"), "'code'.* missing or unknown"),
    "a lacking key": (lambda g: g["nodes"][1].pop("shape"), "'shape'.* missing or unknown"),
    "a text": (lambda g: node(g, "conv2d")["options"].update(groups="1"), "its option 'groups' is '1'"),
    "a flag": (lambda g: node(g, "conv2d")["options"].update(stride=[True, 1]), "its option 'stride'"),
    "an option": (lambda g: node(g, "relu")["options"].update(eval="x"), "its option 'eval'"),
    "no option": (
        lambda g: node(g, "batch_norm")["options"].pop("eps"),
        "graph cannot be: .*'eps' is missing",
    ),
    "a kernel": (lambda g: node(g, "conv2d")["options"].update(kernel=[10**9] * 2), "its option 'kernel'"),
    "another kernel": (lambda g: node(g, "conv2d")["options"].update(kernel=[5, 5]), "another kernel"),
    "padding without end": (
        lambda g: node(g, "conv2d")["options"].update(padding=[10_000, 1]),
        "wider than its window",
    ),
    "groups": (lambda g: node(g, "conv2d")["options"].update(groups=3), "its graph cannot be: .*groups=3"),
    "a shape": (lambda g: node(g, "relu").update(shape=[1, 5, 32, 32]), "relu in .* gives"),
    "a huge shape": (lambda g: node(g, "relu").update(shape=[1, 10**12, 1, 1]), "its shape is"),
    "many channels": (lambda g: node(g, "relu").update(shape=[1, 60_000, 60_000, 1, 1]), "too many channels"),
    "a missing tensor": (
        lambda g: node(g, "conv2d")["tensors"].update(weight="x"),
        "the tensor x is missing",
    ),
    "a lacking tensor": (lambda g: node(g, "conv2d").update(tensors={}), "'weight' is missing"),
    "classes": (lambda g: g["nodes"][-1].update(shape=[1, 4, 8, 8]), "gives 4 logits for 3 classes"),
    "size": (lambda g: g.update(size=[10**6, 64]), "size is"),
    "an odd size": (lambda g: g.update(size=[65, 64]), "no multiple of 64"),
    "parameters": (lambda g: g["parameters"].append("x"), r"\['x'\]"),
    "inputs": (lambda g: node(g, "relu")["inputs"].append(g["nodes"][0]["name"]), "relu cannot read"),
    "an escape": (lambda g: node(g, "relu").update(layer="\x1b[31m"), "its layer is"),
    "nothing": (lambda g: g.clear(), "does not say which parameters"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_graph_that_cannot_be_is_refused_in_one_line(saved: Path, tmp_path: Path, what: str) -> None:
    change, message = CHANGES[what]
    write_changed(saved, tmp_path / "net.safetensors", lambda content: change(content["graph"]))
    with pytest.raises(CheckpointError, match=message) as found:
        load_model(tmp_path / "net.safetensors")
    assert str(found.value).isprintable()


def test_a_module_without_its_graph_is_never_imported(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"imports {name}"))
    write_changed(saved, tmp_path / "net.safetensors", lambda content: content.pop("graph"))
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(tmp_path / "net.safetensors")
    named = tmp_path / "named.safetensors"
    write_changed(saved, named, lambda content: content["model"].update(module="os:system"))
    assert load_model(named).settings.module == "os:system"  # a name, and no more


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    module = captured.trained()
    nn.init.constant_(module.head.weight, float("nan"))
    own = network()
    own.module.load_state_dict(module.state_dict())
    save_model(own, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=r"head\.weight holds NaN"):
        load_model(tmp_path / "net.safetensors")
