"""One image through a network: classes, blocks and what they mean."""

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from numpy.typing import NDArray
from torch import nn

from sparse_seg.checkpoint import load_model
from sparse_seg.data.dataset import Image
from sparse_seg.data.depth import find_depth
from sparse_seg.data.reading import read_image
from sparse_seg.data.transforms import normalise
from sparse_seg.errors import DataError
from sparse_seg.evaluation.views import ONCE, Prediction, Views, at_size, predict, scaled
from sparse_seg.export.runner import Runner
from sparse_seg.export.segmentor import RuntimeSegmentor
from sparse_seg.lab.report.overlays import overlay
from sparse_seg.run.card import Card
from sparse_seg.run.modes import eval_mode
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.refinement import Refined, refine
from sparse_seg.run.way import Way
from sparse_seg.timing import now

MANY = 100  # images, beside which three dense runs are few
Place = SelectiveNetwork | RuntimeSegmentor | Runner
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What a network sees in an image.

    Args:
        image: uint8 `[H, W, 3]` RGB.
        classes: uint8 `[H, W]`, positions in `names` and `colours`.
        levels: int64 `[ceil(H/s), ceil(W/s)]` for the coarsest stride s, 0 for that stride; None when dense.
        fine_blocks: bool, those at the finest stride; None when dense.
        strides: of the network, px, finest first.
        scales: factors on the image's sides at which the network saw it.
    """

    image: Image
    classes: NDArray[np.uint8]
    levels: NDArray[np.int64] | None
    fine_blocks: NDArray[np.bool_] | None
    strides: tuple[int, ...]
    card: Card
    scales: tuple[float, ...] = (1.0,)

    def __repr__(self) -> str:
        shares = [f"{name} {share:.0%}" for name, share in self.shares().items()]
        text = ", ".join(shares[:3]) + (f" and {len(shares) - 3} more" if len(shares) > 3 else "")
        blocks = "dense" if self.fine_blocks is None else f"{self.fine_blocks.mean():.0%} of the blocks fine"
        seen = "" if self.scales == (1.0,) else f"; seen at {', '.join(f'{one:.3g}' for one in self.scales)}"
        return f"Segmentation({self.classes.shape[0]}x{self.classes.shape[1]} px: {text}; {blocks}{seen})"

    @property
    def block(self) -> int:
        """Side of a block, px."""
        return self.strides[-1]

    @property
    def names(self) -> tuple[str, ...]:
        return self.card.names

    @property
    def colours(self) -> tuple[tuple[int, int, int], ...]:
        """RGB of each class."""
        return self.card.colours

    def overlay(self, alpha: float = 0.5) -> Image:
        """The image with the classes' colours over it at opacity `alpha`."""
        return overlay(self.image, self.classes, self.colours, alpha)

    def ids(self) -> Image:
        """The classes by the values that stand for them in label files."""
        return np.array(self.card.ids, np.uint8)[self.classes]

    def shares(self) -> dict[str, float]:
        """The share of the pixels that each class has, the largest first, without those that have none."""
        shares = np.bincount(self.classes.ravel(), minlength=len(self.names)) / self.classes.size
        order = np.argsort(-shares, kind="stable")
        return {self.names[number]: float(shares[number]) for number in order if shares[number]}


