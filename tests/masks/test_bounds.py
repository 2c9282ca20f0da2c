"""The oracle policy's bounds by the dense network, `change` and `gain`, against loops over pixels."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_seg import build_model
from sparse_seg.masks import OraclePolicy, block_shape, top_blocks
from sparse_seg.run.network import SelectiveNetwork
from tests.masks.test_policies import frames
from tests.reference import randomise, relative_error


def bounded_model(rule: str, **settings: Any) -> SelectiveNetwork:
    torch.manual_seed(0)
    mask = {"policy": "oracle", "oracle": rule, "fine_fraction": 0.25, "middle_fraction": 0.3}
    model = build_model({"width": 0.125, "num_classes": 5, "head_channels": 16, "mask": mask} | settings)
    randomise(model)
    return model.eval()


def batch(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images, and labels of which a fifth is ignored."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 5, (2, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    return torch.randn(2, 3, *size, generator=generator), labels


def slow_scores(rule: str, fine: Tensor, coarse: Tensor, labels: Tensor, block: int, ignored: int) -> Tensor:
    """Pixel by pixel, over all places of a block."""
    scores = torch.zeros(block_shape(labels[:, None], block))
    one, other, true = fine.tolist(), coarse.tolist(), labels.tolist()
    for b, y, x in np.ndindex(*labels.shape):
        if rule == "change":
            value = int(one[b][y][x] != other[b][y][x])
        elif true[b][y][x] == ignored:
            value = 0
        else:
            value = int(one[b][y][x] == true[b][y][x]) - int(other[b][y][x] == true[b][y][x])
        scores[b, y // block, x // block] += value / block**2
    return scores


@pytest.mark.parametrize(("block", "size"), [(16, (32, 48)), (16, (33, 47)), (32, (49, 81))], ids=str)
@pytest.mark.parametrize(("rule", "ignored"), [("change", 255), ("gain", 255), ("gain", 2)])
def test_scores(rule: str, ignored: int, block: int, size: tuple[int, int]) -> None:
    labels = batch(size)[1]
    generator = torch.Generator().manual_seed(1)
    fine, coarse = (torch.randint(0, 5, labels.shape, generator=generator) for _ in range(2))
    coarse[0] = fine[0].where(torch.rand(size, generator=generator) < 0.7, coarse[0])
    policy = OraclePolicy(0.3, ignore_index=ignored, rule=rule, block=block)
    scores = policy.class_scores(fine, coarse, labels)
    expected = slow_scores(rule, fine, coarse, labels, block, ignored)
    assert torch.allclose(scores, expected, atol=1e-6)
    assert len(expected.unique()) > 2
    assert policy.extra_repr() == f"fine_fraction=0.3, rule={rule}"


def test_change_needs_no_labels() -> None:
    fine, coarse = torch.tensor([[[1, 1]]]).expand(1, 32, 2), torch.ones(1, 32, 2, dtype=torch.int64)
    coarse[:, 20, 0] = 0
    assert OraclePolicy(0.5, rule="change").class_scores(fine, coarse, None).tolist() == [[[0], [1 / 256]]]
    with pytest.raises(ValueError, match=r"oracle policy \(gain\) reads labels: give them"):
        OraclePolicy(0.5, rule="gain")(frames(torch.zeros(1, 3, 32, 32)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "strides", "fast"),
    [("change", [8, 16], False), ("change", [8, 16, 32], True), ("gain", [4, 8, 16], True)],
    ids=str,
)
@torch.no_grad()
def test_segment(rule: str, strides: list[int], fast: bool) -> None:
    """The blocks that the dense networks differ in most; the result is the network's under that mask."""
    model, (images, labels) = bounded_model(rule, strides=strides), batch((70, 101))
    model = model.for_inference() if fast else model
    run = model.start(images, labels).follow()
    logits, chosen = run.logits(), run.mask
    assert chosen is not None
    fine, coarse = (model.dense(images, stride).argmax(1) for stride in (strides[0], strides[-1]))
    scores = slow_scores(rule, fine, coarse, labels, strides[-1], 255)
    assert (scores > 0).float().mean() > 0.25, "something to choose from"
    assert torch.equal(chosen, top_blocks(scores, 0.25, 0.3 if len(strides) == 3 else None))
    assert relative_error(logits, model(images, chosen)) < 1e-6
    if rule == "change":
        again = model.start(images).follow().mask
        assert again is not None
        assert torch.equal(again, chosen)
        levels = chosen.long()
        assert scores[levels == levels.max()].mean() > scores[levels == 0].max(), "really those that change"


def test_in_training_the_dense_networks_run_in_eval_mode() -> None:
    model, (images, labels) = bounded_model("change"), batch((64, 64))
    expected = model.start(images, labels).follow().mask
    found = model.train().start(images, labels).follow().mask
    assert expected is not None
    assert found is not None
    assert torch.equal(found, expected)
    assert model.training
