"""Networks drawn at random, of families of operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from tests.graph.layers import (
    Arithmetic,
    Drawn,
    Last,
    Layer,
    Radix,
    attended,
    averaged,
    joined,
    randomise,
    shuffled,
)

Draw = Callable[[Any], Any]
ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU, lambda: nn.ReLU(inplace=True), nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.GELU,
    nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.Mish, nn.Softplus, nn.PReLU, lambda: nn.Hardtanh(-0.5, 2.0),
)  # fmt: skip


class Builder:
    """Adds layers, with options from `draw`."""

    def __init__(self, draw: Draw, training: bool = False) -> None:
        self.draw, self.training = draw, training
        self.layers = [Layer("image", "image", (), 3, 1)]

    def one_of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def add(
        self, kind: str, *inputs: Layer, channels: int | None = None, stride: int | None = None, **rest: Any
    ) -> Layer:
        first = inputs[0]
        made = Layer(
            f"n{len(self.layers)}", kind, tuple(one.name for one in inputs),
            first.channels if channels is None else channels,
            first.stride if stride is None else stride, **rest,
        )  # fmt: skip
        self.layers.append(made)
        return made

    # -- layers --------------------------------------------------------------------------------------------

    def act(self, x: Layer) -> Layer:
        return self.add("place", x, module=self.one_of(*ACTIVATIONS)())

    def norm(self, x: Layer) -> Layer:
        return self.add("norm", x, module=nn.BatchNorm2d(x.channels, affine=self.one_of(True, True, False)))

    def norm_act(self, x: Layer) -> Layer:
        return self.act(self.norm(x)) if self.one_of(True, True, False) else self.act(x)

    def point(self, x: Layer, channels: int, groups: int = 1) -> Layer:
        module = nn.Conv2d(x.channels, channels, 1, groups=groups, bias=self.one_of(True, False))
        return self.add("place", x, channels=channels, module=module)

    def conv(
        self, x: Layer, channels: int, kernel: tuple[int, int] = (3, 3), dilation: int = 1, step: int = 1,
        groups: int = 1, padding: Any = None, before: nn.Module | None = None, own_pad: bool = True,
    ) -> Layer:  # fmt: skip
        dilations = dilation, dilation
        centre = [d * (k - 1) // 2 for k, d in zip(kernel, dilations, strict=True)]
        inner = tuple(centre) if padding is None and own_pad and before is None else 0
        module = nn.Conv2d(
            x.channels, channels, kernel, step, inner, dilations, groups, self.one_of(True, False)  # type: ignore[arg-type]
        )  # fmt: skip
        return self.add(
            "conv", x, channels=channels, stride=x.stride * step, module=module, kernel=kernel,
            dilation=dilations, step=step, before=before,
            padding=tuple(centre) if padding is None else padding,
        )  # fmt: skip

    def plus(self, a: Layer, b: Layer) -> Layer:
        return self.add("place", a, b, call=torch.add)

    def cat(self, *parts: Layer) -> Layer:
        grid = next(one for one in parts if one.stride)
        return self.add(
            "place", *parts, channels=sum(one.channels for one in parts), stride=grid.stride,
            call=joined,
        )  # fmt: skip

    def cut(self, x: Layer, start: int, stop: int) -> Layer:
        return self.add(
            "place",
            x,
            channels=stop - start,
            call=lambda x: torch.split(x, stop - start, 1)[start // (stop - start)],
        )

    def vector(self, x: Layer) -> Layer:
        return self.add("mean", x, stride=0)

    def gate(self, x: Layer) -> Layer:
        """Squeeze-and-excite."""
        squeezed = nn.Sequential(
            nn.Conv2d(x.channels, 4, 1), nn.SiLU(), nn.Conv2d(4, x.channels, 1), nn.Sigmoid()
        )
        scale = self.add("vector", self.vector(x), module=squeezed)
        return self.add("place", x, scale, call=torch.mul)

    # -- a unit of each family, from 8 channels to 8 -------------------------------------------------------

    def convolution(self, x: Layer, dilation: int) -> Layer:
        kernel = self.one_of((3, 3), (5, 5), (3, 1), (1, 5), (5, 3), (7, 3))
        return self.norm_act(self.conv(x, 8, kernel, dilation))

    def groups(self, x: Layer, dilation: int) -> Layer:
        kernel, groups, width = (
            self.one_of((3, 3), (5, 5)),
            self.one_of(2, 4, "depthwise"),
            self.one_of(8, 16),
        )
        x = self.norm_act(self.point(x, 8, self.one_of(1, 2)))
        count = 8 if groups == "depthwise" else groups
        return self.point(self.norm_act(self.conv(x, width, kernel, dilation, groups=count)), 8)

    def padding(self, x: Layer, dilation: int) -> Layer:
        """Taps that are not around the centre, and constants outside the image."""
        form = self.one_of("uneven", "same", "outside", "outside depthwise")
        if form == "uneven":
            extent = 2 * dilation
            above, left = (self.one_of(*range(0, extent + 1, dilation)) for _ in range(2))
            return self.norm_act(self.conv(x, 8, (3, 3), dilation, padding=(above, left)))
        if form == "same":
            return self.norm_act(self.conv(x, 8, self.one_of((3, 3), (5, 5)), dilation, padding="same"))
        norm = [] if self.training else [nn.BatchNorm2d(8)]
        if form == "outside":
            before = nn.Sequential(nn.Conv2d(8, 8, 1, bias=self.one_of(True, False)), *norm, nn.Hardswish())
            return self.norm_act(self.conv(x, 8, (3, 3), dilation, before=before))
        before = nn.Sequential(*norm, nn.Sigmoid())
        return self.act(self.conv(x, 8, (3, 3), dilation, groups=8, before=before))

    def gates(self, x: Layer, dilation: int) -> Layer:
        return self.gate(self.norm_act(self.conv(x, 8, (3, 3), dilation, groups=self.one_of(1, 8))))

    def channels(self, x: Layer, dilation: int) -> Layer:
        form = self.one_of("shuffle", "res2net", "split attention", "mean")
        if form == "shuffle":
            kept, other = self.cut(x, 0, 4), self.cut(x, 4, 8)
            other = self.norm_act(self.conv(other, 4, (3, 3), dilation, groups=4))
            return self.add("place", self.cat(kept, other), call=shuffled)
        if form == "res2net":
            first, second = self.cut(x, 0, 4), self.cut(x, 4, 8)
            first = self.act(self.conv(first, 4, (3, 3), dilation))
            second = self.act(self.conv(self.plus(first, second), 4, (3, 3), dilation))
            return self.cat(first, second)
        if form == "mean":
            return self.add("place", self.conv(x, 16, (3, 3), dilation), channels=8, call=averaged)
        x = self.norm_act(self.conv(x, 16, (3, 3), dilation, groups=2))
        pooled = self.vector(self.add("place", x, channels=8, call=lambda x: sum(torch.split(x, 8, 1))))
        weights = self.add("vector", pooled, channels=16, module=nn.Sequential(nn.Conv2d(8, 16, 1), Radix()))
        return self.add("place", x, weights, channels=8, call=attended)

    def places(self, x: Layer, dilation: int) -> Layer:
        x = self.conv(x, 8, (3, 3), dilation, groups=8)
        if self.one_of(True, False):
            return self.add("place", x, module=Last())
        return self.add("place", x, module=Arithmetic())

    def pooling(self, x: Layer, dilation: int) -> Layer:
        x = self.act(self.conv(x, 8, (3, 3), dilation))
        if dilation == 1 and self.one_of(True, False):
            inner = self.one_of(True, False)
            return self.add(
                "avg", x, kernel=(3, 3), padding=(1, 1), options={"outside": inner},
                call=lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=inner),
            )  # fmt: skip
        return self.add(
            "max", x, kernel=(3, 3), dilation=(dilation, dilation), padding=(dilation, dilation),
            call=lambda x: F.max_pool2d(F.pad(x, [dilation] * 4, value=-torch.inf), 3, 1, 0, dilation),
        )  # fmt: skip

    def resizing(self, x: Layer, dilation: int) -> Layer:
        return self.convolution(x, dilation)  # what is resized comes behind

    # -- a network -----------------------------------------------------------------------------------------

    def halved(self, x: Layer, family: str) -> Layer:
        """Half the size."""
        form = self.one_of("conv", "depthwise", "pointwise", "max", "average", "same")
        if form == "max" and x.stride > 1:
            return self.add(
                "max", x, stride=2 * x.stride, kernel=(3, 3), step=2, padding=(1, 1),
                call=lambda x: F.max_pool2d(x, 3, 2, 1),
            )  # fmt: skip
        if form == "average" and x.stride > 1:  # as the shortcuts of ResNet-D
            pooled = self.add(
                "avg", x, stride=2 * x.stride, kernel=(2, 2), step=2, options={"outside": False},
                call=lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False),
            )  # fmt: skip
            return self.act(self.point(pooled, 8))
        if form == "depthwise" and x.channels == 8:
            return self.norm_act(self.conv(x, 8, self.one_of((3, 3), (5, 5)), step=2, groups=8))
        if form == "pointwise" and x.stride > 1:
            before = self.act(self.conv(x, 8))
            module = nn.Conv2d(8, 8, 1, 2, bias=False)
            return self.norm(self.add("conv", before, stride=2 * x.stride, step=2, module=module))
        if form == "same" or family == "padding":
            return self.norm_act(self.conv(x, 8, self.one_of((3, 3), (2, 2), (5, 5)), step=2, padding="same"))
        return self.norm_act(self.conv(x, 8, (3, 3), step=2))

    def network(self, family: str, mixing: bool = False) -> Drawn:
        own, x, early = self.one_of(8, 16), self.layers[0], None
        while x.stride < own:
            x = self.halved(x, family)
            early = x if x.stride == 4 else early
        assert early is not None
        dilations = [1, self.one_of(2, 4), 2]
        if self.one_of(True, False):
            dilations.insert(1, 1)
        if mixing:
            dilations.insert(-1, 1)
        for dilation in dilations:
            unit = getattr(self, family if family != "all" else self.one_of(*FAMILIES))(x, dilation)
            x = self.plus(x, unit) if self.one_of(True, False) else unit
        if family in ("gates", "all") and self.one_of(True, False):  # the image pooling of ASPP
            pooled = self.add(
                "vector", self.vector(x), channels=4, module=nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU())
            )
            x = self.act(self.point(self.cat(x, pooled), 8))
        if family in ("resizing", "all"):
            x = self._decoder(x, early)
        elif self.one_of(True, False):
            x = self.act(self.conv(x, 8))
        x = self.point(x, 5)
        if self.one_of(True, False):
            x = self.add("resize", x, stride=1, options={"align_corners": self.one_of(True, False)})
        return Drawn(self.layers)

    def _decoder(self, x: Layer, early: Layer) -> Layer:
        options = self.one_of({"align_corners": True}, {"align_corners": False}, {"nearest": True})
        x = self.add("resize", x, stride=4, options=options)
        if self.one_of(True, False):
            x = self.cat(x, self.act(self.point(early, 4)))
        return self.norm_act(self.conv(x, 8))


FAMILIES = ("convolution", "groups", "padding", "gates", "channels", "places", "pooling")


def draw_network(draw: Draw, family: str, training: bool = False, mixing: bool = False) -> Drawn:
    """A network in float64, with statistics of its own; in eval mode."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    network = Builder(draw, training).network(family, mixing).double()
    randomise(network)
    return network.eval()
