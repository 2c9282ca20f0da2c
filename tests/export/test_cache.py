"""Graphs on disk: found by who needs the same one, made again where damaged, bounded, never in the way."""

import copy
import os
from pathlib import Path

import pytest
import torch

from sparse_seg.errors import SparseSegError
from sparse_seg.export import StaticNetwork, cache, in_runtime
from sparse_seg.export.cache import GraphCache
from sparse_seg.export.onnx_segmentor import OnnxSegmentor
from sparse_seg.export.runner import Runner
from sparse_seg.export.segmentor import options_of
from sparse_seg.ops.base import OPERATORS, function
from sparse_seg.run.way import Way
from tests.export.kinds import kind_model

pytest.importorskip("onnx", reason="needs the package onnx")
pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SPARSE_SEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.slow
def test_the_next_command_starts_with_the_graph_of_the_last(folder, made, images):
    model = copy.deepcopy(kind_model("tiny", "gain"))  # its policy has weights
    first = in_runtime(model, "onnxruntime", 1).classify(images)[0]
    (file,) = folder.iterdir()
    runner = Runner(copy.deepcopy(model))
    assert torch.equal(runner.classify(images)[0], first)
    assert (len(made), runner.runs, runner.report()) == (1, {"onnxruntime": 1}, "runtime: onnxruntime")
    whole = file.read_bytes()
    for damaged in (b"", whole[:8], whole[:-100], whole[:100] + b"?" + whole[101:]):
        file.write_bytes(damaged)
        fast = OnnxSegmentor(model, "onnxruntime", 1)
        assert not fast.find(fast.start(images).follow().options(logits=False))
    assert torch.equal(fast.classify(images)[0], first)
    assert file.read_bytes() == whole, "made again"
    assert len(made) == 2
    assert [path.name for path in folder.iterdir()] == [file.name]


def test_what_makes_another_graph(folder, monkeypatch):
    """All that the graph depends on, one by one."""
    model, other = (copy.deepcopy(kind_model("tiny", "gain")) for _ in range(2))
    way, policy = Way(), model.policy
    paths = [GraphCache(model, "onnxruntime").path(options_of((32, 48), 1, way, policy))]
    assert paths[0] == GraphCache(other, "onnxruntime").path(options_of((32, 48), 1, way, other.policy))
    blurred, trained = copy.deepcopy(policy), copy.deepcopy(policy)
    blurred.blur = not policy.blur
    next(trained.parameters()).data += 1
    for options in (
        options_of((48, 32), 1, way, policy),
        options_of((32, 48), 2, way, policy),
        options_of((32, 48), 1, way, policy, logits=True),
        options_of((32, 48), 1, Way(merge="patch"), policy),
        options_of((32, 48), 1, Way.dense(8), None),
        options_of((32, 48), 1, way, blurred),
        options_of((32, 48), 1, way, trained),
    ):
        paths.append(GraphCache(model, "onnxruntime").path(options))
    same = options_of((32, 48), 1, way, policy)
    next(other.module.parameters()).data[0] += 1
    paths.append(GraphCache(other, "onnxruntime").path(same))
    for name, value in (("__version__", "0"), ("_code", lambda: "other code")):
        with monkeypatch.context() as patched:
            patched.setattr(cache, name, value)
            paths.append(GraphCache(model, "onnxruntime").path(same))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "0")
        paths.append(GraphCache(model, "onnxruntime").path(same))
    with monkeypatch.context() as patched:
        patched.setattr("onnxruntime.__version__", "0")
        paths.append(GraphCache(model, "onnxruntime").path(same))
    assert None not in paths
    assert len(set(paths)) == len(paths)


@pytest.mark.slow
def test_what_is_not_kept(folder, images, monkeypatch):
    """A graph that differs from PyTorch, and one with someone else's code, which may change."""
    model = copy.deepcopy(kind_model("tiny", "edge"))

    class Own(type(model.policy)):  # type: ignore[misc]
        pass

    model.policy.__class__ = Own
    in_runtime(model, "onnxruntime", 1).classify(images)
    grid_logits = StaticNetwork.grid_logits

    def negated(network, *inputs):
        logits, chosen = grid_logits(network, *inputs)
        return -logits, chosen

    monkeypatch.setattr(StaticNetwork, "grid_logits", negated)
    with pytest.raises(SparseSegError, match="other results than PyTorch"):
        in_runtime(kind_model("tiny", "edge"), "onnxruntime", 1).classify(images)
    assert not folder.exists()


def test_networks_with_operators_of_someone_elses_are_not_kept(folder, monkeypatch):
    model = kind_model("lite", "edge")
    assert GraphCache(model, "onnxruntime").folder == folder
    monkeypatch.setitem(OPERATORS, "relu", OPERATORS["relu"])
    function("relu")(lambda x: x.clamp(min=0))
    assert GraphCache(model, "onnxruntime").folder is None


def test_the_folder_is_bounded_and_what_else_is_in_it_stays(folder, monkeypatch):
    model = kind_model("tiny", "edge")
    store = GraphCache(model, "onnxruntime")
    monkeypatch.setattr(cache, "MOST_BYTES", 300)
    folder.mkdir()
    (folder / "notes.graph").write_bytes(bytes(1000))
    options = [options_of((32, 32 + width), 1, Way(), model.policy) for width in range(4)]
    for age, one in enumerate(options[:3]):
        store.write(one, bytes(80))
        path = store.path(one)
        assert path is not None
        os.utime(path, (age, age))
    assert store.read(options[0]) == bytes(80), "and is now the latest"
    store.write(options[3], bytes(80))
    assert [store.read(one) is not None for one in options] == [True, False, True, True]
    store.write(options[1], bytes(301))
    assert store.read(options[1]) is None, "larger than all"
    assert (folder / "notes.graph").exists()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["file/inside", "off"])
def test_without_a_folder_graphs_are_made_all_the_same(place, made, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no folder")
    monkeypatch.setenv("SPARSE_SEG_CACHE", place)
    for _ in range(2):
        in_runtime(kind_model("tiny", "edge"), "onnxruntime", 1).classify(images)
    assert len(made) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_where_the_folder_is(monkeypatch):
    for name in ("SPARSE_SEG_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/one")
    assert cache.folder() == Path("/home/one/.cache/sparse_seg")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache.folder() == Path("/caches/sparse_seg")
    monkeypatch.setenv("SPARSE_SEG_CACHE", "~/own")
    assert cache.folder() == Path("/home/one/own")
    monkeypatch.setenv("SPARSE_SEG_CACHE", "~nobody-has-this-name/own")
    assert cache.folder() is None, "without a home there is no folder"
    monkeypatch.setenv("SPARSE_SEG_CACHE", "off")
    assert cache.folder() is None
