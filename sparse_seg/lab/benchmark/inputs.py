"""What a benchmark feeds a network: rendered scenes, and statistics that keep random weights in order."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sparse_seg.config import Config
from sparse_seg.data.cityscapes import Cityscapes
from sparse_seg.data.dataset import IGNORE_INDEX
from sparse_seg.data.scenes import render_scene
from sparse_seg.data.transforms import normalise
from sparse_seg.run.segmentor import Segmentor


def scenes(config: Config, size: tuple[int, int], batch: int) -> tuple[Tensor, Tensor]:
    """Rendered street scenes: normalised images `[B, 3, H, W]` and train ids `[B, H, W]` (int64)."""
    data, ids = config.data, np.full(256, IGNORE_INDEX)
    for label_id, train_id in Cityscapes.train_ids.items():
        ids[label_id] = train_id
    pairs = [render_scene(np.random.default_rng(seed), size) for seed in range(batch)]
    images = torch.stack([normalise(image, data.mean, data.std) for image, _ in pairs])
    labels = torch.stack([torch.from_numpy(ids[label].astype(np.int64)) for _, label in pairs])
    classes = config.model.num_classes
    return images, labels if classes is None else labels.where(labels < classes, IGNORE_INDEX)


@torch.no_grad()
def randomise_norms(model: Segmentor, seed: int = 0) -> None:
    """Statistics of every batch norm near those of its activations, so that these keep order one."""
    generator = torch.Generator().manual_seed(seed)
    module = model.module.train()  # the dense network that was captured
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    module(torch.randn(2, 3, *model.graph.size, generator=generator))
    for norm in norms:
        assert norm.running_var is not None
        norm.running_var.mul_(torch.rand(norm.num_features, generator=generator) + 0.5).add_(0.05)
        norm.momentum = 0.1
    model.eval()
