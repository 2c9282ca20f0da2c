"""Fit a mask to the gain of fine blocks, on a network that stays as it is.

For frames of the training set and random clustered masks: by how much does the share of right pixels rise in
each fine block, against the coarse pass? A small net learns to tell by the coarse pass's prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.config import DataConfig
from sparse_seg.data.batches import evaluation_loader
from sparse_seg.data.dataset import IGNORE_INDEX, SegmentationDataset
from sparse_seg.masks import block_mean, blur_scores, gain_net, top_blocks
from sparse_seg.masks.gain import GainPolicy
from sparse_seg.progress import bar
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way

FRACTIONS = (0.2, 0.35)  # of fine blocks, in the masks that are tried on each frame
EPOCHS, BATCH, RATE, DECAY = 16, 16, 2e-3, 0.05


class Sample(NamedTuple):
    """Of a frame under a mask: what the net reads, `[K + 2, Hc, Wc]`; the rise in the share of right pixels,
    `[Hc, Wc]`, in blocks that are fine, bool `[Hc, Wc]`."""

    read: Tensor
    gain: Tensor
    fine: Tensor


@torch.inference_mode()
def collect(
    model: SelectiveNetwork,
    dataset: SegmentationDataset,
    data: DataConfig,
    labelled: bool = True,
    limit: int | None = None,
    seed: int = 0,
    merge: str = "patch",
) -> list[Sample]:
    """Run a network on the frames of a dataset under random masks.

    Args:
        labelled: measure right pixels by the labels; else by the network's own dense prediction at the finest
            stride, where pixels without a label count, too.
        limit: take the first so many frames.
    """
    policy = GainPolicy(fine_fraction=0.0, net=nn.Identity(), block=model.strides[-1])
    generator, samples = torch.Generator().manual_seed(seed), list[Sample]()
    device = model.device
    count = len(dataset) if limit is None else min(limit, len(dataset))
    loader = evaluation_loader(dataset, data, range(count))
    for image, label, _ in bar(loader, "gains", count):
        run = model.start(image.to(device)).start_coarse()
        read, coarse = policy.read(run.coarse_logits(policy.sample)), run.classes()
        truth = label.to(device) if labelled else run.dense_classes()[0]
        before = right(coarse, truth)
        for fraction in FRACTIONS:
            mask = clusters((read.shape[2], read.shape[3]), fraction, generator)
            fine = run.fork().take(mask.to(device), Way(merge=merge)).classes()
            gain = block_mean(right(fine, truth) - before, policy.block)[0]
            samples.append(Sample(read[0].cpu().clone(), gain.cpu().clone(), mask[0]))
    return samples


def right(classes: Tensor, truth: Tensor) -> Tensor:
    """1 where classes `[B, H, W]` are the true ones; 0 elsewhere, without a label, too."""
    return ((classes == truth) & (truth != IGNORE_INDEX)).float()


def clusters(size: tuple[int, int], fraction: float, generator: torch.Generator) -> Tensor:
    """A random mask bool `[1, Hc, Wc]` whose fine blocks mostly lie together, as those of a policy do."""
    noise = torch.randn(2, *size, generator=generator)
    return top_blocks((2 * blur_scores(noise[:1]) + 0.3 * noise[1:]), fraction)


@torch.enable_grad()
def fit(
    samples: Sequence[Sample], seed: int = 0, epochs: int = EPOCHS, bn_eps: float = 1e-5
) -> nn.Sequential:
    """A net for `GainPolicy`, in eval mode, that predicts the gains of fine blocks (smooth L1, AdamW).

    bn_eps: of the network that it is for, which `build_model` gives the net, too.
    """
    torch.manual_seed(seed)
    height, width = (max(sample.fine.shape[axis] for sample in samples) for axis in (0, 1))
    reads, gains, fine = (
        torch.stack([F.pad(t.float(), (0, width - t.shape[-1], 0, height - t.shape[-2])) for t in part])
        for part in zip(*samples, strict=True)
    )
    scale = gains[fine > 0].std().clamp(min=1e-6)
    net = gain_net(reads.shape[1] - 2)
    norm: Any = net[0]
    norm.eps = bn_eps
    last: Any = net[-1]
    values = torch.cat([sample.read.flatten(1) for sample in samples], 1)
    norm.running_mean.copy_(values.mean(1))
    norm.running_var.copy_(values.var(1))
    net.train()
    norm.eval()
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=DECAY)
    for _ in range(epochs):
        for batch in torch.randperm(len(reads)).split(BATCH):
            parts = reads[batch], gains[batch] / scale, fine[batch]
            x, y, weight = (part.flip(-1) for part in parts) if torch.rand(()) < 0.5 else parts
            loss = F.smooth_l1_loss(net(x).squeeze(1), y, reduction="none")
            optimizer.zero_grad()
            ((loss * weight).sum() / weight.sum().clamp(min=1)).backward()
            optimizer.step()
    with torch.no_grad():
        last.weight.mul_(scale)
        last.bias.mul_(scale)
    return net.eval()
