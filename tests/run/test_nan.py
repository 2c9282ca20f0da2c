"""The fast form hides no NaN that the plain one shows, wherever it arises."""

import pytest
import torch
from torch import Tensor

from sparse_seg import build_model
from sparse_seg.run.network import SelectiveNetwork
from tests.reference import randomise

MASK = torch.rand(1, 6, 8, generator=torch.Generator().manual_seed(0)) < 0.3


def network(backbone: str, head: str) -> SelectiveNetwork:
    torch.manual_seed(0)
    model = build_model({"backbone": backbone, "head": head, "width": 0.125, "num_classes": 5})
    randomise(model)
    return model.eval()


def all_ways(model: SelectiveNetwork, images: Tensor) -> list[Tensor]:
    refined = model.start(images).start_coarse().take(MASK)
    return [model.dense(images, 8), model(images, MASK), refined.logits(), *model.refine(images, [0, 0.2])]


@pytest.mark.parametrize(("backbone", "head"), [("resnet18", "lite"), ("resnet50", "deeplabv3")])
@pytest.mark.parametrize("fault", ["pixel", "infinite pixel", "overflow in layer1", "overflow in layer4"])
@torch.no_grad()
def test_not_finite(fault: str, backbone: str, head: str) -> None:
    model, images = network(backbone, head), torch.randn(1, 3, 96, 128)
    if "pixel" in fault:
        images[0, 0, 40, 40] = torch.nan if fault == "pixel" else torch.inf
    else:  # infinity minus infinity behind it: NaN that arises inside, from finite weights and images
        model.get_parameter(f"module.backbone.{fault[-6:]}.0.bn1.weight").mul_(1e38)
    plain, fast = all_ways(model, images), all_ways(model.for_inference(), images)
    for expected, found in zip(plain, fast, strict=True):
        assert not expected.isfinite().all()
        assert torch.equal(found.isfinite(), expected.isfinite())


def test_fast_networks_do_not_train_and_stay_as_they_are() -> None:
    fast = network("resnet18", "lite").for_inference()
    assert fast.for_inference() is fast
    assert not fast.eval().training
    with pytest.raises(ValueError, match="cannot train: train the one it was made of"):
        fast.train()
