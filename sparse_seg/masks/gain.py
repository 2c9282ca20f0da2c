"""Blocks where a fine look is expected to help."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.masks.base import PolicyInput
from sparse_seg.masks.confidence import entropy
from sparse_seg.masks.learned import NetPolicy

HIDDEN = 24  # channels: with 11 classes 0.6 % of a light network's multiply-adds at f = 0.15


class GainPolicy(NetPolicy):
    """A block's score is by how much a net expects its share of right pixels to rise when it becomes fine.

    The net looks at the coarse pass's prediction, which the run then refines. A score is a gain, so a
    threshold has a meaning: 0 makes fine what is expected to gain at all, and one threshold for a whole data
    set spends more on hard frames. `training/gain.py` fits the net to a network that stays as it is.

    Args:
        net: what `read` gives, `[B, K + 2, Hc, Wc]`, to scores `[B, 1, Hc, Wc]`; `gain_net` makes it.
    """

    ranks_refinement = True
    sample = 4  # px between the places of a block at which the prediction is looked at

    @classmethod
    def make_net(
        cls, features: int, factor: int, classes: int, learned_net: Callable[..., nn.Module]
    ) -> nn.Module:
        return gain_net(classes)

    def scores(self, run: PolicyInput) -> Tensor:
        dtype = next((weight.dtype for weight in self.parameters()), torch.float32)
        return self.net(self.read(run.coarse_logits(self.sample)).to(dtype)).float().squeeze(1)

    @torch.no_grad()
    def read(self, logits: Tensor) -> Tensor:
        """Of logits `[B, K, h, w]`, at every `sample`-th pixel, each block's mean class probabilities, mean
        entropy and largest entropy (nats): `[B, K + 2, Hc, Wc]`."""
        logits = logits.float()
        uncertainty = entropy(logits)[:, None]
        cells, (height, width) = self.block // self.sample, (int(n) for n in logits.shape[2:])
        missing = (0, -width % cells, 0, -height % cells)
        values = F.pad(torch.cat([logits.softmax(1), uncertainty], 1), missing)
        known = F.avg_pool2d(F.pad(torch.ones_like(uncertainty), missing), cells)
        largest = F.max_pool2d(values[:, -1:], cells)  # no entropy is below the padding's 0
        return torch.cat([F.avg_pool2d(values, cells) / known, largest], 1)

    def macs(self, size: tuple[int, int], stride: int, batch: int) -> int:
        """Of the net's convolutions, on the grid of blocks."""
        factor = self.block // stride
        return super().macs((-(-size[0] // factor), -(-size[1] // factor)), self.block, batch)


def gain_net(classes: int, hidden: int = HIDDEN) -> nn.Sequential:
    """Two 3x3 convolutions and a 1x1 on the grid of blocks, behind a normalisation of what they read."""
    return nn.Sequential(
        nn.BatchNorm2d(classes + 2, affine=False),
        nn.Conv2d(classes + 2, hidden, 3, padding=1),
        nn.ReLU(),
        nn.Dropout2d(0.2),
        nn.Conv2d(hidden, hidden, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(hidden, 1, 1),
    )