class ImageSegmenter:
    """A network made ready for images of bytes.

    Args:
        place: runs the network: itself, on its device, or what `in_runtime` made of it. The network's card
            gives mean, std and what the classes are.
        views: whole or through windows, with or without test-time augmentation. Where they name no scale, an
            image is scaled to the size of the network's training frames, if they are known.

    Attributes:
        frames, seconds: how many images went through the network, and how long they took there; what making
            graphs took is left out.
    """

    def __init__(self, place: Place, way: Way | None = None, views: Views = ONCE) -> None:
        self.place, self.way, self.views = place, way or Way(), views
        self.model = place if isinstance(place, SelectiveNetwork) else place.model
        self.policy = None if self.way.is_dense else place.policy_for(self.way)
        self.device, self.frames, self.seconds = self.model.device, 0, 0.0
        self._after = 0.0  # ms from the end of the last refinement to its result
        self._last: Image | None = None
        self.restart()

    def restart(self, frames: int | None = None) -> None:
        """What follows is another photo or video, and so many frames are still to come, if that is known: a
        policy that looks back forgets the last one."""
        if self.policy is not None:
            self.policy.remember(None)
        if isinstance(self.place, Runner):
            self.place.expect(frames)

    @functools.cached_property
    def card(self) -> Card:
        return self.model.card or Card.unnamed(self.model.num_classes)

    def batch(self, image: Image) -> torch.Tensor:
        """An image uint8 `[H, W, 3]` RGB as the network's input `[1, 3, H, W]`."""
        return normalise(image, self.card.mean, self.card.std)[None].to(self.device)

    def views_of(self, image: Image) -> Views:
        """How an image `[H, W, 3]` is looked at."""
        return self.views.at(self.card.scale_for(*image.shape[:2]))

    def __call__(self, image: Image) -> Segmentation:
        """Raises a ValueError for an image of a wrong shape or dtype, or smaller than 32x32."""
        if image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"an image must be [H, W, 3] uint8 RGB, got {list(image.shape)} {image.dtype}")
        self._last, batch, views = image, self.batch(image), self.views_of(image)
        with eval_mode(self.model), self._timed():
            found = predict(self.place, batch, None, self.way, self.policy, views)
        return self._result(image, found, views.factors)

    def follow(self, image: Image, milliseconds: float | None = None) -> Segmentation:
        """The next frame of a video, whose policy may look back.

        Args:
            milliseconds: refine the coarse prediction as long as this time allows, instead.
        """
        if milliseconds is None:
            return self(image)
        with torch.inference_mode(), eval_mode(self.model), self._timed():
            *_, last = self.refine(image, milliseconds=max(0.0, milliseconds - self._after))
            start = now(self.device)
            found = self.refined(image, last)
            self._after = 1000 * (now(self.device) - start)
        return found

    def refine(
        self, image: Image, fractions: Sequence[float] | None = None, milliseconds: float | None = None
    ) -> Iterator[Refined]:
        """Refine the coarse prediction of an image, whole and at the first of the views' scales; see
        `SelectiveNetwork.refine`. `refined` makes a segmentation of a step."""
        start = now(self.device)
        model = self.place.torch if isinstance(self.place, Runner) else self.model
        images, _ = scaled(self.batch(image), None, self.views_of(image).factors[0])
        if milliseconds is not None:
            milliseconds = max(0.0, milliseconds - 1000 * (now(self.device) - start))
        return refine(model, images, fractions, milliseconds)

    def refined(self, image: Image, step: Refined) -> Segmentation:
        """A step of `refine`, at the image's size."""
        height, width = image.shape[:2]
        found = at_size(
            step.logits, step.levels, step.logits.shape[2:], (height, width), self.model.strides[-1]
        )
        return self._result(image, found, self.views_of(image).factors[:1])

    def dense_seconds(self) -> float | None:
        """What the dense network at the finest stride takes for the last image, where that ran.

        None where that is not measured: the way is dense, the image was not seen whole and once, so few
        images ran that three more count, or a graph would have to be made.
        """
        image, times = self._last, list[float]()
        if image is None or self.way.is_dense or self.frames < MANY:
            return None
        views, way = self.views_of(image), Way.dense(self.model.strides[0])
        if not views.is_one_look or views.count_windows(*image.shape[:2]) > 1:
            return None
        place: Any = self.place.last if isinstance(self.place, Runner) else self.place
        run = place.start(scaled(self.batch(image), None, views.factors[0])[0]).follow(way)
        if isinstance(place, RuntimeSegmentor) and not place.find(run.options(not views.is_single)):
            return None
        with torch.inference_mode(), eval_mode(self.model):
            for _ in range(3):
                start, run = now(self.device), place.start(run.images).follow(way)
                (run.classes if views.is_single else run.logits)()
                times.append(now(self.device) - start)
        return min(times)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = now(self.device) - getattr(self.place, "seconds", 0.0)
        yield
        self.seconds += now(self.device) - getattr(self.place, "seconds", 0.0) - start
        self.frames += 1

    def _result(self, image: Image, found: Prediction, scales: tuple[float, ...]) -> Segmentation:
        strides = self.model.strides
        levels = None if found.levels is None else found.levels[0].cpu().numpy()
        fine = None if levels is None else levels == len(strides) - 1
        classes = found.classes[0].cpu().numpy().astype(np.uint8)
        return Segmentation(image, classes, levels, fine, tuple(strides), self.card, scales)


