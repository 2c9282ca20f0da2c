"""Where the time of a run goes, by part of the network and kind of work, from PyTorch's profiler.

Ranges come from hooks that live only while profiling. Work belongs to the innermost range around it: what
runs in the backbone but in no stage is the stem, in the head but in none of its layers densify, outside both
upsampling. Each operator counts with its own time, excluding the operators it calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from sparse_seg.lab.benchmark.subject import Case, Subject
from sparse_seg.run.network import SelectiveNetwork

PREFIX = "sparse_seg:"
KINDS = {  # the first whose word is in the operator's name
    "norm": ("norm",),
    "interpolate": ("upsample", "interpolate"),
    "conv": ("conv",),
    "GEMM": ("mm", "linear", "matmul"),
    "gather": ("index", "embedding_bag", "gather", "scatter"),
    "ReLU, add": ("relu", "clamp", "add"),
    "copy": ("copy", "contiguous", "clone", "cat", "fill", "zero_", "empty", "pad"),
}
ORDER = (*KINDS, "layout", "mask", "other")
HEAD = ("refine", "classifier")  # a head's layers after densify
STAGES = ("layer1", "layer2", "layer3", "layer4")
PARTS = ("mask", "layout", "stem", *STAGES, "neck", "densify", "head", "upsample")


def profile_network(subject: Subject, case: Case, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of a forward (mask, layouts, network) by part and kind: one plain row per part.

    The cases are dense and selective ones of the scope `network`; the profiler itself adds a few percent.
    Where the policy asks for a pass of the network, that counts for the network's parts.
    """
    model, way = subject.folded_model if case.folded else subject.model, case.way
    policy = None if way.is_dense else subject.policy(way)
    tables = [] if way.is_dense else subject.tables(way)

    def run() -> None:
        one = model.start(subject.images, subject.labels)
        if policy is None:
            with record_function(f"{PREFIX}layout"):
                one.follow(way)
        else:
            with record_function(f"{PREFIX}mask"):
                blocks = policy(one)
            with record_function(f"{PREFIX}layout"):
                one.take(blocks, way)
                if one.memory is None:
                    for src, dst, spacing, exchange, lattice in tables:
                        one.layouts[src].neighbours(one.layouts[dst], spacing, exchange, lattice)
        for part, ask in (
            ("stem", one.stage_rows),
            ("neck", one.rows),
            ("densify", one.grid_logits),
            ("upsample", one.logits),
        ):
            with record_function(f"{PREFIX}{part}"):
                ask()

    cuda = subject.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.inference_mode(), _ranges(model):
        run()
        with profile(activities=activities, acc_events=True) as profiler:
            for _ in range(repeats):
                run()
    totals: dict[str, dict[str, float]] = {part: {} for part in PARTS}
    for event in profiler.events() or []:
        part = _part(event)
        if part is None:
            continue
        kind = part if part in ("layout", "mask") else _kind(event.name)
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        totals[part][kind] = totals[part].get(kind, 0.0) + time / 1000 / repeats
    return [
        {
            "network": case.name,
            "form": case.form,
            "part": part,
            "kinds": kinds,
            "milliseconds": sum(kinds.values()),
        }
        for part, kinds in totals.items()
        if kinds
    ]


@contextlib.contextmanager
def _ranges(model: SelectiveNetwork) -> Iterator[None]:
    """Named ranges around the parts of a network's forward."""
    open_ranges: list[record_function] = []

    def enter(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            open_ranges.append(record_function(f"{PREFIX}{name}"))
            open_ranges[-1].__enter__()

        return hook

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    parts = [(stage, model.backbone.get_submodule(stage)) for stage in STAGES]
    for name, child in model.head.named_children():
        layers = child if isinstance(child, nn.ModuleList) else [child]  # a list itself is never called
        parts += [("head" if name in HEAD else "neck", layer) for layer in layers]
    hooks = []
    for name, module in parts:
        hooks += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _part(event: FunctionEvent) -> str | None:
    """The innermost range around an event; None outside all."""
    at: FunctionEvent | None = event
    while at is not None:
        if at.name.startswith(PREFIX):
            return at.name.removeprefix(PREFIX)
        at = at.cpu_parent
    return None


def _kind(name: str) -> str:
    if name.startswith(PREFIX):
        return "other"
    for kind, words in KINDS.items():
        if any(word in name for word in words):
            return kind
    return "other"
