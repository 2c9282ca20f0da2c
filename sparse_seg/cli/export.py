"""Write a network as one ONNX file, which runs without PyTorch and without this package.

It takes images of one size: input `images`, float32 [B,3,H,W], RGB in 0..1 (or with --input uint8: bytes
[B,H,W,3]); normalisation is inside. Outputs `classes`: uint8 [B,H,W]; `fine_blocks`: bool [B,Hc,Wc]; with
--logits also `logits`: float32 [B,K,H,W]. With --policy given the input `blocks`, int64 [B,k], has the flat
numbers of the blocks that are to be fine. Class names, colours and the rest stand in the file's property
`sparse_seg`, as JSON. The file is run in onnxruntime and compared with the model before it is written.

examples:
  sparse-seg export camvid-slim slim.onnx --size 360x480
  sparse-seg export camvid-slim slim.onnx --size 360x480 --fine-fraction 0.1 --policy edge
  sparse-seg export camvid-slim dense.onnx --size 360x480 --dense 8
  sparse-seg export configs/converted.yaml r101.safetensors r101.onnx --size 512x1024 --input uint8
"""

import argparse
import dataclasses

from sparse_seg.checkpoint import load, network_of
from sparse_seg.checkpoint.loading import read_card
from sparse_seg.cli.arguments import option, size, whole_number
from sparse_seg.cli.options import add_config, add_network, check_dense, input_files, output_file, overrides
from sparse_seg.config import ModelConfig, check_classes, load_config
from sparse_seg.config.keys import choices
from sparse_seg.export.onnx_file import export_onnx
from sparse_seg.export.options import INPUTS, ExportOptions
from sparse_seg.files import check_outputs

POLICIES = ("confidence", "edge", "gain", "learned", "given")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, checkpoint=True, optional=True)
    option(parser, "out OUT.onnx", "file to write", output_file)
    option(parser, "--size HxW", "size of the images in pixels", size(), required=True)
    add_network(parser)
    option(parser, "--policy", "mask policy", told="the config's", choices=POLICIES)
    text = "whole: the head runs everywhere; patch: on fine blocks only"
    option(parser, "--merge", text, told="the config's", choices=choices(ModelConfig, "merge"))
    option(parser, "--input", "type of images", default="float", choices=INPUTS)
    option(parser, "--batch B", "images at once", whole_number(1), 1)
    option(parser, "--logits", "logits of every pixel, too", bool)
    text = "no shape may depend on the data, as compilers for GPUs want it; slower on CPUs"
    option(parser, "--static", text, bool)


def run(args: argparse.Namespace) -> int:
    policy = None if args.policy == "given" else args.policy
    check_outputs([args.out], input_files(args.config, None, args.checkpoint))
    loaded, config = load(args.checkpoint), None
    if args.config is not None:
        chosen = [f"model.mask.policy={policy}"] if policy else []
        config = load_config(args.config, [*overrides(args), *chosen])
        check_classes(config)
    elif args.set:
        args.usage_error("argument --set: overrides a config; name one before CHECKPOINT")
    elif policy:
        mask = dataclasses.replace(loaded.config.mask, policy=policy)
        loaded = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, mask=mask))
    if config is not None and config.model.mask.threshold is None is not loaded.config.mask.threshold:
        print("note: the config's fine fraction replaces the checkpoint's threshold")
    model, card = network_of(loaded, config), read_card(loaded, config)
    check_dense(args, model, "policy", "merge")
    options = ExportOptions(
        size=args.size,
        batch=args.batch,
        dense=args.dense,
        given=args.policy == "given",
        merge=args.merge,
        input=args.input,
        fine_fraction=args.fine_fraction,
        mean=card.mean,
        std=card.std,
        logits=args.logits,
        ghosts=not args.static,
        tiles=not args.static,
    )
    metadata = export_onnx(model, args.out, options, card.names, card.colours)
    side, fraction = "x".join(map(str, args.size)), metadata.get("fine_fraction")
    kind = (
        f"dense at output stride {args.dense}" if fraction is None else f"{100 * fraction:.1f} % fine blocks"
    )
    print(f"{args.out}: {side} px, {kind}; equal to the model in onnxruntime")
    frame = card.frame or card.at_most
    if frame is not None and card.scale_for(*args.size) != 1:
        print(f"note: trained on frames of about {frame[0]}x{frame[1]} px; a --size near that suits it best")
    return 0