def segment(
    model: Place | nn.Module | str | Path,
    image: str | Path | Image | Any,
    way: Way | None = None,
    views: Views = ONCE,
    bits: int | None = None,
) -> Segmentation:
    """What a network sees in an image.

    Args:
        model: a checkpoint's path, or for many images what `load_model` makes of it, also in a wrapper such
            as `DataParallel`, or in another runtime by `in_runtime`.
        image: a photo's path or the photo as Pillow opens it, turned upright as its EXIF orientation says; or
            uint8 `[H, W, 3]` RGB.
        way: how to run; by default selective under the model's own policy.
        views: whole or through windows, with or without test-time augmentation. Where they name no scale, the
            image is scaled to the size of the network's training frames, if its file tells them;
            `Views(scales=(1,))` takes it as it is. What is found has the image's own size.
        bits: of a file with 16 bits per channel, how many are used; None: 12 where no value is above 4095,
            else 16, and a warning is logged. For several pictures of a camera, set it.

    Raises:
        CheckpointError, DataError: a file is missing, damaged or foreign.
        SparseSegError: a runtime cannot run this way.
        ValueError: a model or image of a wrong type, or an image of a wrong shape or dtype, or smaller than
            32x32.
    """
    return ImageSegmenter(_network(model), way, views)(_pixels(image, bits))


def _network(model: Any) -> Place:
    """The network that is given, loaded or in a wrapper: for several GPUs, of averages, of torch.compile."""
    if isinstance(model, str | os.PathLike):
        return load_model(model if isinstance(model, str) else Path(model))
    inner = model
    while not isinstance(inner, Place):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if not isinstance(inner, nn.Module):
            raise ValueError(
                f"model must be a checkpoint's path or a network of this package, not {type(model).__name__}"
            )
    return inner


def _pixels(image: Any, bits: int | None) -> Image:
    """`[H, W, 3]` of what is given; arrays are checked by `ImageSegmenter`."""
    if isinstance(image, np.ndarray):
        return image
    if isinstance(image, str | os.PathLike):
        depth = find_depth([Path(image)], bits, "set bits")
        if depth.note:
            _LOG.warning("warning: %s", depth.note)
        return read_image(Path(image), upright=True, bits=depth.bits)
    if not isinstance(image, PIL.Image.Image):
        raise ValueError(
            f"image must be a path, a Pillow image or uint8 [H, W, 3] RGB, not {type(image).__name__}"
        )
    stored = [tile[3] for tile in getattr(image, "tile", ())]  # as RGB;16B, in a file that is not read yet
    kinds = [str(kind[0] if isinstance(kind, tuple) else kind) for kind in (image.mode, *stored) if kind]
    if any(kind.startswith(("I", "F")) or ";16" in kind for kind in kinds):  # bits would be lost
        raise ValueError(
            f"an image of mode {kinds[-1]} has over 8 bits per channel; give its path, or RGB bytes"
        )
    try:
        return np.array(PIL.ImageOps.exif_transpose(image).convert("RGB"))
    except OSError as error:
        raise DataError(f"the image cannot be read: {error}; restore it from the original") from None
