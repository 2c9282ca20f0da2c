"""Registries: parts by name, imported when looked up, and parts from outside."""

import subprocess
import sys
from pathlib import Path

import pytest

from sparse_seg.errors import ConfigError
from sparse_seg.registry import BACKBONES, DATASETS, HEADS, POLICIES, Registry

ROOT = Path(__file__).parents[1]
REGISTRIES = [BACKBONES, HEADS, POLICIES, DATASETS]


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_every_entry_resolves(registry: Registry) -> None:
    for name in registry.declared:
        assert not isinstance(registry[name], str)


@pytest.mark.slow
def test_listing_imports_nothing() -> None:
    program = """
import sys, types
package = types.ModuleType("sparse_seg")
package.__path__ = ["sparse_seg"]
sys.modules["sparse_seg"] = package
from sparse_seg.registry import DATASETS
assert "camvid" in DATASETS and list(DATASETS) and len(DATASETS) >= 3 and "x" not in DATASETS
before = set(sys.modules)
assert "sparse_seg.data" not in before
DATASETS["camvid"]
assert "sparse_seg.data.camvid" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_part_from_outside() -> None:
    registry = Registry("thing", {"path": "pathlib:Path"})

    @registry.register("mine")
    class Mine:
        pass

    assert registry.register("other", 3) == 3
    assert dict(registry) == {"path": Path, "mine": Mine, "other": 3}
    assert registry.declared == ("path",)
    with pytest.raises(ValueError, match="there is a thing 'mine' already; choose another name"):
        registry.register("mine", 4)


def test_an_unknown_name_is_a_config_error_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        POLICIES["confidense"]
    assert str(caught.value).startswith("unknown mask policy 'confidense'; did you mean 'confidence'? Choose")
    assert POLICIES.get("nothing") is None
