"""Scenes on disk: written all or nothing, and reused where they already are what is asked for."""

import functools
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from sparse_seg.data.cityscapes import IMAGE_SUFFIX, LABEL_SUFFIX, Cityscapes
from sparse_seg.data.scenes.street import render_scene
from sparse_seg.errors import DataError
from sparse_seg.progress import bar

_VERSION = 2  # raise it when the same seed gives other scenes than before
_RECORD = "scenes.json"
_SPLITS = ("train", "val")
_KINDS = (("leftImg8bit", IMAGE_SUFFIX), ("gtFine", LABEL_SUFFIX))
FRAMES = 10  # of a scene's video
_CITY = "scenes"
_Job = tuple[int, int]  # split and index
_SCENES_PER_WORKER = 16  # fewer are not worth a process
_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 1]  # noise hardly compresses; level 1 is several times faster


class ScenesDataset(Cityscapes):
    """Scenes that `write_scenes` wrote: classes and files as in Cityscapes.

    Raises:
        DataError: there are none in `root`.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        if not Path(root, _RECORD).is_file():
            raise DataError(
                f"{root}: no synthetic scenes there; make them with: sparse-seg make-scenes {root}"
            )
        super().__init__(root, split)


def write_scenes(
    out: str | Path,
    count: int,
    size: tuple[int, int] = (256, 512),
    seed: int = 0,
    val_fraction: float = 0.2,
    pan: int | None = None,
) -> bool:
    """Writes `count` scenes, train and val together, or keeps `out` if it holds just these already.

    Scene `index` of a split depends on the seed and the index alone: a larger count only adds scenes. The
    files appear under `out` all at once, when the last is done.

    Args:
        count: at least 2: one scene for each split.
        size: height and width, px, at least `SMALLEST_SIDE`.
        val_fraction: share of the scenes that goes to `val`, at least one scene.
        pan: make a video of each scene, `FRAMES` frames whose camera turns right by so many px each.

    Returns:
        False where `out` was kept as it is.

    Raises:
        DataError: `out` holds something else or cannot be written.
    """
    out = Path(out).absolute()
    record = {"version": _VERSION, "count": count, "size": list(size), "seed": seed}
    record |= {"val_fraction": val_fraction} | ({} if pan is None else {"pan": pan})
    if _holds(out, record):
        return False
    val_count = min(max(round(count * val_fraction), 1), count - 1)
    jobs = [(0, index) for index in range(count - val_count)] + [(1, index) for index in range(val_count)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(".partial", f".{out.name}.", out.parent) as beside:
            folder = Path(beside, "scenes")  # readable by all, as the one around it is not
            done = _on_all_cores(functools.partial(_write_scene, folder, size, seed, pan), jobs)
            for _ in bar(done, "scenes", count, unit="scene"):
                pass
            (folder / _RECORD).write_text(json.dumps(record) + "\n")
            folder.rename(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); choose another folder") from error
    return True


def _holds(out: Path, record: dict[str, Any]) -> bool:
    """Whether `out` holds these scenes already; a missing or empty folder does not."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / _RECORD).read_text())
    except (OSError, ValueError):
        raise DataError(
            f"{out}: exists and holds no synthetic scenes; choose another folder or remove it"
        ) from None
    if found != record:
        raise DataError(
            f"{out}: holds other scenes ({json.dumps(found)}) than asked for ({json.dumps(record)}); "
            "choose another folder or remove it"
        )
    images, labels = (len(list(out.glob(f"{kind}/*/{_CITY}/*{suffix}"))) for kind, suffix in _KINDS)
    if images != labels or images != record["count"] * (FRAMES if "pan" in record else 1):
        raise DataError(
            f"{out}: {images} images and {labels} labels of {record['count']} scenes are left; "
            "remove the folder and generate it again"
        )
    return True


def _on_all_cores(write: Callable[[_Job], None], jobs: list[_Job]) -> Iterator[None]:
    """Processes: most of a scene's time is Python, and two threads were no faster than one."""
    workers = min(os.cpu_count() or 1, len(jobs) // _SCENES_PER_WORKER)
    if workers < 2:
        yield from map(write, jobs)
        return
    context = multiprocessing.get_context("fork")  # spawned ones would import torch first, for seconds
    with ProcessPoolExecutor(workers, context, cv2.setNumThreads, (0,)) as pool:
        yield from pool.map(write, jobs, chunksize=4)


def _write_scene(folder: Path, size: tuple[int, int], seed: int, pan: int | None, job: _Job) -> None:
    split, index = job
    step, frames = pan or 0, 1 if pan is None else FRAMES
    image, label = render_scene(np.random.default_rng([seed, split, index]), size, step * (frames - 1))
    for frame in range(frames):
        seen = slice(step * frame, step * frame + size[1])
        stem = f"{_SPLITS[split]}/{_CITY}/{_CITY}_{index:06d}_{19 + frame:06d}"
        for (kind, suffix), pixels in zip(_KINDS, (image[:, seen, ::-1], label[:, seen]), strict=True):
            file = folder / kind / f"{stem}{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(cv2.imencode(".png", np.ascontiguousarray(pixels), _PNG)[1].tobytes())
