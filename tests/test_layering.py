"""The rooms of the house and what each may import (CONTRIBUTING.md), read from the source with `ast`."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "sparse_seg"

# From the ground up. A file imports its own row and the rows above it here; rooms of one row do not import
# each other in a circle. A room is a file or a folder of sparse_seg/; "surface" is sparse_seg/__init__.py.
TIERS: tuple[tuple[str, ...], ...] = (
    ("errors", "files", "version", "registry", "timing", "progress", "processes"),
    ("config",),
    ("sites", "masks", "data"),
    ("ops",),
    ("graph", "networks"),
    ("run",),
    ("checkpoint", "conversion", "export", "evaluation"),
    ("training",),
    ("lab",),
    ("cli", "__main__", "surface"),
)
TIER_OF = {room: tier for tier, rooms in enumerate(TIERS) for room in rooms}

# What is wrong today: (file, file that it should not import), and circles. Only ever take lines out.
KNOWN_UPWARD: set[tuple[str, str]] = set()
KNOWN_CIRCLES: set[tuple[str, ...]] = set()


class Import(NamedTuple):
    source: str  # dotted, below sparse_seg
    target: str
    at: str  # "module", "function" or "typing": TYPE_CHECKING, for annotations alone


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "surface"


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    return module.split(".")[0]


def imports_of(module: str, source: str) -> Iterator[Import]:
    yield from _walk(module, ast.parse(source), "module")


def _walk(module: str, node: ast.AST, at: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom | ast.Import):
            yield from (Import(module, target, at) for target in _targets(module, child))
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            yield from _walk(module, child, "typing")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _walk(module, child, "function")
        else:
            yield from _walk(module, child, at)


def _targets(module: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The package's modules that an import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        base = node.module or ""
        if node.level:
            package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
            above = ["sparse_seg", *package.split(".")] if package not in ("", "surface") else ["sparse_seg"]
            base = ".".join(above[: len(above) - node.level + 1] + ([node.module] if node.module else []))
        names = [f"{base}.{alias.name}" for alias in node.names]
    for name in names:
        if name.split(".")[0] != "sparse_seg":
            continue
        inside = name.removeprefix("sparse_seg").lstrip(".")
        if inside in MODULES:
            yield inside
        else:  # a name that the module defines
            yield inside.rpartition(".")[0] or "surface"


IMPORTS = [found for module, path in MODULES.items() for found in imports_of(module, path.read_text())]
RUN_TIME = [found for found in IMPORTS if found.at != "typing"]


def circles() -> list[tuple[str, ...]]:
    """Sets of files that import each other in a circle (Tarjan's strongly connected components).

    An import inside a function counts: it hides a circle from Python, not from the reader.
    """
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in RUN_TIME:
        graph[found.source].add(found.target)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    parts: list[tuple[str, ...]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in graph[module]:
            if target not in index:
                visit(target)
            if target in stack:
                low[module] = min(low[module], low[target])
        if low[module] == index[module]:
            part = [stack.pop()]
            while part[-1] != module:
                part.append(stack.pop())
            if len(part) > 1 or module in graph[module]:
                parts.append(tuple(sorted(part)))

    for module in MODULES:
        if module not in index:
            visit(module)
    return parts


def test_every_file_has_a_room() -> None:
    assert {room(module) for module in MODULES} <= TIER_OF.keys()


def test_the_reader_sees_every_kind_of_import() -> None:
    source = """
import numpy, sparse_seg.errors
from sparse_seg import load_model, files
from .passes import Pass
if TYPE_CHECKING:
    from sparse_seg.training import trainer
class Segmentor:
    def start(self):
        from sparse_seg.run.way import Way
"""
    assert set(imports_of("run.network", source)) == {
        Import("run.network", "errors", "module"),
        Import("run.network", "surface", "module"),
        Import("run.network", "files", "module"),
        Import("run.network", "run.passes", "module"),
        Import("run.network", "training.trainer", "typing"),
        Import("run.network", "run.way", "function"),
    }
    assert len(RUN_TIME) > len(MODULES)
    assert {found.target for found in IMPORTS} <= MODULES.keys()


def test_nothing_imports_upward() -> None:
    """Also inside functions. Names for annotations alone (TYPE_CHECKING) may come from anywhere."""
    upward = {
        (found.source, found.target)
        for found in RUN_TIME
        if TIER_OF[room(found.target)] > TIER_OF[room(found.source)]
    }
    assert sorted(upward - KNOWN_UPWARD) == []
    assert sorted(KNOWN_UPWARD - upward) == [], "mended: take it out of KNOWN_UPWARD"


@pytest.mark.parametrize("tier", TIERS, ids="-".join)
def test_rooms_of_one_tier_do_not_import_each_other(tier: tuple[str, ...]) -> None:
    """One may import the other; both ways would make them one room."""
    arrows = {(room(found.source), room(found.target)) for found in RUN_TIME}
    both = [(a, b) for a in tier for b in tier if a < b and {(a, b), (b, a)} <= arrows]
    assert both == []


def test_no_circle_of_files() -> None:
    found = set(circles())
    assert sorted(found - KNOWN_CIRCLES) == []
    assert sorted(KNOWN_CIRCLES - found) == [], "mended: take it out of KNOWN_CIRCLES"
