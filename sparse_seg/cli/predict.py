"""Segment photos, folders of them, videos and cameras with a checkpoint alone.

For each image NAME: D/NAME_overlay.png, D/NAME_classes.png (colours), D/NAME_ids.png (8-bit ids: those of the
training labels where the checkpoint knows them, else 0, 1, ...) and, unless --dense, D/NAME_blocks.png. With
--show-levels also D/NAME_levels.png, every block in the colour of its stride; with --steps D/NAME_steps.png,
how the coarse prediction is refined step by step where it is least certain. D/legend.png and D/classes.yaml
say which id and colour is which class; no input is written over, nor a classes.yaml of other classes. Folders
are searched with their sub-folders, which D gets too. Photos are turned upright as EXIF or a TIFF says
(training and evaluation read images as they are stored, like their labels). A file that cannot be read
is named and skipped; the exit code is then 1.

For a video NAME, or camera:N: D/NAME.mp4, overlays at the source's rate; with --policy previous each frame's
fine blocks are those that the frame before left uncertain, which costs no coarse pass; with --fps N each
frame is refined from the coarse prediction as long as 1/N s allows. Ctrl-C ends a camera.

A network knows objects at the size that training showed them at. So photos and videos much larger or smaller
than the training frames, whose size the checkpoint tells, are scaled to the area of those before they run
(enlarged by 2 at most). What is written has their own size. --scales 1 runs them as they are.

CONFIG is optional: CHECKPOINT says how the network runs. With one, its mask, strides, mean and std are used.

examples:
  sparse-seg predict street-lite0 street.jpg --out runs/pictures
  sparse-seg predict runs/camvid_r18/best.safetensors street.jpg --out runs/pictures
  sparse-seg predict runs/camvid_r18/best.safetensors photos/ --fine-fraction 0.3 --json shares.json --out out
  sparse-seg predict r101.safetensors photo.jpg --scales 0.25 --flip --out out
  sparse-seg predict runs/aerial/best.safetensors large.tif --scales 1 --out out
  sparse-seg predict runs/camvid_r18/best.safetensors drive.mp4 --policy previous --out out
  sparse-seg predict runs/camvid_r18/best.safetensors camera:0 --fps 10 --out out
  sparse-seg predict configs/camvid_r18.yaml runs/camvid_r18/best.pt street.jpg --steps 0 0.1 0.3 --out out
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sparse_seg.checkpoint import is_checkpoint, load, network_of
from sparse_seg.cli.arguments import fraction, number, option, whole_number
from sparse_seg.cli.options import (
    CHECKPOINT,
    add_device,
    add_network,
    add_runtime,
    add_set,
    add_views,
    check_dense,
    input_files,
    output_file,
    output_folder,
    policy,
    views,
)
from sparse_seg.config import check_classes, load_config
from sparse_seg.config.schema import BITS
from sparse_seg.data.depth import find_depth
from sparse_seg.data.folder import CLASS_FILE
from sparse_seg.errors import DataError
from sparse_seg.export.runner import AUTO, TORCH, Runner
from sparse_seg.lab.predict.files import (
    STEPS,
    OutputFiles,
    check_legend,
    find_sources,
    write_legend,
    write_pictures,
)
from sparse_seg.lab.predict.segment import ImageSegmenter
from sparse_seg.lab.predict.video import write_video
from sparse_seg.lab.provenance import write_result
from sparse_seg.masks import POLICIES
from sparse_seg.progress import bar
from sparse_seg.run.card import NEAR, Card
from sparse_seg.run.way import Way

CONFIG_SUFFIXES = (".yaml", ".yml")
WINDOW = 2048  # px


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [CONFIG] CHECKPOINT INPUT [INPUT ...] --out D [options]"
    text = f"{CHECKPOINT}; then images, videos, folders of them, camera:N"
    parser.add_argument("files", nargs="+", metavar="CHECKPOINT INPUT", help=text)
    option(parser, "--out D", "folder to write to", output_folder, required=True)
    option(parser, "--ids-only", "write NAME_ids.png and classes.yaml alone", bool)
    option(parser, "--json OUT", "write each image's share of each class to this file", output_file)
    option(parser, "--show-levels", "also blocks coloured by stride", bool)
    option(parser, "--steps F", "also refinement to these rising fractions", fraction, nargs="+")
    add_set(parser, "override keys of the config that stands before CHECKPOINT")
    add_network(parser)
    text = f"what chooses fine blocks: of {', '.join(POLICIES)}, with options as in confidence:margin"
    option(parser, "--policy P", text, policy, told="the checkpoint's")
    add_views(parser, WINDOW, f"to the area of the training frames, if known and beyond x{NEAR:g}")
    text = "of images with 16 bits per channel: how many are used"
    told = "12 where no value of them all is above 4095, else 16"
    option(parser, "--bits", text, int, told=told, choices=BITS)
    option(parser, "--fps N", "of videos: keep up with N frames per second", number(0.01, 1000))
    option(parser, "--limit N", "of videos: the first N frames only", whole_number(1))
    option(parser, "--video-ids", "of videos: also NAME_ids/000000.png, ...", bool)
    option(parser, "--video-blocks", "of videos: also NAME_blocks.mp4", bool)
    add_runtime(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    if args.steps and args.steps != sorted(args.steps):
        args.usage_error(f"argument --steps: fractions must rise, not {args.steps}")
    if args.runtime not in (AUTO, TORCH) and (args.steps or args.fps):
        asked = "--steps" if args.steps else "--fps"
        args.usage_error(f"argument --runtime: {asked} needs torch, which refines")
    way, looks = Way(args.dense, args.policy, args.fine_fraction), views(args)
    if args.fps and not looks.is_one_look:
        args.usage_error("argument --fps: refines one look; leave out --flip and all --scales but one")
    for name, value in (("--dense", args.dense), ("--fine-fraction", args.fine_fraction)):
        if args.fps and value is not None:
            args.usage_error(f"argument --fps: refines as far as the time allows; leave out {name}")
    named = POLICIES[args.policy.partition(":")[0]] if args.policy else None
    if args.fps and named and not named.ranks_refinement:
        args.usage_error(f"argument --fps: ranks blocks by a coarse pass, which {args.policy} does not read")
    if named and named.is_bound:
        args.usage_error(f"argument --policy: {args.policy} reads labels, which only evaluate --compare has")
    config_file, checkpoint, inputs = _parts(args)
    config = None
    if config_file is not None:
        config = load_config(config_file, args.set)
        check_classes(config)
    sources, outputs = find_sources(inputs), _outputs(args)
    for path in map(Path, inputs):
        if path.is_dir() and outputs.folder.resolve().is_relative_to(path.resolve()):
            args.usage_error(f"argument --out: {path} holds the images; name another folder than {args.out}")
    outputs.check(sources, input_files(config_file, config, checkpoint))
    model = network_of(load(checkpoint), config).to(args.device)
    check_dense(args, model, "policy")
    runner = Runner(model, args.runtime, way, "--fps refines" if args.fps else None)
    segmenter = ImageSegmenter(runner, way, looks)
    check_legend(segmenter.card, args.out)
    told = config.data.bits if config is not None and args.bits is None else args.bits
    images = [source.path for source in sources if isinstance(source.path, Path) and not source.is_video]
    depth = find_depth(images, told, "add --bits 10, 12, 14 or 16")
    if depth.note:
        print(f"warning: {depth.note}", file=sys.stderr)
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for index, source in enumerate(bar(sources, "predict", len(sources), len(sources) > 1)):
        try:
            segmenter.restart(len(sources) - index if looks.is_single else None)
            outputs.check_names(source)
            if source.is_video:
                found = write_video(segmenter, source, outputs, args.fps, args.limit)
            else:
                found = write_pictures(segmenter, source, outputs, depth.bits, args.steps or ())
            results[str(source)] = found
        except (DataError, ValueError) as error:
            failed[str(source)] = str(error if isinstance(error, DataError) else f"{source}: {error}")
            tqdm.write(f"error: {failed[str(source)]}", file=sys.stderr)
    if results:
        write_legend(segmenter.card, args.out, args.ids_only)
    if args.json:
        content = {"classes": segmenter.card.names, "images": results, "failed": failed}
        write_result(args.json, content)
    _report(args, segmenter, runner, results)
    return 1 if failed else 0


def _report(
    args: argparse.Namespace, segmenter: ImageSegmenter, runner: Runner, results: dict[str, dict[str, Any]]
) -> None:
    for name, result in results.items():
        if "frames" in result:
            print(f"{name}: {result['frames']} frames, {result['milliseconds']:.1f} ms in the network each")
    if any(result.get("windows", 1) > 1 for result in results.values()):
        print(f"large images in windows of {args.window} px, not exact near seams; --window 0: whole")
    scales = [result["scales"][0] for result in results.values() if result["scales"] != [1.0]]
    if scales and args.scales is None:
        print(_scaled(segmenter.card, scales, len(results)))
    print(runner.report())
    if segmenter.frames:
        dense, stride = segmenter.dense_seconds(), segmenter.model.strides[0]
        beside = "" if dense is None else f"; dense OS{stride}: {1 / dense:.1f}"
        print(f"{segmenter.frames / segmenter.seconds:.1f} frames/s in the network{beside}")
    count = "1 image" if len(results) == 1 else f"{len(results)} images"
    print(f"{count} segmented" + (f"; pictures in {args.out}" if results else ""))


def _scaled(card: Card, scales: list[float], total: int) -> str:
    """One line on inputs that were scaled by default."""
    known = card.frame or card.at_most
    assert known is not None
    low, high = (f"{one:.3g}" for one in (min(scales), max(scales)))
    about, size = "" if card.frame else "about ", "x".join(map(str, known))
    factors = low if low == high else f"{low} to {high}"
    return (
        f"{len(scales)} of {total} inputs scaled by {factors} to {about}the area of the training frames, "
        f"{size} px; --scales 1: as they are"
    )


def _outputs(args: argparse.Namespace) -> OutputFiles:
    """What is to be written."""
    selective, all_kinds = args.dense is None, not args.ids_only
    kinds = {"ids": True, "overlay": all_kinds, "classes": all_kinds, "blocks": all_kinds and selective}
    kinds |= {"levels": args.show_levels and selective, STEPS: bool(args.steps)}
    others = [Path(args.out, CLASS_FILE), *([Path(args.out, "legend.png")] if all_kinds else [])]
    return OutputFiles(
        Path(args.out),
        [kind for kind, asked in kinds.items() if asked],
        args.video_ids or args.ids_only,
        args.video_blocks and selective,
        [*others, *([Path(args.json)] if args.json else [])],
    )


def _parts(args: argparse.Namespace) -> tuple[str | None, str, list[str]]:
    """The config, if one stands first, the checkpoint and the inputs."""
    first, *others = args.files
    is_config = first.endswith(CONFIG_SUFFIXES) or (
        len(others) > 1 and is_checkpoint(others[0]) and not is_checkpoint(first)
    )
    config, checkpoint, inputs = None, first, others
    if is_config:
        config, checkpoint, inputs = first, others[0] if others else "", others[1:]
    elif args.set:
        args.usage_error("argument --set: overrides a config; name one before CHECKPOINT")
    if not inputs:
        args.usage_error("the following arguments are required: CHECKPOINT, INPUT")
    if inputs[0].endswith(CONFIG_SUFFIXES):
        args.usage_error(f"argument CONFIG: {first} is a checkpoint, not a config; CONFIG comes first")
    return config, checkpoint, inputs
