"""The schema of configs: every key, its type, its default and its meaning."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class MaskConfig:
    policy: str = "edge"  # uniform | random | edge | confidence | learned | oracle
    fine_fraction: float = 0.15  # share of blocks that become fine, exact per image
    threshold: float | None = None  # when set, it replaces fine_fraction: blocks scoring above it are fine
    middle_fraction: float = 0.2  # with three strides, share of blocks that get the middle one
    middle_threshold: float | None = None  # with three strides and a threshold, that of the middle stride
    seed: int = 0  # of the random policy in eval
    edge: str = "sobel"  # sobel | cad: rule of the edge policy
    oracle: str = (
        "boundary"  # boundary (of labels) | change (that dense makes) | gain (by labels): bounds, not
    )
    #   savings; the last two run the whole dense network, at the finest and the coarsest stride
    uncertainty: str = "entropy"  # entropy | margin | boundary: what the confidence policy looks at
    reduce: str = "max"  # max | mean: of the uncertainty over a block
    neighbours: bool = False  # whether a block is as uncertain as its most uncertain neighbour
    blur: bool = False  # smooth the scores of any policy over neighbouring blocks, so that fine ones cluster
    stored_dtype: str | None = None  # float16: keep the coarse pass's activations so; null: as they are


@dataclasses.dataclass
class ModelConfig:
    backbone: str = "resnet18"  # resnet18 | resnet34 | resnet50 | resnet101
    width: float = 1.0  # multiplier of the backbone's widths
    depths: list[int] | None = None  # blocks of each stage; default: the backbone's
    stem: str = "conv7"  # conv7 | deep (three 3x3 convolutions)
    shortcut: str = "conv"  # conv | avg_pool (2x2 mean before the 1x1 of a strided shortcut)
    entry_spacings: list[int] = dataclasses.field(default_factory=lambda: [4, 8, 16])  # px between taps of
    #   the first 3x3 of layer2..layer4; smp's dilated stages have 16 in layer3, 32 in layer4
    dilate_second: bool = True  # false: second 3x3 of basic blocks undilated, as mmsegmentation's (no P1)
    bn_eps: float = 1e-5
    pretrained: str | None = None  # checkpoint to start training from; see README, Converting checkpoints
    head: str = "lite"  # lite | deeplabv3 | deeplabv3plus | fcn
    head_channels: int | None = None  # default: 128 for lite, 256 for deeplab*, input / 4 for fcn
    num_classes: int | None = None  # default: the dataset's
    aspp_rates: list[int] = dataclasses.field(default_factory=lambda: [12, 24, 36])  # at trained_stride
    aspp_separable: str = "none"  # none | linear (depthwise, 1x1) | normed (depthwise, norm, ReLU, 1x1)
    aspp_projection: bool = True  # 1x1 over ASPP's branches; mmsegmentation has `refine` alone
    refine: bool = True  # dense 3x3 after ASPP
    separable: str = "none"  # of the dense 3x3 convolutions of deeplab*: as aspp_separable
    low_level_channels: int = 48  # of deeplabv3plus's skip
    decoder_convs: int = 1  # 3x3 convolutions after deeplabv3plus's skip
    align_corners: bool = False  # of upsampling
    exchange: str = "linear"  # linear | nearest | none
    engine: str = "auto"  # auto (spconv on CUDA where it works, else gather) | gather | spconv
    strides: list[int] = dataclasses.field(default_factory=lambda: [8, 16])  # or [8, 16, 32] or [4, 8, 16]
    trained_stride: int = 8  # output stride whose upsampling offset the head is trained with
    auxiliary: bool = False  # FCN head on layer3, in training only
    mask: MaskConfig = dataclasses.field(default_factory=MaskConfig)


@dataclasses.dataclass
class DataConfig:
    dataset: str = "scenes"  # cityscapes | camvid | scenes
    root: str = "runs/scenes"
    crop: list[int] = dataclasses.field(default_factory=lambda: [256, 256])  # height, width of training crops
    scale_range: list[float] = dataclasses.field(default_factory=lambda: [0.5, 2.0])
    flip: bool = True
    jitter: float = 0.3
    mean: list[float] = dataclasses.field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = dataclasses.field(default_factory=lambda: [0.229, 0.224, 0.225])
    workers: int = 0


@dataclasses.dataclass
class LossConfig:
    class_weights: list[float] | None = None  # one per class
    ohem_threshold: float | None = None  # keep pixels whose true class has a probability below it
    ohem_min_kept: float = 0.1  # but never fewer than this share of pixels
    auxiliary_weight: float = 0.4
    boundary_weight: float = 0.0  # added weight of pixels near label boundaries; 1 counts them twice
    boundary_width: int = 3  # how near, px
    fine_weight: float = 0.0  # added weight of pixels in blocks that the mask makes fine
    coarse_weight: float = 0.0  # weight of the loss of the coarse lattice's own logits


@dataclasses.dataclass
class DistillConfig:
    teacher: str | None = None  # checkpoint of a network trained before; null: no distillation
    cache: str | None = None  # folder to keep the teacher's outputs in, by image; null: run it each time
    logits_weight: float = 1.0  # of the divergence from the teacher's class probabilities
    temperature: float = 2.0  # both networks' logits are divided by it
    features_weight: float = 1.0  # of the difference in which sites are alike
    fine_weight: float = 1.0  # added weight of sites in blocks that the mask makes fine


@dataclasses.dataclass
class TrainConfig:
    init: str | None = None  # checkpoint of ours whose network training starts from
    freeze: bool = False  # train the learned mask alone, and leave the network as it is
    mask_loss: str = "straight_through"  # straight_through | supervised: of the learned mask
    budget_weight: float = 10.0  # straight_through: weight of (share of fine blocks - fine_fraction)^2
    iterations: int = 1000
    batch_size: int = 8  # of all processes together
    network: str = "dense"  # dense | selective: what runs in training and validation
    output_stride: int = 8  # of the dense network
    optimizer: str = "sgd"  # sgd | adamw
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_iterations: int = 0
    poly_power: float = 0.9
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    amp: bool = False
    amp_dtype: str = "bfloat16"  # bfloat16 | float16
    clip_grad_norm: float | None = None
    ema_decay: float | None = None
    seed: int = 0
    threads: int | None = None  # CPU threads; default: PyTorch's choice
    log_every: int = 10
    eval_every: int = 500
    save_every: int = 100
    eval_images: int | None = None  # validate on the first so many images only
    tensorboard: bool = False


@dataclasses.dataclass
class Config:
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
