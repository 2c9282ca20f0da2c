"""Fit the mask policy `gain` to a trained network, in a minute or two on labelled frames.

The network stays as it is: its coarse and selective predictions on the frames tell where a fine look helped,
and a small net learns to expect it. The checkpoint that is written holds both, runs with policy gain and
merge patch (merge whole where the network cannot), and is otherwise the one given.

examples:
  sparse-seg fit-gain configs/camvid_light.yaml runs/camvid_light/best.safetensors light_gain.safetensors
  sparse-seg fit-gain configs/converted.yaml r101.safetensors r101_gain.safetensors --without-labels
"""

import argparse
import dataclasses
from pathlib import Path

from sparse_seg.checkpoint import save
from sparse_seg.cli.arguments import option
from sparse_seg.cli.options import add_config, add_data, add_device, merges, opened, output_file
from sparse_seg.errors import ConfigError
from sparse_seg.run.way import Way
from sparse_seg.training.gain import collect, fit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, checkpoint=True)
    option(parser, "out OUT", "checkpoint to write, .safetensors", output_file)
    add_data(parser, "train")
    option(parser, "--without-labels", "take the network's own dense prediction for the truth", bool)
    option(parser, "--seed", "of masks and net", int, 0)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    config, loaded, model, dataset, *_ = opened(args, args.device, args.out)
    if not model.refines(Way()):
        raise ConfigError(
            "policy gain refines a coarse pass, which model.dilate_second=false, model.exchange=separate and "
            "layers of a module that mix phases do not allow; choose another policy"
        )
    merge = merges(model)[-1]
    samples = collect(
        model.for_inference(), dataset, config.data, not args.without_labels, args.limit, args.seed, merge
    )
    net = fit(samples, args.seed, bn_eps=loaded.config.bn_eps)
    weights = {name: tensor for name, tensor in loaded.weights.items() if not name.startswith("policy.")}
    weights |= {f"policy.net.{name}": tensor for name, tensor in net.state_dict().items()}
    mask = dataclasses.replace(loaded.config.mask, policy="gain")
    settings = dataclasses.replace(loaded.config, mask=mask, merge=merge)
    save(dataclasses.replace(loaded, path=Path(args.out), weights=weights, config=settings))
    print(f"{args.out}: run it with --set model.mask.policy=gain model.merge={merge}")
    return 0
