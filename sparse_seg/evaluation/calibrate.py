"""A budget over a data set: the thresholds of a policy's scores that make a share of all blocks fine.

A fraction gives every frame the same number of fine blocks; a threshold gives hard frames more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.config import DataConfig
from sparse_seg.data.batches import evaluation_loader
from sparse_seg.data.dataset import SegmentationDataset
from sparse_seg.errors import ConfigError
from sparse_seg.masks import blur_scores
from sparse_seg.progress import bar
from sparse_seg.run.modes import eval_mode
from sparse_seg.run.network import SelectiveNetwork


@dataclass(frozen=True)
class Calibration:
    """What a data set asks for.

    Args:
        threshold: of the policy's scores; middle_threshold: with three strides.
        shares: of the blocks of each frame that are then fine.
    """

    threshold: float
    middle_threshold: float | None
    shares: list[float]


@torch.inference_mode()
def calibrate(
    model: SelectiveNetwork, dataset: SegmentationDataset, data: DataConfig, limit: int | None = None
) -> Calibration:
    """The thresholds that give the blocks of all frames together the fractions of the model's policy.

    Args:
        limit: take the first so many frames.

    Raises:
        ConfigError: the policy has a threshold already, or scores too alike to be cut near its fraction.
    """
    policy, scores = model.policy, list[Tensor]()
    if policy.fine_fraction is None:
        raise ConfigError("calibration needs a fraction: set model.mask.threshold=null, or --fine-fraction F")
    device = model.device
    count = len(dataset) if limit is None else min(limit, len(dataset))
    loader = evaluation_loader(dataset, data, range(count))
    with eval_mode(model):
        for image, label, _ in bar(loader, "scores", count):
            found = policy.scores(model.start(image.to(device), label.to(device)))
            scores.append((blur_scores(found) if policy.blur else found).flatten().double().cpu())
    ranked = torch.cat(scores).sort(descending=True).values
    threshold, middle = _cut(ranked, policy.fine_fraction), policy.middle_fraction
    lower = None if middle is None else _cut(ranked, policy.fine_fraction + middle)
    return Calibration(threshold, lower, [float((one > threshold).double().mean()) for one in scores])


def _cut(ranked: Tensor, share: float) -> float:
    """A threshold that the first `share` of the falling scores exceed, half way to the next score.

    Raises:
        ConfigError: equal scores at the cut leave no threshold within a tenth of the share.
    """
    values, counts = ranked.unique_consecutive(return_counts=True)
    cuts = torch.cat([values[:1], (values[:-1] + values[1:]) / 2, values[-1:] - 1])
    above = F.pad(counts.cumsum(0), (1, 0))  # how many scores exceed each cut
    wanted = round(share * len(ranked))
    place = (above - wanted).abs().argmin()
    reached = float(above[place]) / len(ranked)
    if abs(reached - share) > 0.1 * share + 1 / len(ranked):
        tied = float(ranked[min(wanted, len(ranked) - 1)])
        raise ConfigError(
            f"no threshold makes a share of {share:g} of the blocks fine: too many scores are {tied:g}; "
            f"the nearest share is {reached:.3g}. Choose a policy with finer scores, or blur"
        )
    return float(cuts[place])
