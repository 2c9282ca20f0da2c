"""Videos and cameras, frame by frame: overlays as a video, and what the frames cost."""

import logging
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from sparse_seg.data.dataset import Image
from sparse_seg.errors import DataError
from sparse_seg.files import atomic_path
from sparse_seg.lab.predict.files import PICTURES, OutputFiles, Source
from sparse_seg.lab.predict.segment import ImageSegmenter, Segmentation
from sparse_seg.lab.report.overlays import write_image
from sparse_seg.progress import bar
from sparse_seg.timing import now

CODEC = "mp4v"  # OpenCV's builds have no H.264 encoder; its VP9 takes a second a frame
USUAL_RATE = 25.0  # frames/s of cameras that do not tell theirs
SLOWEST, TIME_BASE = 0.002, 65535  # frames/s that OpenCV can tell; the finest clock that MPEG-4 has
_LOG = logging.getLogger(__name__)
LEAST_READ = 0.95  # of the frames that a file promises; some promise a few too many


def write_video(
    segmenter: ImageSegmenter,
    source: Source,
    outputs: OutputFiles,
    fps: float | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Write `NAME.mp4`, the frames with the classes' colours over them, at the source's size (even, as the
    codec wants it) and rate, see `writable_rate`. Ctrl-C ends a camera's video.

    Args:
        fps: frames per second to keep up with, by refinement within the time that is left; None: each frame
            runs as images do.
        limit: stop after so many frames.

    Returns:
        `frames`, mean `shares` and `fine_fraction`, `scales` of a frame's sides at which the network saw it,
        and `milliseconds`: the median time in the network, with scaling.

    Raises:
        DataError: it cannot be opened, is damaged (what could be read is written), has no frame, or no
            encoder takes it.
        ValueError: frames too small for the network.
        OSError: a file cannot be written.
    """
    times, fine, totals, scales = list[float](), list[float](), dict[str, float](), list[float]()
    with _opened(source) as (frames, rate, count), _writers(source, outputs, rate) as write:
        most = min(filter(None, (count, limit)), default=None)
        segmenter.restart(most)
        spent = 0.0  # outside of the network, on the frame before
        try:
            for image in bar(frames, str(source), count or None, unit="frame"):
                start = now(segmenter.device)
                budget = None if fps is None else max(0.0, 1000 * (1 / fps - spent))
                found = segmenter.follow(image, budget)
                end = now(segmenter.device)
                write(found, len(times))
                scales = list(found.scales)
                times.append(1000 * (end - start))
                spent = now(segmenter.device) - end
                fine += [] if found.fine_blocks is None else [float(found.fine_blocks.mean())]
                for name, share in found.shares().items():
                    totals[name] = totals.get(name, 0.0) + share
                if len(times) == limit:
                    break
        except KeyboardInterrupt:
            if not isinstance(source.path, int):
                raise
    if not times:
        raise DataError(f"{source}: no frame could be read")
    ids = [file for file in outputs.files(source) if file.suffix == ".png" and file.stem.isdecimal()]
    if older := [file for file in ids if int(file.stem) >= len(times)]:
        _LOG.warning("warning: %s and %d more are of an earlier run", older[0], len(older) - 1)
    if len(times) < LEAST_READ * min(count, limit or count):
        told = f"only {len(times)} of {count} frames could be read, those in {outputs.files(source)[0]}"
        raise DataError(f"{source}: {told}; it is damaged")
    return {
        "frames": len(times),
        "shares": {name: total / len(times) for name, total in totals.items()},
        "fine_fraction": statistics.mean(fine) if fine else None,
        "scales": scales,
        "milliseconds": statistics.median(times),
    }


@contextmanager
def _opened(source: Source) -> Iterator[tuple[Iterator[Image], float, int]]:
    """Frames uint8 `[H, W, 3]` RGB, turned upright where the file says how; rate; how many (0: unknown)."""
    video = cv2.VideoCapture(source.path if isinstance(source.path, int) else str(source.path.absolute()))
    try:
        if not video.isOpened():
            what = "no such camera" if isinstance(source.path, int) else "damaged, or of an unknown format"
            raise DataError(f"{source}: cannot be opened: {what}")
        rate, count = video.get(cv2.CAP_PROP_FPS), video.get(cv2.CAP_PROP_FRAME_COUNT)
        known = not isinstance(source.path, int) and count > 0
        yield _frames(video), rate if rate > 0 else USUAL_RATE, int(count) if known else 0
    finally:
        video.release()


def _frames(video: cv2.VideoCapture) -> Iterator[Image]:
    while True:
        done, frame = video.read()
        if not done:
            return
        yield np.ascontiguousarray(frame[..., ::-1])


@contextmanager
def _writers(source: Source, outputs: OutputFiles, rate: float) -> Iterator[Any]:
    """A function that adds a frame; the files get their names when all is done."""
    out = Path(outputs.folder, source.name)
    writers: dict[Path, cv2.VideoWriter] = {}
    with ExitStack() as stack:

        def add(file: Path, picture: Image) -> None:
            if file not in writers:
                size, code = (picture.shape[1], picture.shape[0]), cv2.VideoWriter.fourcc(*CODEC)
                # absolute: in a relative name FFmpeg takes what stands before a colon for a protocol
                partial = stack.enter_context(atomic_path(file.absolute(), keep_suffix=True))
                writers[file] = cv2.VideoWriter(str(partial), code, writable_rate(rate), size)
                stack.callback(writers[file].release)
                if not writers[file].isOpened():
                    raise DataError(
                        f"{file}: cannot be written: OpenCV's {CODEC} encoder is missing, or does not take "
                        f"{size[0]}x{size[1]} px at {rate:g} frames/s"
                    )
            writers[file].write(picture[..., ::-1])

        def write(found: Segmentation, number: int) -> None:
            add(Path(f"{out}.mp4"), found.overlay())
            if outputs.ids:
                write_image(Path(f"{out}_ids", f"{number:06d}.png"), found.ids())
            if outputs.blocks:
                add(Path(f"{out}_blocks.mp4"), PICTURES["blocks"](found))

        yield write


def writable_rate(rate: float) -> float:
    """The nearest frames/s that can be written: three decimals, as OpenCV counts, or fewer for MPEG-4's
    clock."""
    rate = min(max(rate, SLOWEST), TIME_BASE)
    scale = next(scale for scale in (1000, 100, 10, 1) if round(rate * scale) <= TIME_BASE)
    return round(rate * scale) / scale
