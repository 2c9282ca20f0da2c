"""Arguments that several commands share."""

import argparse
from contextlib import suppress
from pathlib import Path

import torch

from sparse_seg.checkpoint import find, is_checkpoint
from sparse_seg.cli.arguments import fraction, number, option, whole_number
from sparse_seg.config import Config, MaskConfig, config_files, load_config
from sparse_seg.errors import CheckpointError, ConfigError, SparseSegError, choose_one
from sparse_seg.evaluation.views import Views
from sparse_seg.export.runner import AUTO, CHOICES, PIXELS
from sparse_seg.files import check_outputs
from sparse_seg.lab.opened import Opened, open_checkpoint
from sparse_seg.masks import parse_policy
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way

CHECKPOINT = (
    "weights: a file, trained here or converted; or the name of shipped ones, street-lite0 or camvid-slim "
    "(their configs: street_lite0.yaml, camvid_light.yaml)"
)


def add_config(parser: argparse.ArgumentParser, checkpoint: bool = False, optional: bool = False) -> None:
    """`CONFIG` and `--set`; with `checkpoint` also `CHECKPOINT`, which replaces a CONFIG that is optional."""
    count = "?" if optional else None
    text = "YAML config (default: CHECKPOINT says how the network runs)" if optional else "YAML config"
    option(parser, "config CONFIG", text, _config_file, nargs=count)
    if checkpoint:
        option(parser, "checkpoint CHECKPOINT", CHECKPOINT)
    add_set(parser, "override config keys")


def add_set(parser: argparse.ArgumentParser, text: str) -> None:
    """`--set`."""
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=text)


def add_data(parser: argparse.ArgumentParser, split: str) -> None:
    """`--split` and `--limit`."""
    option(parser, "--split", "split of the dataset", default=split)
    option(parser, "--limit N", "use the first N images only", whole_number(1))


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`."""
    option(parser, "--device DEVICE", "cpu or cuda", _device, _device("auto"), "cuda if there")


def add_network(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """`--dense` or `--fine-fraction`; the group, for further ways to run the network."""
    group = parser.add_mutually_exclusive_group()
    text = "run dense at output stride 4, 8, 16 or 32; captured networks: at any power of two"
    option(group, "--dense OS", text, whole_number(1))
    option(group, "--fine-fraction F", "share of fine blocks, 0 to 1", fraction)
    return group


def check_dense(args: argparse.Namespace, model: SelectiveNetwork, *selective: str) -> None:
    """A usage error for a stride of `--dense` that the network cannot have, or beside an option that chooses
    among blocks, of those named."""
    for name in selective:
        if args.dense is not None and getattr(args, name) is not None:
            args.usage_error(f"argument --{name}: not allowed with argument --dense")
    try:
        model.check_way(Way(args.dense))
    except ValueError as error:
        args.usage_error(f"argument --dense: {error}")


def add_views(parser: argparse.ArgumentParser, window: int = 0, scales: str = "1") -> None:
    """`--flip`, `--scales` and `--window`.

    Args:
        window, scales: what runs by default.
    """
    option(parser, "--flip", "average with the mirror image", bool)
    text = "scale the image's sides by S before it runs; several: average over these sizes. Results have "
    option(parser, "--scales S", f"{text}the image's own size", number(0.05, 4), told=scales, nargs="+")
    option(
        parser,
        "--window PX",
        "bound memory: run images that are larger (at the largest of --scales) through overlapping "
        "windows of this side. Not exact: near seams a network sees less, ASPP pools each window, and each "
        "has the mask's budget",
        whole_number(0),
        window,
        f"{window or 'whole images'}; 0: whole images",
    )


def views(args: argparse.Namespace) -> Views:
    """As the arguments of `add_views` ask."""
    try:
        return Views(args.window or None, flip=args.flip, scales=args.scales and tuple(args.scales))
    except ValueError as error:
        return args.usage_error(f"argument --window: {error}")


def add_runtime(parser: argparse.ArgumentParser) -> None:
    """`--runtime`."""
    option(
        parser,
        "--runtime",
        "what runs the network; all give the same classes but for ties. auto: torch, and on the CPU "
        "onnxruntime where that takes less time in all: its graph takes a second or more to make, but is "
        f"kept for the next run; images of over {PIXELS / 2**20:g} megapixels stay in torch",
        default=AUTO,
        choices=CHOICES,
    )


def opened(args: argparse.Namespace, device: torch.device, *outputs: str | Path | None) -> Opened:
    """CONFIG, CHECKPOINT, and the data of `add_data`; no output may be one of their files."""
    config = load_config(args.config, overrides(args))
    written = [file for file in outputs if file]
    check_outputs(written, input_files(args.config, config, args.checkpoint))
    return open_checkpoint(config, args.checkpoint, device, args.split, args.limit, written)


def overrides(args: argparse.Namespace) -> list[str]:
    """`--set`, plus the setting that `--fine-fraction` abbreviates."""
    fraction = getattr(args, "fine_fraction", None)
    if fraction is None:
        return args.set
    return [*args.set, f"model.mask.fine_fraction={fraction}", "model.mask.threshold=null"]


def policy(text: str) -> str:
    """An argument type: a mask policy that takes any fraction, with its options."""
    try:
        if parse_policy(text, MaskConfig()).policy != "uniform":
            return text
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    raise argparse.ArgumentTypeError("uniform takes no fraction between 0 and 1; choose another policy")


def merges(model: SelectiveNetwork) -> tuple[str, ...]:
    """The merges that a network can run with, its fastest last."""
    try:
        model.check_way(Way(merge="patch"))
    except SparseSegError:
        return ("whole",)
    return "whole", "patch"


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    option(parser, "--json OUT", "also write the result to this file", output_file)


def output_file(text: str) -> str:
    """An argument type: a file to write, checked before the work that fills it."""
    path = Path(_named(text))
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file in it")
    if path.exists() and not path.is_file():  # a rename would replace even /dev/null
        raise argparse.ArgumentTypeError(f"{text} is no regular file but a pipe or device; name a file")
    return text


def output_folder(text: str) -> str:
    """An argument type: a folder to write to."""
    if Path(_named(text)).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; name a folder")
    return text


def _named(text: str) -> str:
    """An empty text, as of a variable that is not set, names no place."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a place to write to, such as . for this folder")
    return text


def input_files(
    config_file: str | Path | None, config: Config | None, *checkpoints: str | Path | None
) -> list[Path]:
    """What a command reads: a config with its `_base_` files, checkpoints, and those the config names."""
    files = [] if config_file is None else config_files(config_file)
    named = list(checkpoints)
    if config is not None:
        named += [config.model.pretrained, config.train.init, config.train.distill.teacher]
    for checkpoint in named:
        if not checkpoint:
            continue
        with suppress(CheckpointError):  # said by the one who reads it
            files.append(find(checkpoint))
    return files


def _config_file(text: str) -> str:
    """An argument type: a path that is not a checkpoint."""
    if is_checkpoint(text):
        raise argparse.ArgumentTypeError(f"{text} is a checkpoint, not a config; CONFIG comes first")
    return text


def _device(text: str) -> torch.device:
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if text.startswith("cuda") and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("this PyTorch sees no CUDA device; use --device cpu")
    try:
        return torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"unknown device {choose_one(text, ('cpu', 'cuda'))}") from None
