"""What a run waits for on a CUDA device: operators whose result the host needs before it goes on."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_seg.run.way import Way
from tests.reference import random_model
from tests.run.test_levels import random_images

WAITING = ("aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::unique")


class Waits(TorchDispatchMode):
    """Notes those operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith(WAITING):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("policy", ["edge", "confidence"])
@pytest.mark.parametrize("exchange", ["linear", "none"])
def test_a_fixed_number_of_fine_blocks(
    exchange: str, policy: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine gather waits once, for the number of cells around fine blocks that need ghosts."""
    monkeypatch.setattr("sparse_seg.run.passes.warn_of_bytes", lambda images: None)  # of the CPU alone
    model, images = random_model(), random_images((64, 96)).float()
    model.train(training)
    way = Way.policy(policy, 0.3, exchange=exchange)
    model.start(images).follow(way).logits()  # tables are made
    with Waits() as waits:
        run = model.start(images).follow(way)
        run.logits()
    assert waits.names == ["aten::nonzero"] * (exchange == "linear")
    if run.mask is not None and not training:  # in training dropout differs
        assert torch.equal(model.start(images).take(run.mask, way).logits(), run.logits())
