"""The schema of configs: every key with its type, default, bounds or choices, and meaning.

`docs/config.md` is made of it. Bounds are wide: they keep out what would crash, hang or mean another unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparse_seg.config.keys import function_key, key, section
from sparse_seg.registry import BACKBONES, DATASETS, HEADS, POLICIES

STAGES = ("layer1", "layer2", "layer3", "layer4")
STRIDES = ([8, 16], [8, 16, 32], [4, 8, 16], [16, 32])  # of our networks; the first is the default
MODULE_STRIDES = ([4, 8], [32, 64], [16, 32, 64])  # more, of others
# of a model: how a network runs, not what it computes dense
RUN_SETTINGS = ("mask", "exchange", "engine", "merge", "strides")
BITS = (10, 12, 14, 16)  # of cameras whose files have 16 per channel
SEPARABLE = ("none", "linear", "normed")
RGB = ("red", "green", "blue")
LOOKS_LIKE_BYTES = "these look like 0..255; divide by 255"
CHANNELS, COUNT, SEED = "[1, 8192]", "[1, 1e9]", "[0, 4294967295]"
SHARE, SCORE, WEIGHT = "[0, 1]", "[-1e6, 1e6]", "[0, 1000]"


@dataclass
class MaskConfig:
    policy: str = key("edge", "how fine blocks are chosen", POLICIES)
    fine_fraction: float = key(0.15, "share of blocks that become fine, exact per image", SHARE)
    threshold: float | None = key(None, "replaces fine_fraction: blocks scoring above it are fine", SCORE)
    middle_fraction: float = key(0.2, "with three strides, share of blocks that get the middle one", SHARE)
    middle_threshold: float | None = key(None, "threshold of the middle stride", SCORE)
    seed: int = key(0, "seed of the random policy in eval", SEED)
    edge: str = key("sobel", "rule of the edge policy", ("sobel", "cad"))
    oracle: str = key("boundary", "rule of the oracle policy", ("boundary", "change", "gain"))
    uncertainty: str = key("entropy", "what confidence looks at", ("entropy", "margin", "boundary"))
    reduce: str = key("max", "how a block sums up its uncertainty", ("max", "mean"))
    neighbours: bool = key(False, "whether a block is as uncertain as its most uncertain neighbour")
    blur: bool = key(False, "smooth any policy's scores over neighbours, so that fine blocks cluster")
    stored_dtype: str | None = key(
        None, "what confidence stores of its coarse pass; null: as it is", ("float16", "bfloat16")
    )
    options: dict[str, Any] = key({}, "options of a policy registered from outside")


@dataclass
class ModelConfig:
    module: str | None = function_key(
        None, "PACKAGE:CALLABLE that returns any network (an nn.Module), in place of backbone and head"
    )
    module_args: dict[str, Any] = function_key({}, "arguments of module")
    backbone: str = function_key("resnet18", "network up to the last stage", BACKBONES)
    width: float = function_key(1.0, "multiplier of the backbone's channels", "(0, 8]")
    depths: list[int] | None = function_key(
        None, "blocks of each stage; null: the backbone's", "[1, 128]", items=STAGES
    )
    stem: str = function_key("conv7", "a 7x7 convolution, or three 3x3 (deep)", ("conv7", "deep"))
    shortcut: str = function_key("conv", "strided 1x1, or 1x1 after a 2x2 mean", ("conv", "avg_pool"))
    entry_spacings: list[int] = function_key(
        [4, 8, 16], "px between taps of each stage's first 3x3; smp's: 16, 32", "[4, 1024]", items=STAGES[1:]
    )
    dilate_second: bool = function_key(True, "false: basic blocks' second 3x3 as mmsegmentation's (no P1)")
    bn_eps: float = function_key(1e-5, "epsilon of batch norm", "[1e-12, 1]")
    pretrained: str | None = key(None, "checkpoint of any known source that training starts from", path=True)
    head: str = function_key("lite", "what turns the last stage into logits", HEADS)
    head_channels: int | None = key(
        None, "null: 128 for lite, 256 for deeplab*, a quarter of the input for fcn", CHANNELS
    )
    num_classes: int | None = function_key(None, "null: the dataset's", "[2, 255]")
    aspp_rates: list[int] = function_key(
        [12, 24, 36], "dilations of ASPP at trained_stride", "[1, 1024]", items=16
    )
    aspp_separable: str = function_key(
        "none", "ASPP's 3x3 as depthwise and 1x1: linear, or normed with norm and ReLU between", SEPARABLE
    )
    aspp_projection: bool = function_key(True, "1x1 over ASPP's branches; mmsegmentation has refine alone")
    refine: bool = function_key(True, "dense 3x3 after ASPP")
    separable: str = function_key("none", "as aspp_separable, for deeplab*'s dense 3x3", SEPARABLE)
    refine_separable: str | None = function_key(
        None, "as separable, for the dense 3x3 after ASPP; null: as separable says", SEPARABLE
    )
    low_level_channels: int = function_key(48, "channels of deeplabv3plus's skip", CHANNELS)
    decoder_convs: int = function_key(1, "3x3 convolutions after deeplabv3plus's skip", "[1, 64]")
    align_corners: bool = function_key(False, "corner alignment of upsampling")
    exchange: str = key(
        "linear",
        "what a 3x3 reads where there is no site; separate: levels do not read each other at all",
        ("linear", "nearest", "none", "separate"),
    )
    engine: str = key(
        "auto",
        "what runs convolutions at extra sites; auto: gather; spconv: the 3x3 ones; triton: on CUDA, without "
        "gradients",
        ("auto", "gather", "spconv", "triton"),
    )
    merge: str = key(
        "whole",
        "whole: the head decodes densified rows; patch: coarse blocks keep the coarse pass's logits",
        ("whole", "patch"),
    )
    strides: list[int] | None = key(
        None,
        "output strides that the mask chooses from; null: those of the checkpoint's module, or module's own "
        "output stride and twice it, else [8, 16]",
        (*STRIDES, *MODULE_STRIDES),
    )
    trained_stride: int = function_key(8, "output stride that the head is trained at", (8, 16, 32))
    auxiliary: bool = key(False, "FCN head on layer3, in training only")
    backbone_options: dict[str, Any] = function_key({}, "options of a backbone registered from outside")
    head_options: dict[str, Any] = function_key({}, "options of a head registered from outside")
    mask: MaskConfig = section(MaskConfig)

    @property
    def own_strides(self) -> list[int]:
        """`strides` of a network of ours."""
        return self.strides or STRIDES[0]


@dataclass
class DataConfig:
    dataset: str = key("scenes", "classes and file layout", DATASETS)
    root: str = key("runs/scenes", "the dataset's folder", path=True)
    train_on: list[str] = key(["train"], "splits whose frames train")
    withheld: list[str] | None = key(
        None,
        "sequences by which to judge: frames of train_on whose names begin so validate, and do not train; "
        "null: split val validates",
    )
    crop: list[int] = key([256, 256], "size of training crops, px", "[32, 16384]", items=("height", "width"))
    scale_range: list[float] = key(
        [0.5, 2.0], "factors of random scaling in training", "[0.01, 100]", items=("low", "high")
    )
    flip: bool = key(True, "mirror half of the training samples")
    jitter: float = key(0.3, "strength of random brightness, contrast and saturation", "[0, 1)")
    gamma: float = key(0.0, "random light: values 0..1 to a power in exp(-gamma)..exp(gamma)", "[0, 5]")
    tint: float = key(0.0, "strength of random coloured light: red, green and blue apart", "[0, 1)")
    mean: list[float] = function_key(
        [0.485, 0.456, 0.406], "mean of images in 0..1", SHARE, items=RGB, above=LOOKS_LIKE_BYTES
    )
    std: list[float] = function_key(
        [0.229, 0.224, 0.225],
        "standard deviation of images in 0..1",
        "[0.001, 1]",
        items=RGB,
        above=LOOKS_LIKE_BYTES,
    )
    bits: int | None = key(
        None, "bits per channel used in 16-bit images; null: 12 or 16, as all splits' values tell", BITS
    )
    workers: int = key(0, "processes that load data; 0: none but the main one", "[0, 256]")
    cache: bool = key(False, "keep decoded training frames in memory, in each worker")
    on_device: bool = key(
        False,
        "keep training frames, all of one size, on the training's device and augment them there; workers "
        "then serve validation alone",
    )


@dataclass
class LossConfig:
    class_weights: list[float] | None = key(None, "weight of each class", "[0, 1e6]")
    ohem_threshold: float | None = key(None, "keep pixels of a lower true-class probability", "(0, 1)")
    ohem_min_kept: float = key(0.1, "but never fewer than this share of each process's pixels", SHARE)
    auxiliary_weight: float = key(0.4, "weight of the auxiliary head's loss", WEIGHT)
    boundary_weight: float = key(0.0, "added weight of pixels near label boundaries", WEIGHT)
    boundary_width: int = key(3, "how near, px", "[1, 64]")
    fine_weight: float = key(0.0, "added weight of pixels in blocks that the mask makes fine", WEIGHT)
    coarse_weight: float = key(0.0, "weight of the loss on the coarse lattice's own logits", WEIGHT)
    coarse_distill_weight: float = key(
        0.0, "weight of distilling the network's own prediction into the coarse lattice's logits", WEIGHT
    )

    @property
    def reads_coarse_logits(self) -> bool:
        return max(self.coarse_weight, self.coarse_distill_weight) > 0


@dataclass
class DistillConfig:
    teacher: str | None = key(
        None, "checkpoint of a network trained before; null: no distillation", path=True
    )
    cache: str | None = key(
        None, "folder to keep the teacher's outputs in; null: run it each time", path=True
    )
    logits_weight: float = key(1.0, "weight of the divergence from the teacher's classes", WEIGHT)
    temperature: float = key(2.0, "both networks' logits are divided by it", "[0.01, 1000]")
    features_weight: float = key(1.0, "weight of the difference in which sites are alike", WEIGHT)
    fine_weight: float = key(1.0, "added weight of sites in blocks that the mask makes fine", WEIGHT)


@dataclass
class TrainConfig:
    init: str | None = key(None, "checkpoint of ours whose network training starts from", path=True)
    freeze: bool = key(False, "train the learned mask alone, and leave the network as it is")
    mask_loss: str = key(
        "straight_through", "how a learned mask is trained", ("straight_through", "supervised")
    )
    budget_weight: float = key(10.0, "straight_through: weight of (fine share - fine_fraction)^2", "[0, 1e6]")
    iterations: int = key(1000, "training steps", COUNT)
    batch_size: int = key(8, "images a step, of all processes together", "[1, 65536]")
    network: str = key("dense", "what runs in training and validation", ("dense", "selective"))
    output_stride: int | None = key(
        None,
        "output stride of the dense network; null: 8, of a module the finest of its strides",
        (4, 8, 16, 32),
    )
    optimizer: str = key("sgd", "SGD with momentum, or AdamW", ("sgd", "adamw"))
    lr: float = key(0.01, "highest learning rate", "(0, 1000]")
    momentum: float = key(0.9, "momentum of sgd", "[0, 1)")
    weight_decay: float = key(1e-4, "weight decay; biases and norms get none", "[0, 100]")
    warmup_iterations: int = key(0, "steps over which the learning rate rises", "[0, 1e9]")
    poly_power: float = key(0.9, "power of the learning rate's decay", "[0, 100]")
    loss: LossConfig = section(LossConfig)
    distill: DistillConfig = section(DistillConfig)
    amp: bool = key(False, "train in mixed precision")
    amp_dtype: str = key("bfloat16", "dtype of mixed precision", ("bfloat16", "float16"))
    clip_grad_norm: float | None = key(None, "largest norm of the gradient; null: any", "(0, 1e9]")
    ema_decay: float | None = key(None, "decay of the averaged weights; null: no averaging", "[0, 1)")
    seed: int = key(0, "seed of weights, sample order and augmentation", SEED)
    threads: int | None = key(None, "CPU threads; null: PyTorch's choice", "[1, 1024]")
    log_every: int = key(10, "steps between lines of the log", COUNT)
    eval_every: int = key(500, "steps between validations", COUNT)
    save_every: int = key(100, "steps between checkpoints to resume from", COUNT)
    eval_images: int | None = key(None, "validate on the first so many images; null: all", COUNT)
    tensorboard: bool = key(False, "also write TensorBoard's log")


@dataclass
class Config:
    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    train: TrainConfig = section(TrainConfig)
