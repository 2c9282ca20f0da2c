"""Damaged and hostile checkpoints: right weights or one line, never a traceback, never other weights.

`run` counts outcomes; `tests/fuzz/table.py` makes the table of docs/reliability.md of them.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import io
import json
import pickle
import random
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import Tensor

from sparse_seg import selective
from sparse_seg.checkpoint import digest_of, load_model, save_model
from sparse_seg.checkpoint.captured import own_captured
from sparse_seg.config import Config, config_from_dict, model_config
from sparse_seg.conversion import convert, to_dense
from sparse_seg.errors import SparseSegError
from sparse_seg.processes import Processes
from sparse_seg.run.build import build_model
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.training.checkpoint import load_state, save_checkpoint, save_state
from sparse_seg.training.objective import Objective
from sparse_seg.training.step import Step
from sparse_seg.training.trainer import Trainer
from tests import captured
from tests.checkpoint.earlier import write_converted, write_training
from tests.checkpoint.stored import opened, packed
from tests.conversion.cases import randomise, same
from tests.conversion.networks import Head, ResNet, Torchvision
from tests.fuzz.damage import ANY, ZIP, change_tree

OUTCOMES = ("right", "refused", "traceback", "wrong")
SECONDS = 20  # more for one file counts as a traceback: nobody waits for a hostile file
NETWORK = {"width": 0.0625, "depths": [1, 1, 1, 1], "head_channels": 4, "num_classes": 19}


@functools.cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="fuzz"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def config() -> Config:
    return config_from_dict({"model": dict(NETWORK), "train": {"ema_decay": 0.9}}, "test")


@functools.cache
def trained() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return build_model(config()).eval().state_dict()


@functools.cache
def source() -> dict[str, Tensor]:
    torch.manual_seed(0)
    network = Torchvision(ResNet(18, 8, width=4, depths=(1, 1, 1, 1)), Head("fcn", classes=3))
    return randomise(network).state_dict()


@functools.cache
def state() -> dict[str, Any]:
    """What training saves after two steps."""
    trainer = bare_trainer()
    for _ in range(2):
        trainer.optimizer.zero_grad()
        loss = trainer.model.dense(torch.randn(2, 3, 32, 32)).square().mean()
        loss.backward()
        trainer.optimizer.step()
    return {
        "ema": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": {},
        "progress": {"iteration": 2, "best": 0.25, "loss_sum": 1.5, "loss_count": 2},
        "random": torch.get_rng_state(),
    }


@functools.cache
def fresh() -> SelectiveNetwork:
    torch.manual_seed(1)
    return build_model(config())


def bare_trainer() -> Trainer:
    """A trainer with what resuming needs, and no data."""
    trainer = Trainer.__new__(Trainer)
    trainer.config, trainer.work_dir = config(), folder()
    model = copy.deepcopy(fresh())
    train, cpu = config().train, torch.device("cpu")
    trainer.processes = Processes()
    trainer.step = Step(model, Objective(train), train, cpu, trainer.processes)
    trainer.step.average = copy.deepcopy(model)
    trainer.model, trainer.ema, trainer.optimizer = model, trainer.step.average, trainer.step.optimizer
    return trainer


# -- what is tried with a file; each returns whether all that was read is right


def use_trained(path: Path) -> bool:
    return same(load_model(path).state_dict(), trained())


def use_converted(path: Path) -> bool:
    back = same(to_dense(path), source())
    return back and same(load_model(path).state_dict(), converted_weights())


@functools.cache
def converted_weights() -> dict[str, Tensor]:
    return load_model(write(CONVERTED)).state_dict()


def use_source(path: Path) -> bool:
    conversion = convert(path)
    conversion.write(folder() / "converted.safetensors")
    return same(to_dense(folder() / "converted.safetensors"), source())


def use_state(path: Path) -> bool:
    found, expected = load_state(path), state()
    trainer = bare_trainer()
    trainer._restore(found, path)
    momenta = trainer.optimizer.state_dict()["state"]
    wanted = expected["optimizer"]["state"]
    return (
        same(trainer.model.state_dict(), trained())
        and trainer.ema is not None
        and same(trainer.ema.state_dict(), expected["ema"])
        and momenta.keys() == wanted.keys()
        and all(same(momenta[index], wanted[index]) for index in wanted)
        and torch.equal(torch.get_rng_state(), expected["random"])
        and [trainer.iteration, trainer.loss_sum, trainer.loss_count] == [2, 1.5, 2]
    )


def use_captured(path: Path) -> bool:
    network = load_model(path)
    return same(network.state_dict(), captured_weights()) and torch.equal(logits(network), captured_logits())


def use_hostile_graph(path: Path) -> bool:
    """A graph that is taken runs, dense and selectively, with the weights in the file."""
    network = load_model(path)
    logits(network)
    stored, _ = opened(path)
    return all(torch.equal(tensor, stored[name]) for name, tensor in network.state_dict().items())


@torch.inference_mode()
def logits(network: Any) -> Tensor:
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return torch.cat([network(images), network.dense(images, network.strides[-1])])


@functools.cache
def captured_weights() -> dict[str, Tensor]:
    return load_model(write("captured")).state_dict()


@functools.cache
def captured_logits() -> Tensor:
    return logits(load_model(write("captured")))


def use_hostile(path: Path) -> bool:
    """Weights must be those in the file, whatever the rest of it says; the way back must not fall over."""
    stored, _ = opened(path)
    with contextlib.suppress(SparseSegError):
        to_dense(path)
    found = load_model(path).state_dict()
    return all(torch.equal(tensor, stored[name]) for name, tensor in found.items() if name in stored)


def use_any_state(path: Path) -> bool:
    """Without a digest a state is what it says: it is resumed as such, or refused."""
    content = torch.load(path, weights_only=True)
    found = load_state(path)
    trainer = bare_trainer()
    trainer._restore(found, path)
    return (
        all(
            torch.equal(tensor, content["model"][name]) for name, tensor in trainer.model.state_dict().items()
        )
        and trainer.iteration == content["progress"]["iteration"]
        and torch.equal(torch.get_rng_state(), content["random"])
    )


# -- whole files, and how they are spoilt


@functools.cache
def write(kind: str) -> Path:
    """A whole file of a kind."""
    path = folder() / f"{kind.replace(' ', '_').replace(',', '')}.file"
    if kind == "old .pt":
        write_training(path, config(), trained())
    elif kind == "last.pt":
        save_state(path, config(), trained(), **state())
    elif kind == "captured":
        save_model(selective(captured.trained(), size=(64, 64)), path)
    elif kind == "new .safetensors, trained":
        save_checkpoint(path, config(), trained(), own_captured(model_config(config())))
    elif kind == "foreign .pth":
        torch.save({"model_state": source()}, path)
    elif kind == "old .safetensors, converted":
        write_converted(path, convert(write("foreign .pth")))
    else:
        convert(write("foreign .pth")).write(path)
    return path


Damage = Callable[[bytes, random.Random], bytes]
Spoil = Callable[[Path, random.Random], bytes]


def damaged(damages: tuple[Damage, ...]) -> Spoil:
    return lambda whole, rng: rng.choice(damages)(whole.read_bytes(), rng)


def hostile(whole: Path, rng: random.Random) -> bytes:
    """A file whose metadata say something else, with a right digest."""
    tensors, metadata = opened(whole)
    key = rng.choice(list(metadata))
    try:
        tree = json.loads(metadata[key])
    except ValueError:
        tree = metadata[key]
    changed = change_tree(tree, rng)
    if isinstance(changed, dict) and "digest" in changed:
        changed["digest"] = digest_of({name: value for name, value in changed.items() if name != "digest"})
    text = json.dumps(changed) if not isinstance(changed, str) else changed
    return safetensors.torch.save(tensors, metadata | {key: text.encode("utf-8", "replace").decode()})


def hostile_graph(whole: Path, rng: random.Random) -> bytes:
    """A file whose graph says something else in one to three places, with a right digest."""
    tensors, metadata = opened(whole)
    content = json.loads(metadata["sparse_seg"])
    for _ in range(rng.randint(1, 3)):
        content["graph"] = _changed_graph(content["graph"], rng)
    return packed(tensors, content)


OPTIONS = (0, 1, 2, 3, 127, 1000, [1, 2], [2, 1], [3, 3], True, "same", None)


def _changed_graph(graph: Any, rng: random.Random) -> Any:
    """Anything anywhere, or a node with an option, shape, operator, input or tensor of another one."""
    entries = graph.get("nodes") if isinstance(graph, dict) else None
    nodes = [node for node in entries if isinstance(node, dict)] if isinstance(entries, list) else []
    if not nodes or rng.random() < 0.4:
        return change_tree(graph, rng)
    graph = copy.deepcopy(graph)
    nodes = [node for node in graph["nodes"] if isinstance(node, dict)]
    one, other = rng.choice(nodes), rng.choice(nodes)
    key = rng.choice(["op", "inputs", "tensors", "options", "shape", "name"])
    if isinstance(one.get("options"), dict) and one["options"] and rng.random() < 0.5:
        option = rng.choice(list(one["options"]))
        one["options"][option] = rng.choice(OPTIONS)
    elif key in other:
        one[key] = copy.deepcopy(other[key])
    return graph


@functools.cache
def content_of(whole: Path) -> dict[str, Any]:
    return torch.load(whole, weights_only=True)


def spoilt_state(whole: Path, rng: random.Random) -> bytes:
    """A state whose content is another, without a digest."""
    content = dict(content_of(whole))
    del content["digest"]
    part = rng.choice([*content, "optimizer", "progress", "random"])
    if rng.random() < 0.15:
        del content[part]
    else:
        content[part] = _changed_state(content[part], rng)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _changed_state(value: Any, rng: random.Random) -> Any:
    if isinstance(value, Tensor):
        others = [
            lambda: value.flatten()[:1],
            lambda: value.to(torch.complex64),
            lambda: value.to(torch.int8),
            lambda: torch.full(value.shape, float("nan")),
            lambda: value[None],
            lambda: torch.zeros_like(value),
            lambda: rng.choice([None, 1, "x", [1.0]]),
        ]
        return rng.choice(others)()
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        rest = {name: item for name, item in value.items() if name != key}
        return rest if rng.random() < 0.2 else rest | {key: _changed_state(value[key], rng)}
    return change_tree(value, rng)


class Kind(NamedTuple):
    """Of so many files: a whole one, how it is spoilt, and what is tried with it."""

    whole: str
    spoil: Spoil
    use: Callable[[Path], bool]
    files: int


TRAINED, CONVERTED = "new .safetensors, trained", "new .safetensors, converted"
KINDS = {
    "damaged `best.pt` of version 0.1": Kind("old .pt", damaged(ZIP), use_trained, 500),
    "damaged `last.pt`": Kind("last.pt", damaged(ZIP), use_state, 500),
    "damaged `best.safetensors`": Kind(TRAINED, damaged(ANY), use_trained, 500),
    "damaged converted file": Kind(CONVERTED, damaged(ANY), use_converted, 500),
    "damaged `.pth` of another package": Kind("foreign .pth", damaged(ZIP), use_source, 500),
    "hostile metadata, converted": Kind(CONVERTED, hostile, use_hostile, 200),
    "hostile metadata, trained": Kind(TRAINED, hostile, use_hostile, 100),
    "hostile metadata, version 0.1": Kind("old .safetensors, converted", hostile, use_hostile, 200),
    "damaged file with a graph": Kind("captured", damaged(ANY), use_captured, 300),
    "hostile graph": Kind("captured", hostile_graph, use_hostile_graph, 600),
    "state with other content": Kind("last.pt", spoilt_state, use_any_state, 300),
}


def run(kind: str, seed: int, count: int) -> dict[str, int]:
    """Try `count` spoilt files; how many came out how. Failures are printed with their number."""
    whole, spoil, use, _ = KINDS[kind]
    result = dict.fromkeys(("tried", *OUTCOMES), 0)
    path = folder() / ("last.pt" if "last" in kind or "state" in kind else "spoilt.safetensors")
    for number in range(count):
        path.write_bytes(spoil(write(whole), random.Random(f"{kind} {seed} {number}")))
        outcome = _outcome(use, path, f"{kind}, seed {seed}, number {number}")
        result["tried"] += 1
        result[outcome] += 1
    return result


def _outcome(use: Callable[[Path], bool], path: Path, name: str) -> str:
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        if use(path):
            return "right"
        print(f"{name}: wrong")
        return "wrong"
    except SparseSegError as error:
        text = str(error)
        if text and text.isprintable():
            return "refused"
        print(f"{name}: not one line: {text!r}")
    except (Exception, pickle.PickleError) as error:
        print(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    finally:
        signal.alarm(0)
    return "traceback"


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_right_or_refused(kind: str) -> None:
    """A quarter of the files that docs/reliability.md counts."""
    result = run(kind, 0, KINDS[kind].files // 4)
    assert result["traceback"] == result["wrong"] == 0
    assert result["refused"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_right(kind: str) -> None:
    """What is damaged above is right before."""
    assert KINDS[kind].use(write(KINDS[kind].whole))
