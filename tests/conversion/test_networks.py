"""The networks that conversions are tested against have the names and shapes of the real files.

real_files.json records both, of the packages' own networks; VainF's and CAD's are of their repositories, at
4e1087d and c440e4e, which are no packages.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from tests.conversion.cases import BACKBONES, CASES
from tests.conversion.packages import PACKAGED
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


@pytest.mark.parametrize("peer", PACKAGED)
def test_digests_are_those_of_the_packages(peer):
    with torch.device("meta"):
        state = PACKAGED[peer]().state_dict()
    assert digest({key: list(value.shape) for key, value in state.items()}) == DIGESTS[peer]


def test_every_digest_has_a_network_and_every_package_its_record():
    assert {case.peer for case in ALL.values()} == set(DIGESTS)
    installable = tuple(f"{name}_" for name in ("mmseg", "smp", "timm", "torchvision"))
    assert {peer for peer in DIGESTS if peer.startswith(installable)} == set(PACKAGED)


@needs_shared("peers")
@pytest.mark.parametrize("name", ALL)
def test_digests_are_those_of_the_real_files(name):
    file = SHARED / f"peers/{ALL[name].peer}.json"
    if not file.exists():
        pytest.skip("has no list of the file's tensors beside the clone")
    assert digest(json.loads(file.read_text())["tensors"]) == DIGESTS[ALL[name].peer]
