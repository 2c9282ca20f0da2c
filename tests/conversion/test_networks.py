"""The networks that conversions are tested against have the names and shapes of the real files."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from tests.conversion.cases import BACKBONES, CASES
from tests.shared import SHARED, needs_shared

ALL = {name: case for name, case in (CASES | BACKBONES).items() if case.peer}
DIGESTS = json.loads(Path(__file__).with_name("real_files.json").read_text())


def digest(shapes: Mapping[str, Sequence[int]]) -> str:
    """SHA-256 of a file's tensor names and shapes, sorted by name."""
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()


@pytest.mark.parametrize("name", ALL)
def test_names_and_shapes(name):
    case = ALL[name]
    with torch.device("meta"):
        state = case.build(case.stride, small=False).state_dict()
        state = case.rename({key: torch.empty(value.shape, device="meta") for key, value in state.items()})
    shapes = {key: list(value.shape) for key, value in state.items()}
    assert digest(shapes) == DIGESTS[case.peer], sorted(shapes.items())


@needs_shared("peers")
@pytest.mark.parametrize("name", ALL)
def test_digests_are_those_of_the_real_files(name):
    tensors = json.loads((SHARED / f"peers/{ALL[name].peer}.json").read_text())["tensors"]
    assert digest(tensors) == DIGESTS[ALL[name].peer]
