"""The backbone that CONTRIBUTING.md shows in full is one: dense, selective, refined, trained."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_seg import build_model
from sparse_seg.networks.encoder_decoder import build_module
from sparse_seg.registry import BACKBONES
from tests.reference import randomise, relative_error

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture
def shown() -> Iterator[None]:
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code is not None
    exec(textwrap.dedent(code[1]), {"nn": nn, "Tensor": Tensor, "BACKBONES": BACKBONES, "__name__": "shown"})
    yield
    del BACKBONES._parts["shown"]


def test_it_is_a_network(shown: None) -> None:
    settings = {"backbone": "shown", "num_classes": 5, "head_channels": 8, "backbone_options": {"wide": 8}}
    model: Any = build_model(settings)
    randomise(model)
    model = model.double().eval()
    images, mask = torch.randn(2, 3, 75, 98).double(), torch.rand(2, 5, 7) < 0.4
    with torch.no_grad():
        for stride in (8, 16):
            module = build_module(model.settings, stride).double().eval()
            module.load_state_dict(model.module.state_dict())
            assert relative_error(model.dense(images, stride), module(images)) < 1e-12
        assert relative_error(model(images, torch.ones_like(mask)), model.dense(images, 8)) < 1e-12
        refined = model.start(images).start_coarse().take(mask).logits()
        assert relative_error(refined, model(images, mask)) < 1e-12
    model.train()(images, mask).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
