"""Registries: parts by name, imported when looked up, and parts from outside."""

from pathlib import Path

import pytest

from sparse_seg.errors import ConfigError
from sparse_seg.registry import BACKBONES, DATASETS, HEADS, POLICIES, Registry

REGISTRIES = [BACKBONES, HEADS, POLICIES, DATASETS]


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_every_entry_resolves(registry: Registry) -> None:
    for name in registry.declared:
        assert not isinstance(registry[name], str)


def test_a_part_from_outside() -> None:
    registry = Registry("thing", {"path": "pathlib:Path", "missing": "no.such:Part"})

    @registry.register("mine")
    class Mine:
        pass

    assert registry.register("other", 3) == 3
    assert list(registry) == ["path", "missing", "mine", "other"], "listing imports nothing"
    assert registry.declared == ("path", "missing")
    assert (registry["path"], registry["mine"]) == (Path, Mine)
    with pytest.raises(ModuleNotFoundError):
        registry["missing"]
    with pytest.raises(ValueError, match="there is a thing 'mine' already; choose another name"):
        registry.register("mine", 4)


def test_an_unknown_name_is_a_config_error_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        POLICIES["confidense"]
    assert str(caught.value).startswith("unknown mask policy 'confidense'; did you mean 'confidence'? Choose")
    assert POLICIES.get("nothing") is None
