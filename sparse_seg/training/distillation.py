"""Distillation from a trained teacher: class probabilities and pairwise similarity of sites."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.checkpoint import Checkpoint, load, network_of
from sparse_seg.checkpoint.pickled import load_pickled, save_pickled
from sparse_seg.config import Config, num_classes
from sparse_seg.errors import CheckpointError, ConfigError
from sparse_seg.run.exits import last_exit
from sparse_seg.run.way import Way
from sparse_seg.sites import Grid
from sparse_seg.training.losses import divergence

CONTENT = 3  # which kind of outputs a file holds; another number for another kind
MOST_SITES = 1024  # per image whose likeness is compared: pairs grow with the square


class TeacherOutputs(NamedTuple):
    """Logits `[B, K, h, w]`, and the features `[B, C, h', w']` that the last late value is made of
    (`run/exits.py`)."""

    logits: Tensor
    features: Tensor


class Teacher:
    """A trained network, run dense, in eval mode and without gradients; outputs are rounded to float16.

    Images come as the student's normalisation leaves them, and are brought to the teacher's own.

    Args:
        path: its checkpoint (of our training, or converted).
        config: of the student, which must fit it.
        cache: folder to keep outputs in, one file per image. Files are named by the image's values and the
            teacher's, so that any change makes new ones, and runs whose samples are the same share them. One
            holds `2 * (K + C) * h * w` bytes.
        device: where to run.

    Raises:
        CheckpointError: missing or foreign file.
        ConfigError: another number of classes or upsampling offset than the student's.
    """

    def __init__(
        self,
        path: str | Path,
        config: Config,
        cache: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        checkpoint = load(path)
        self.model = network_of(checkpoint).requires_grad_(False).to(device)
        _check_fits(checkpoint, config)
        self.cache = None if cache is None else Path(cache)
        self._digest = checkpoint.digest.encode()
        self._to_own = None
        if checkpoint.origin.normalisation:
            mean, std, own_mean, own_std = (
                torch.tensor(values, device=device)[:, None, None]
                for values in (config.data.mean, config.data.std, checkpoint.mean, checkpoint.std)
            )
            if not (torch.equal(mean, own_mean) and torch.equal(std, own_std)):
                self._to_own = std / own_std, (mean - own_mean) / own_std

    def __call__(self, images: Tensor, output_stride: int, grid_stride: int) -> TeacherOutputs:
        """Outputs for normalised images `[B, 3, H, W]`, in their dtype.

        Args:
            output_stride: to run at, px; a teacher without it runs at its finest.
            grid_stride: of the logits, px; those of another grid are interpolated in the middle of its cells.
        """
        if self.cache is None:
            outputs = self._run(images, output_stride, grid_stride)
        else:
            outputs = self._cached(images, (output_stride, grid_stride), self.cache)
        return TeacherOutputs(*(grid.to(images) for grid in outputs))

    @torch.no_grad()
    def _run(self, images: Tensor, output_stride: int, grid_stride: int) -> TeacherOutputs:
        if self._to_own is not None:
            scale, shift = self._to_own
            images = images * scale + shift
        strides = self.model.strides
        run = self.model.start(images)
        run.follow(Way.dense(output_stride if output_stride in strides else strides[0]))
        features: Grid = last_exit(run)[0]
        logits = run.grid_logits()
        if run.grid_stride != grid_stride:
            logits = run.upsample(logits, grid_stride)
        return TeacherOutputs(logits.half(), features.tensor.half())

    def _cached(self, images: Tensor, strides: tuple[int, int], cache: Path) -> TeacherOutputs:
        paths = [self._path(cache, image, strides) for image in images]
        found = {index: kept for index, path in enumerate(paths) if (kept := _read(path)) is not None}
        new = [index for index in range(len(paths)) if index not in found]
        if new:
            outputs = self._run(images[new], *strides)
            for index, logits, features in zip(new, *outputs, strict=True):
                found[index] = TeacherOutputs(logits.cpu().clone(), features.cpu().clone())
                save_pickled(paths[index], tuple(found[index]))
        ordered = [found[index] for index in range(len(paths))]
        with torch.autocast("cpu", enabled=False):  # which stacks no float16 beside bfloat16
            return TeacherOutputs(*(torch.stack(grids) for grids in zip(*ordered, strict=True)))

    def _path(self, cache: Path, image: Tensor, strides: tuple[int, int]) -> Path:
        content = hashlib.blake2b(self._digest, digest_size=16)
        kind = image.device.type
        mixed = f" {torch.get_autocast_dtype(kind)}" if torch.is_autocast_enabled(kind) else ""
        content.update(f"{CONTENT} {strides} {image.dtype}{mixed} {list(image.shape)}".encode())
        content.update(image.cpu().contiguous().numpy().data)
        name = content.hexdigest()
        return cache / name[:2] / f"{name}.pt"


def _read(path: Path) -> TeacherOutputs | None:
    """A kept file; None where there is none or it is damaged, and the teacher has to run."""
    try:
        return TeacherOutputs(*load_pickled(path))
    except (OSError, CheckpointError, TypeError):
        return None


def _check_fits(teacher: Checkpoint, config: Config) -> None:
    own, path = teacher.config, teacher.path
    values: list[tuple[str, Any, Any]] = [("classes", own.num_classes, num_classes(config))]
    if own.module is None and config.model.module is None:
        values.append(("model.trained_stride", own.trained_stride, config.model.trained_stride))
    for name, own, students in values:
        if own != students:
            raise ConfigError(
                f"train.distill.teacher {path} has {name} {own}, but the config {students}; they must agree"
            )


def logits_divergence(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Mean Kullback-Leibler divergence of class probabilities (Hinton et al., 2015), times temperature^2.

    Args:
        student, teacher: logits `[B, K, h, w]`.
        weights: of the cells, `[B, h, w]`.
    """
    cells = divergence(student, teacher, temperature)
    return temperature**2 * (cells * weights).sum() / weights.sum()


def likeness_difference(student: Tensor, teacher: Tensor, is_site: Tensor, weights: Tensor) -> Tensor:
    """How much the cosine likeness of pairs of sites differs between two networks: its mean square.

    Pair-wise distillation (Liu et al., CVPR 2019). It compares the sites that the student has, whatever the
    networks' channels are, and needs no layer of its own. Of each image at most `MOST_SITES`, evenly chosen.

    Args:
        student, teacher: grids `[B, C, h, w]` and `[B, C', h, w]`.
        is_site: which cells are sites of the student, bool `[B, h, w]`.
        weights: of the cells, `[B, h, w]`; a pair counts with the product of its sites' weights.
    """
    total, weight = student.new_zeros((), dtype=torch.float32), weights.new_zeros(())
    for image, sites in enumerate(is_site.flatten(1)):
        cells = sites.nonzero().squeeze(1)
        cells = cells[:: -(-cells.shape[0] // MOST_SITES)]
        grids = student[image].flatten(1), teacher[image].flatten(1)
        own, other = (F.normalize(grid.index_select(1, cells).t().float()) for grid in grids)
        at = weights[image].flatten()[cells]
        pairs = at[:, None] * at
        total = total + (pairs * (own @ own.T - other @ other.T).square()).sum()
        weight = weight + pairs.sum()
    return total / weight
