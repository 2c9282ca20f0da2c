"""Reading leaves a module as it was; and what its code may do on the way (`sparse_seg/graph/reading.py`)."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg import load_model, save_model, selective
from sparse_seg.errors import SparseSegError
from sparse_seg.graph import logits_of
from tests.graph.toys import Toy
from tests.reference import relative_error

SIZE = (64, 64)


class Keeping(Toy):
    """Keeps what it computes of its parameters at the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.rand(8, 1, 1)
        self.kept: Tensor | None = None

    def body(self, images: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.scale * 2
        return super().body(images) * self.kept


class Placing(Toy):
    """Makes and moves tensors where the images are, and casts them as the images are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(3, 1, 1))

    def body(self, images: Tensor) -> Tensor:
        std = torch.tensor([0.5, 0.25, 0.5], device=images.device, dtype=images.dtype).view(3, 1, 1)
        mean: Any = self.mean
        images = (images - mean.to(images.device) * 2) / std * images.new_tensor([2.0])
        with torch.autocast(images.device.type, enabled=False):
            return super().body(images + mean.type_as(images).exp())


class Maximum(Toy):
    """Attention of channels by their maximum (CBAM), and by a convolution over them (ECA)."""

    def __init__(self) -> None:
        super().__init__()
        self.over = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def body(self, images: Tensor) -> Tensor:
        x = super().body(images)
        x = x * F.adaptive_max_pool2d(x, 1).sigmoid()
        return x * self.over(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1).sigmoid()


class Scripted(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.b: Any = torch.jit.script(self.b)


@pytest.mark.parametrize("kind", [Keeping, Placing, Maximum, Scripted])
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_its_code_may_do_this_and_it_trains_afterwards(kind: type[Toy]):
    module, images = kind().double().eval(), torch.randn(1, 3, 64, 96).double()
    with torch.autocast("cpu", torch.bfloat16):
        network = selective(module, size=SIZE)
    with torch.no_grad():
        expected = logits_of(module(images))
        assert relative_error(network.dense(images, 8), expected) < 1e-12
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
    module.train()(images).square().sum().backward()


def test_efficient_channel_attention_in_a_file(tmp_path):
    network, images = selective(Maximum().eval(), size=SIZE), torch.randn(1, 3, 64, 96)
    save_model(network, tmp_path / "net.safetensors")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "net.safetensors")(images), network(images))


def test_norms_of_another_size_are_refused(tmp_path):
    network = selective(Toy().eval(), size=SIZE)
    for name in ("weight", "running_var"):
        setattr(network.module.norm, name, nn.Parameter(torch.ones(16), requires_grad=False))
    save_model(network, tmp_path / "net.safetensors")
    with pytest.raises(SparseSegError, match=r"is \[16\], not \[8\]"):
        load_model(tmp_path / "net.safetensors")


def test_another_thread_may_run_the_module_meanwhile():
    module, ended = Toy().eval(), threading.Event()
    layers = [node.layer for node in selective(module, size=SIZE).graph.nodes]

    def run() -> None:
        with torch.no_grad():
            while not ended.is_set():
                module(torch.zeros(1, 3, 64, 64))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(5):
            assert [node.layer for node in selective(module, size=SIZE).graph.nodes] == layers
    finally:
        ended.set()
        thread.join()
