"""Extra sites on a second CUDA stream: what stands in for streams here watches who waits for whom."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_seg.export import ExportOptions, StaticNetwork
from sparse_seg.export.cuda_graph import graphed
from sparse_seg.run.side_stream import SideStream
from tests.export.kinds import kind_model
from tests.reference import relative_error


class Stream:
    """Its clock: of each stream, how many operators surely ran before what comes next here."""

    current: Stream

    def __init__(self, device: Any = None) -> None:
        self.clock: dict[Stream, int] = defaultdict(int)

    def record_event(self) -> dict[Stream, int]:
        return dict(self.clock)

    def wait_event(self, event: dict[Stream, int]) -> None:
        for stream, count in event.items():
            self.clock[stream] = max(self.clock[stream], count)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def __enter__(self) -> None:
        self.before, Stream.current = Stream.current, self

    def __exit__(self, *_: Any) -> None:
        Stream.current = self.before


class Watch(TorchDispatchMode):
    """Notes who reads memory that another stream writes, or writes what it reads, and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.races, self.order = list[str](), list[tuple[Stream, dict[Stream, int]]]()
        self.uses = defaultdict[int, list[tuple[Stream, int, bool]]](list)  # of memory; whether it is written
        self.alive = list[Any]()  # no address comes twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, stream = func(*args, **(kwargs or {})), Stream.current
        stream.clock[stream] += 1
        self.order.append((stream, stream.record_event()))
        self.alive.append(out)
        read = memory((args, kwargs))
        written = memory(out) - (set() if func._schema.is_mutable else read)  # without views
        for place in read | written:
            for other, count, wrote in self.uses[place]:
                if (wrote or place in written) and stream.clock[other] < count:
                    self.races.append(str(func))
            self.uses[place].append((stream, stream.clock[stream], place in written))
        return out


def memory(values: Any) -> set[int]:
    tensors = (one for one in tree_leaves(values) if isinstance(one, Tensor) and one.numel())
    return {one.untyped_storage().data_ptr() for one in tensors}


@pytest.fixture
def main_stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    main = Stream()
    monkeypatch.setattr(Stream, "current", main, raising=False)
    monkeypatch.setattr("torch.cuda.Stream", Stream)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: Stream.current)
    monkeypatch.setattr("torch.cuda.stream", lambda stream: stream)
    return main


@torch.inference_mode()
def watched(kind: str, policy: str) -> tuple[Watch, Stream]:
    merge = "patch" if kind == "resnet34" else "whole"
    options = ExportOptions((64, 96), 2, None, 0.3, merge=merge, logits=True, ghosts=False, tiles=False)
    network = StaticNetwork(kind_model(kind, policy), options)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    expected = network(images)
    network.side = side = SideStream("cpu")
    with Watch() as watch:
        found = network(images)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    return watch, side.stream  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("kind", "policy"),
    [("deeplabv3", "edge"), ("resnet34", "learned"), ("plus", "entropy"), ("8 16 32", "edge")],
)
def test_extra_sites_wait_for_the_lattices_that_they_read(
    kind: str, policy: str, main_stream: Stream
) -> None:
    """Each for its own, not for all; and nothing of the head comes before the join. From the first operator
    beside to the join the current stream computes nothing, so it takes no memory that the side reads."""
    watch, side = watched(kind, policy)
    assert not watch.races
    streams, clocks = zip(*watch.order, strict=True)
    assert [stream for stream, _ in itertools.groupby(streams)] == [main_stream, side, main_stream]
    behind = [clock[main_stream] for stream, clock in watch.order if stream is side]
    lattices = streams.index(side)  # so many operators come before
    if policy != "entropy":  # which reads the logits of the coarse pass
        assert behind[0] < 0.8 * lattices
        assert len(set(behind)) > 3
    joined = clocks[lattices + len(behind)]
    assert (joined[main_stream], joined[side]) == (lattices + 1, len(behind))


@pytest.mark.parametrize("forgotten", ["needs", "computed", "join"])
def test_a_wait_that_is_missing_is_found(
    forgotten: str, main_stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    if forgotten == "join":
        monkeypatch.setattr(Stream, "wait_stream", lambda self, other: None)
    else:
        original = getattr(SideStream, forgotten)
        monkeypatch.setattr(SideStream, forgotten, lambda self, name="": None if name else original(self, ""))
    assert watched("deeplabv3", "edge")[0].races


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_a_graph_of_two_streams() -> None:
    """Gives what one stream gives, each time it is replayed."""
    options = ExportOptions((256, 512), 1, None, 0.3, logits=True, ghosts=False, tiles=False)
    one = StaticNetwork(kind_model("deeplabv3", "edge"), options).cuda()
    two = copy.copy(one)
    two.second_stream = True
    replay = graphed(two.cuda(), torch.zeros(1, 3, 256, 512, device="cuda"))
    for images in torch.rand(20, 1, 3, 256, 512, device="cuda"):
        assert relative_error(replay(images)[-1], one(images)[-1]) < 1e-3
