"""Exported graphs kept on disk, so that the next command need not make them again."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

import torch

from sparse_seg.checkpoint import digest_of
from sparse_seg.export.options import ExportOptions
from sparse_seg.export.runtime import check_runtime
from sparse_seg.export.segmentor import description
from sparse_seg.files import atomic_write
from sparse_seg.graph.file import to_json
from sparse_seg.ops import OPERATORS
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.version import __version__

VARIABLE, OFF = "SPARSE_SEG_CACHE", "off"
MOST_BYTES = 2**30  # of all files; those that were not used for longest go first
PACKAGE = Path(__file__).parents[1]
ROOMS = ("export", "graph", "masks", "ops", "run", "sites")  # whose code makes a graph
DIGEST = 16  # bytes, before a file's graph


def folder() -> Path | None:
    """`$SPARSE_SEG_CACHE`, else `sparse_seg` in `$XDG_CACHE_HOME` or `~/.cache`; None where it is off, or the
    user has no home."""
    named, base = os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME", "")
    if named == OFF:
        return None
    path = Path(named) if named else Path(base if os.path.isabs(base) else "~/.cache", "sparse_seg")
    try:
        return path.expanduser()
    except RuntimeError:
        return None


class GraphCache:
    """The graphs of one network in one runtime.

    A graph is known by a digest of all that makes it: weights, settings, policy, options and size, the
    package's code, and the versions of it, PyTorch and the runtime. A network with a part of someone else's
    code, an operator or a policy, is not kept: that code may change.
    """

    def __init__(self, model: SelectiveNetwork, runtime: str) -> None:
        self.model, self.runtime, self.folder = model, runtime, folder()
        if model.graph.own_code or not all(_is_ours(OPERATORS[node.op]) for node in model.graph.nodes):
            self.folder = None

    def path(self, options: ExportOptions) -> Path | None:
        """Where a graph is, or would be; None where it is not kept."""
        policy = None if options.dense is not None or options.given else options.policy or self.model.policy
        if self.folder is None or not (policy is None or _is_ours(policy)):
            return None
        told = vars(options) | {"policy": policy and description(policy)}
        return self.folder / f"{digest_of([self._network, told])}.graph"

    def read(self, options: ExportOptions) -> bytes | None:
        """A graph; None where there is none, or a damaged one."""
        path = self.path(options)
        try:
            content = b"" if path is None else path.read_bytes()
        except OSError:
            return None
        told, graph = content[:DIGEST], content[DIGEST:]
        if not graph or hashlib.blake2b(graph, digest_size=DIGEST).digest() != told:
            return None
        with suppress(OSError):
            os.utime(path)  # type: ignore[arg-type]  # used just now
        return graph

    def write(self, options: ExportOptions, graph: bytes) -> None:
        """Keep a graph, whole or not at all; where the folder cannot be written, it is not kept."""
        path = self.path(options)
        if path is None or len(graph) > MOST_BYTES:
            return
        with suppress(OSError):
            atomic_write(path, hashlib.blake2b(graph, digest_size=DIGEST).digest() + graph)
            _shrink(path.parent)

    @functools.cached_property
    def _network(self) -> str:
        """Digest of the network, and of what makes graphs of it."""
        settings = dataclasses.asdict(self.model.settings) | {"mask": None}  # the policy stands in options
        version = getattr(check_runtime(self.runtime), "__version__", "")
        made_by = [__version__, _code(), torch.__version__, self.runtime, version]
        return digest_of([to_json(self.model.graph), self.model.tensors, settings, made_by])


def _is_ours(part: object) -> bool:
    return part.__module__.startswith("sparse_seg.")


@functools.cache
def _code() -> str:
    """Digest of the code that makes graphs: a checkout changes under one version."""
    files = [file for room in ROOMS for file in sorted(PACKAGE.joinpath(room).glob("*.py"))]
    return digest_of([[file.name, file.read_text()] for file in files])


def _shrink(place: Path) -> None:
    """Remove the graphs that were not used for longest, until the others fit."""
    graphs = [file for file in place.iterdir() if re.fullmatch(r"[0-9a-f]{32}\.graph", file.name)]
    found = sorted(((file.stat(), file) for file in graphs), key=lambda one: one[0].st_mtime)
    total = sum(status.st_size for status, _ in found)
    for status, file in found:
        if total <= MOST_BYTES:
            return
        file.unlink(missing_ok=True)
        total -= status.st_size
