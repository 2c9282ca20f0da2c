"""The sources' own packages, where they can be imported: their networks are converted exactly.

The plain networks of `networks.py` have the names and shapes of the real files, which
real_files.json records; VainF's and CAD's are of their repositories, at 4e1087d and c440e4e, which are no
packages. In float64: these networks are deep, and random ones let float32's rounding grow to 1e-5.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_seg.conversion import convert
from sparse_seg.errors import CheckpointError
from tests.conversion.cases import BACKBONES, CASES, converted, features, randomise
from tests.conversion.packages import PACKAGED, mmseg, mmseg_logits, timm
from tests.peers import package
from tests.reference import block_mask, relative_error
from tests.shared import SHARED, needs_shared

TOLERANCE = 1e-9
RECORDED = {case.peer: case for case in (CASES | BACKBONES).values() if case.peer}
DIGESTS = json.loads(Path(__file__).with_name("real_files.json").read_text())


def digest(shapes: Mapping[str, Any]) -> str:
    """SHA-256 of a file's tensor names and shapes, sorted by name."""
    named = {name: list(getattr(one, "shape", one)) for name, one in shapes.items()}
    return hashlib.sha256(json.dumps(sorted(named.items())).encode()).hexdigest()


@pytest.mark.parametrize("peer", RECORDED)
def test_names_and_shapes_are_those_of_the_real_files(peer: str) -> None:
    case = RECORDED[peer]
    with torch.device("meta"):
        state = case.build(case.stride, small=False).state_dict()
        state = case.rename({key: torch.empty(value.shape, device="meta") for key, value in state.items()})
    assert digest(state) == DIGESTS[peer]


def test_every_record_has_a_network_and_every_package_its_record() -> None:
    assert RECORDED.keys() == DIGESTS.keys()
    assert {peer for peer in DIGESTS if not peer.startswith(("vainf_", "cad_"))} == PACKAGED.keys()


@needs_shared("peers")
@pytest.mark.parametrize("peer", RECORDED)
def test_records_are_those_of_the_real_files(peer: str) -> None:
    file = SHARED / f"peers/{peer}.json"
    if not file.exists():
        pytest.skip("has no list of the file's tensors beside the clone")
    assert digest(json.loads(file.read_text())["tensors"]) == DIGESTS[peer]


def images_of(height: int = 75, width: int = 98) -> Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.slow  # which imports the packages
@pytest.mark.parametrize("peer", PACKAGED)
def test_records_are_those_of_the_packages(peer: str) -> None:
    with torch.device("meta"):
        assert digest(PACKAGED[peer]().state_dict()) == DIGESTS[peer]


# the largest are left out: others have their backbones and their heads
COMPARED = PACKAGED.keys() - {"mmseg_deeplabv3_r50-d8", "mmseg_deeplabv3plus_r50-d8", "torchvision_resnet50"}


@pytest.mark.slow
@pytest.mark.parametrize("peer", sorted(COMPARED))
@torch.no_grad()
def test_a_packages_network(peer: str, tmp_path: Path) -> None:
    """Logits at its own output stride, and all-fine where that is 8; of classifiers all stages' features."""
    source, stride, network = peer.partition("_")[0], RECORDED[peer].stride, randomise(PACKAGED[peer]())
    options = {"source": source} | RECORDED[peer].options
    model = converted(network.state_dict(), tmp_path, source, **options).double()
    images = images_of(80, 112) if source == "smp" else images_of()  # which takes multiples of 16
    expected = logits_of(network.double(), images)
    if stride == 32:
        for ours, theirs in zip(features(model, images, 32), expected, strict=True):
            assert relative_error(ours, theirs) < TOLERANCE
        return
    assert relative_error(model.dense(images, stride), expected) < TOLERANCE
    if stride == 8:
        blocks = block_mask("full", (1, -(-images.shape[2] // 16), -(-images.shape[3] // 16)))
        assert relative_error(model(images, blocks), expected) < TOLERANCE


def logits_of(network: Any, images: Tensor) -> Any:
    """Of a classifier its stages' features."""
    if hasattr(network, "encode_decode"):
        return mmseg_logits(network, images)
    if hasattr(network, "fc"):
        grid = network.maxpool(torch.relu(network.bn1(network.conv1(images))))
        stages = [network.layer1, network.layer2, network.layer3, network.layer4]
        return [grid := stage(grid) for stage in stages]
    found = network(images)
    return found["out"] if isinstance(found, dict) else found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stride"), [("resnet18", 8), ("resnet18", 16), ("resnet18d", 8)])
@torch.no_grad()
def test_timms_dilated_networks(name: str, stride: int, tmp_path: Path) -> None:
    """The mean of its `d` variants keeps a window of one cell and counts zeros at the border: at output
    stride 8 it is another function than ours."""
    network: Any = randomise(timm(name))
    model = converted(network.state_dict(), tmp_path, "timm", source="timm").double()
    images = images_of(64, 96)
    create = package("timm").create_model
    dilated = create(name, features_only=True, output_stride=stride, out_indices=(1, 2, 3, 4))
    dilated.load_state_dict(network.state_dict(), strict=False)
    theirs, ours = dilated.double().eval()(images), features(model, images, stride)
    if not name.endswith("d"):
        assert all(relative_error(*pair) < TOLERANCE for pair in zip(ours, theirs, strict=True))
        return
    wide = network.double().forward_features(images)
    assert relative_error(ours[3][:, :, ::4, ::4], wide) < TOLERANCE
    assert relative_error(theirs[3][:, :, ::4, ::4], wide) > 1e-2


@pytest.mark.slow
@torch.no_grad()
def test_mmsegmentations_one_logit_has_its_threshold(tmp_path: Path) -> None:
    """Foreground from 0.3 on, as its own postprocessing takes it."""
    network: Any = randomise(mmseg("deeplabv3plus", 18, channels=32, logits=1)).double()
    images = images_of(64, 96)
    network.decode_head.conv_seg.bias -= mmseg_logits(network, images).median() + 0.4  # around 0.3 and 0.5
    model = converted(network.state_dict(), tmp_path, "mmseg").double()
    logits = mmseg_logits(network, images)
    classes = network.postprocess_result(logits)[0].pred_sem_seg.data[0]
    assert 0.1 < classes.mean() < 0.9
    assert ((logits > 0) != classes).any(), "0.5 would be another function"
    assert torch.equal(model.dense(images, 8).argmax(1)[0], classes.long())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnetblur18", "resnetaa34d"])
def test_timms_anti_aliasing_has_no_tensors(name: str, tmp_path: Path) -> None:
    """So files of such networks are refused by their names, and what is assumed of the others is said."""
    with torch.device("meta"):
        networks = timm(name), timm(name.replace("blur", "").replace("aa", ""))
    assert networks[0].state_dict().keys() == networks[1].state_dict().keys()
    torch.save(networks[0].to_empty(device="cpu").state_dict(), tmp_path / f"{name}-84f4748f.pth")
    with pytest.raises(CheckpointError, match=rf"it is timm's {name} by its name: that it pools before stri"):
        convert(tmp_path / f"{name}-84f4748f.pth", allow_missing=["head"])
