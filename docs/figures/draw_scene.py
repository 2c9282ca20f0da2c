"""Draws the picture at the top of README: where a coarse run fails and a selective one does not.

    sparse-seg make-scenes runs/picture/scenes --count 500
    sparse-seg train configs/demo.yaml --work-dir runs/picture/run --set data.root=runs/picture/scenes \\
      model.width=0.5 train.iterations=1000 train.optimizer=adamw train.lr=0.002 train.weight_decay=0.02 \\
      train.warmup_iterations=100 train.ema_decay=0.997 train.loss.boundary_weight=1 \\
      train.loss.boundary_width=2 train.loss.coarse_weight=0.4
    python docs/figures/draw_scene.py runs/picture/run/best.safetensors runs/picture/scenes scene.jpg

Of all windows of the validation scenes it takes the one with most pixels that the selective run has right and
the dense run at output stride 16 has wrong, less those that it has wrong and dense output stride 8 right.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

import sparse_seg
from sparse_seg.data import build_dataset
from sparse_seg.data.transforms import normalise
from sparse_seg.lab.report.overlays import Image, colourise, draw_blocks, overlay
from sparse_seg.run.way import Way

FRACTION = 0.2
WINDOW = (80, 128)  # px, of the zoom
STEP = 16  # px between windows
WIDTH, GAP, BAND = 1520, 8, 26  # px: of the picture, between its parts, of a title


def gain(label: Tensor, fine: Tensor, coarse: Tensor, selective: Tensor) -> tuple[float, int, int]:
    """The best window's gain, share of the window, and its place (y, x)."""
    known = label != 255
    won = known & (selective == label) & (coarse != label)
    lost = known & (selective != label) & (fine == label)
    score = (won.float() - lost.float())[None, None]
    means = torch.nn.functional.avg_pool2d(score, WINDOW, STEP)[0, 0]
    place = int(means.argmax())
    return float(means.max()), place // means.shape[1] * STEP, place % means.shape[1] * STEP


def titled(image: Image, text: str, width: int) -> Image:
    """`image` scaled to `width` px, under its title."""
    height = round(image.shape[0] * width / image.shape[1])
    scaled = cv2.resize(image, (width, height), interpolation=cv2.INTER_NEAREST)
    band = np.full((BAND, width, 3), 255, np.uint8)
    cv2.putText(band, text, (2, BAND - 9), cv2.FONT_HERSHEY_SIMPLEX, 0.52, (30, 30, 30), 1, cv2.LINE_AA)
    return np.concatenate([band, scaled])


def row(images: Sequence[tuple[Image, str]]) -> Image:
    """Pictures of one shape beside each other."""
    width = (WIDTH - GAP * (len(images) - 1)) // len(images)
    parts = [titled(image, text, width) for image, text in images]
    white = np.full((parts[0].shape[0], GAP, 3), 255, np.uint8)
    joined = [piece for part in parts for piece in (part, white)][:-1]
    line = np.concatenate(joined, 1)
    return np.pad(line, ((0, 0), (0, WIDTH - line.shape[1]), (0, 0)), constant_values=255)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("checkpoint", "scenes", "out"):
        parser.add_argument(name)
    args = parser.parse_args(argv)
    model = sparse_seg.load_model(args.checkpoint).eval()
    card, dataset = model.card, build_dataset("scenes", args.scenes, "val")
    assert card is not None
    assert card.colours is not None
    best = None
    for index in range(len(dataset)):
        image, label = dataset.load(index)
        images = normalise(image, card.mean, card.std)[None]
        run = model.start(images).follow(Way(fine_fraction=FRACTION))
        maps = [model.start(images).follow(Way.dense(stride)).classes()[0] for stride in (8, 16)]
        found = gain(torch.from_numpy(label), maps[0], maps[1], run.classes()[0])
        if best is None or found > best[0]:
            best = found, image, label, [*maps, run.classes()[0]], run.mask
    assert best is not None
    (share, y, x), image, label, (fine, coarse, selective), blocks = best
    assert blocks is not None
    print(f"{share:.3f} of the window at {y}, {x}")
    window = np.s_[y : y + WINDOW[0], x : x + WINDOW[1]]

    def shown(classes: Tensor, opacity: float = 0.65) -> Image:
        return overlay(image, classes.numpy().astype(np.uint8), card.colours, opacity)

    def framed(picture: Image) -> Image:
        return cv2.rectangle(
            picture.copy(), (x, y), (x + WINDOW[1] - 1, y + WINDOW[0] - 1), (255, 255, 255), 2
        )  # type: ignore[return-value]

    chosen = draw_blocks(image, blocks[0].numpy())
    spent = f"{round(100 * FRACTION)} % of the blocks are fine"
    whole = row([(framed(image), "input"), (chosen, spent), (framed(shown(selective)), "selective")])
    parts = [(colourise(label, card.colours), "label"), (shown(coarse), "dense, output stride 16")]
    parts += [(shown(selective), "selective, 16 and 8"), (shown(fine), "dense, output stride 8")]
    zoom = row([(image[window], "the frame, larger"), *((picture[window], text) for picture, text in parts)])
    picture = np.concatenate([whole, np.full((GAP, WIDTH, 3), 255, np.uint8), zoom])
    cv2.imwrite(args.out, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 88])


if __name__ == "__main__":
    main()
