"""The rooms of the house and what each may import (CONTRIBUTING.md), read from the source with `ast`."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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


class Import(NamedTuple):
    source: str  # dotted, below sparse_seg
    target: str
    is_typing: bool  # under TYPE_CHECKING, for annotations alone


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "surface"


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    return module.split(".")[0]


def imports_of(module: str, source: str) -> Iterator[Import]:
    """Also those inside functions."""
    tree = ast.parse(source)
    branches = [one for one in ast.walk(tree) if isinstance(one, ast.If) and _is_typing(one)]
    typing = {inner for branch in branches for inner in ast.walk(branch)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            yield from (Import(module, target, node in typing) for target in _targets(module, node))


def _is_typing(branch: ast.If) -> bool:
    return "TYPE_CHECKING" in ast.dump(branch.test)


def _targets(module: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The package's modules that an import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        assert not node.level, f"{module}: a relative import, which this reader does not follow"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
        if name.split(".")[0] != "sparse_seg":
            continue
        inside = name.removeprefix("sparse_seg").lstrip(".")
        if inside in MODULES:
            yield inside
        else:  # a name that the module defines
            yield inside.rpartition(".")[0] or "surface"


IMPORTS = [found for module, path in MODULES.items() for found in imports_of(module, path.read_text())]
RUN_TIME = [found for found in IMPORTS if not found.is_typing]


def test_every_file_has_a_room() -> None:
    assert {room(module) for module in MODULES} <= TIER_OF.keys()


def test_the_reader_sees_every_kind_of_import() -> None:
    source = """
import numpy, sparse_seg.errors
from sparse_seg import load_model, files
from sparse_seg.run.passes import Pass
if TYPE_CHECKING:
    from sparse_seg.training import trainer
class Segmentor:
    def start(self):
        from sparse_seg.run.way import Way
"""
    assert set(imports_of("run.network", source)) == {
        Import("run.network", "errors", False),
        Import("run.network", "surface", False),
        Import("run.network", "files", False),
        Import("run.network", "run.passes", False),
        Import("run.network", "training.trainer", True),
        Import("run.network", "run.way", False),
    }
    assert len(RUN_TIME) > len(MODULES)
    assert {found.target for found in IMPORTS} <= MODULES.keys()


def test_nothing_imports_upward() -> None:
    """Also inside functions. Names for annotations alone (TYPE_CHECKING) may come from anywhere."""
    upward = [one for one in RUN_TIME if TIER_OF[room(one.target)] > TIER_OF[room(one.source)]]
    assert not upward


def test_rooms_of_one_tier_do_not_import_each_other() -> None:
    """One may import the other; both ways would make them one room."""
    arrows = {(room(found.source), room(found.target)) for found in RUN_TIME}
    assert not [(a, b) for a, b in arrows if a < b and TIER_OF[a] == TIER_OF[b] and (b, a) in arrows]


def test_no_circle_of_files() -> None:
    """An import inside a function counts: it hides a circle from Python, not from the reader."""
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in RUN_TIME:
        graph[found.source].add(found.target)
    graphlib.TopologicalSorter(graph).prepare()  # its CycleError names the files
