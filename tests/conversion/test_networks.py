"""The networks that conversions are tested against have the names and shapes of the real files."""

import json

import pytest
import torch

from tests.conversion.cases import BACKBONES, CASES, PEERS

ALL = {name: case for name, case in (CASES | BACKBONES).items() if case.peer}


@pytest.mark.skipif(not PEERS.is_dir(), reason="lists of the real files' tensors are not at hand")
@pytest.mark.parametrize("name", ALL)
def test_names_and_shapes(name):
    case = ALL[name]
    tensors = json.loads((PEERS / f"{case.peer}.json").read_text())["tensors"]
    with torch.device("meta"):
        state = case.build(case.stride, small=False).state_dict()
        state = case.rename({key: torch.empty(value.shape, device="meta") for key, value in state.items()})
    assert {key: list(value.shape) for key, value in state.items()} == tensors
