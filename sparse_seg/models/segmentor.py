"""The network: images -> stages on a layout -> head -> logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse_seg.masks import ConfidencePolicy, LearnedPolicy, MaskPolicy, OraclePolicy
from sparse_seg.models.heads import LOW_LEVEL_STRIDE
from sparse_seg.models.layouts import check_images, dense_layouts, selective_layouts
from sparse_seg.models.refinement import Refinement, refine
from sparse_seg.models.resnet import ResNet, first_selective_stage
from sparse_seg.models.upsample import at_least_float32, upsample_classes, upsample_logits
from sparse_seg.sparse import SiteLayout, rows_to_grid


class Outputs(NamedTuple):
    """Logits `[B, K, H, W]`, and those of the auxiliary head (None without one or outside training)."""

    logits: Tensor
    auxiliary: Tensor | None


class GridOutputs(NamedTuple):
    """Before the last upsampling: the stages' rows and layouts, and the head's logits `[B, K, h, w]`."""

    features: Sequence[Tensor]
    layouts: Sequence[SiteLayout]
    logits: Tensor


class Segmentation(NamedTuple):
    """What the network makes of images, and the mask it ran with: bool or int64 `[B, Hc, Wc]`."""

    outputs: Outputs
    fine_blocks: Tensor


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module's own mode is put back, for a frozen network mixes them."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class SelectiveSegmentor(nn.Module):
    """A segmentation network that runs coarse everywhere and fine where a mask asks for it.

    One set of weights serves `model(images)` (mask by the policy), `model(images, fine_blocks=mask)` and
    `model.dense(images, output_stride=8)`.

    Args:
        backbone, head, policy: built by `build_model`.
        trained_stride: output stride the head's last upsampling was trained at, in pixels.
        auxiliary: head on layer3's rows, used in training only.
        strides: strides in pixels between which the mask chooses, finest first, each twice the one before.
            A block is one cell of the coarsest grid.
        align_corners: of the last upsampling.
    """

    def __init__(
        self,
        backbone: ResNet,
        head: nn.Module,
        policy: MaskPolicy,
        trained_stride: int = 8,
        auxiliary: nn.Module | None = None,
        strides: tuple[int, ...] = (8, 16),
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.auxiliary = backbone, head, auxiliary
        self.policy, self.trained_stride, self.strides = policy, trained_stride, strides
        self.align_corners = align_corners

    def forward(self, images: Tensor, fine_blocks: Tensor | None = None) -> Tensor:
        """Logits `[B, K, H, W]` of normalised images `[B, 3, H, W]`, any size from 32x32 up.

        Args:
            fine_blocks: `[B, ceil(H/s), ceil(W/s)]` for the coarsest stride s: bool, the blocks at the finest
                stride; or int64 levels, 0 for the coarsest stride up to the number of strides - 1 for the
                finest. By default the policy chooses.

        Raises:
            ValueError: images or mask of a wrong shape or dtype.
        """
        if fine_blocks is None:
            return self.segment(images).outputs.logits
        return self.outputs(images, self.selective_layouts(images, fine_blocks)).logits

    def segment(
        self, images: Tensor, labels: Tensor | None = None, policy: MaskPolicy | None = None
    ) -> Segmentation:
        """Outputs under the mask that a policy chooses, and the mask.

        Args:
            labels: int64 `[B, H, W]`, for policies that read them (oracle).
            policy: in place of the model's own.
        """
        grid, fine_blocks = self._segment(images, labels, policy)
        return Segmentation(self.finish(images, grid), fine_blocks)

    @torch.inference_mode()
    def classify(
        self,
        images: Tensor,
        output_stride: int | None = None,
        policy: MaskPolicy | None = None,
        labels: Tensor | None = None,
        fine_blocks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Classes int64 `[B, H, W]`, for less than by every pixel's logits, and the mask (None when dense).

        Args:
            output_stride: run dense at this stride; None runs as `segment` does.
            policy, labels: as for `segment`.
            fine_blocks: the mask, where no policy is to choose it.
        """
        if output_stride is not None:
            grid = self._run(images, self.dense_layouts(images, output_stride))
        elif fine_blocks is not None:
            grid = self._run(images, self.selective_layouts(images, fine_blocks))
        else:
            grid, fine_blocks = self._segment(images, labels, policy)
        return self.upsample_classes(grid.logits, images, grid.layouts[-1]), fine_blocks

    def _segment(
        self, images: Tensor, labels: Tensor | None, policy: MaskPolicy | None
    ) -> tuple[GridOutputs, Tensor]:
        policy = policy or self.policy
        check_images(images)
        if isinstance(policy, ConfidencePolicy) and not self.training:
            run = Refinement(self, images, policy.stored_dtype)
            fine_blocks = policy.cut(run.scores(policy))
            run.refine(fine_blocks)
            return GridOutputs((), run.layouts, run.grid_logits), fine_blocks
        if isinstance(policy, LearnedPolicy):
            return self._segment_by_features(images, policy)
        fine_blocks = self.choose(images, labels, policy)
        return self._run(images, self.selective_layouts(images, fine_blocks)), fine_blocks

    def refine(
        self,
        images: Tensor,
        fractions: Sequence[float] | None = None,
        milliseconds: float | None = None,
    ) -> Iterator[Tensor]:
        """Anytime prediction: logits `[B, K, H, W]`, better and better; a step pays for its new sites only.

        Args:
            fractions: rising shares of fine blocks, a result for each; 0 is the dense network at the coarsest
                stride. With three strides the policy's `middle_fraction` follows in rank.
            milliseconds: in place of fractions, the time to spend. The first result is the coarse network's,
                later ones come as long as a further step fits, by the cost measured so far.

        Blocks are ranked once, by the confidence policy (the model's own, else its defaults). Results after
        the first differ from one-shot ones only where new sites lie next to those of an earlier step.

        Raises:
            ValueError: both or neither given, fractions that do not rise, or a model in training mode.
        """
        return (step.logits for step in refine(self, images, fractions, milliseconds))

    def dense(self, images: Tensor, output_stride: int = 8) -> Tensor:
        """Logits `[B, K, H, W]` of the same weights run dense at output stride 4, 8, 16 or 32."""
        return self.outputs(images, self.dense_layouts(images, output_stride)).logits

    def for_inference(self) -> SelectiveSegmentor:
        """A fast copy for prediction only (see `models/inference.py`).

        Raises:
            ValueError: the model is in training mode.
        """
        from sparse_seg.models.inference import for_inference  # it builds a network of this class

        return for_inference(self)

    def outputs(self, images: Tensor, layouts: list[SiteLayout]) -> Outputs:
        """Run on the four stages' layouts, as `selective_layouts` or `dense_layouts` give them."""
        return self.finish(images, self._run(images, layouts))

    def _run(self, images: Tensor, layouts: list[SiteLayout]) -> GridOutputs:
        with self.precision(images):
            features = self.backbone(images, layouts)
            return GridOutputs(features, layouts, self.grid_logits(features, layouts))

    def finish(self, images: Tensor, grid: GridOutputs) -> Outputs:
        """What follows the head's logits: upsampling and, in training, the auxiliary head."""
        auxiliary = None
        if self.auxiliary is not None and self.training:
            logits = self.auxiliary(grid.features[2], grid.layouts[2])
            auxiliary = self._upsample(logits, images, grid.layouts[2].stride, self.trained_stride)
        return Outputs(self.upsample(grid.logits, images, grid.layouts[-1]), auxiliary)

    def grid_logits(self, features: Sequence[Tensor], layouts: Sequence[SiteLayout]) -> Tensor:
        """The head's logits `[B, K, h, w]`, before the last upsampling.

        Args:
            features, layouts: of the stages, of which the first and the last are read.
        """
        if not self._uses_low_level:
            return self.head(features[-1], layouts[-1])
        low_level = rows_to_grid(features[0], layouts[0].batch, layouts[0].size)
        return self.head(features[-1], layouts[-1], low_level)

    @property
    def _uses_low_level(self) -> bool:
        return getattr(self.head, "uses_low_level", False)

    def _segment_by_features(self, images: Tensor, policy: LearnedPolicy) -> tuple[GridOutputs, Tensor]:
        """The dense stages, then the mask from their features, then the others."""
        first, layouts = self.first_selective, self.dense_layouts(images, self.strides[0])
        with self.precision(images):
            early = self.backbone(images, layouts[:first])
            with torch.no_grad():
                fine_blocks = policy.cut(policy.feature_scores(self.mask_features(early, layouts)))
            layouts = self.selective_layouts(images, fine_blocks)
            features = [*early, *self.backbone.run_stages(early[-1], layouts, first)]
            return GridOutputs(features, layouts, self.grid_logits(features, layouts)), fine_blocks

    @cached_property
    def has_undilated(self) -> bool:
        """Whether some convolution's taps depend on the mask (`model.dilate_second: false`)."""
        return any(getattr(module, "spacing", 0) is None for module in self.modules())

    @property
    def first_selective(self) -> int:
        """Index of the first stage whose stride the mask decides."""
        return first_selective_stage(self.strides[0])

    def mask_features(self, features: Sequence[Tensor], layouts: Sequence[SiteLayout]) -> Tensor:
        """What the learned policy reads, `[B, C, h, w]`: the output of the last stage before the mask."""
        last = self.first_selective - 1
        return rows_to_grid(features[last], layouts[last].batch, layouts[last].size)

    def precision(self, images: Tensor) -> AbstractContextManager:
        """The precision that the network runs in: here whatever autocast asks for."""
        return nullcontext()

    def upsample(self, grid_logits: Tensor, images: Tensor, layout: SiteLayout, every: int = 1) -> Tensor:
        """The head's logits `[B, K, h, w]` at the images' size, in float32 or more; see `upsample_logits`."""
        return self._upsample(grid_logits, images, *self._upsampling(layout), every)

    def _upsample(
        self, logits: Tensor, images: Tensor, stride: int, trained_stride: int, every: int = 1
    ) -> Tensor:
        size = (images.shape[2], images.shape[3])
        return upsample_logits(
            at_least_float32(logits), size, stride, trained_stride, self.align_corners, every
        )

    def _upsampling(self, layout: SiteLayout) -> tuple[int, int]:
        """The stride of the head's logits, and that whose offset it was trained with."""
        return (LOW_LEVEL_STRIDE,) * 2 if self._uses_low_level else (layout.stride, self.trained_stride)

    def upsample_classes(self, grid_logits: Tensor, images: Tensor, layout: SiteLayout) -> Tensor:
        """The classes int64 `[B, H, W]` that `upsample`'s logits have; see the function of this name."""
        size = (images.shape[2], images.shape[3])
        logits = at_least_float32(grid_logits)
        return upsample_classes(logits, size, *self._upsampling(layout), self.align_corners)

    def choose(
        self, images: Tensor, labels: Tensor | None = None, policy: MaskPolicy | None = None
    ) -> Tensor:
        """The mask `[B, Hc, Wc]` before the network runs. For the confidence policy a coarse pass is run,
        in eval mode; for an oracle that reads them, in eval mode only, the two dense ones. The learned
        policy, which reads a run's features, is not served."""
        policy = policy or self.policy
        if isinstance(policy, OraclePolicy) and policy.reads == "dense" and not self.training:
            fine, coarse = self.dense_classes(images)
            return policy.cut(policy.class_scores(fine, coarse, labels))
        if not isinstance(policy, ConfidencePolicy):
            return policy(images, labels)
        with eval_mode(self):
            return policy.cut(Refinement(self, images).scores(policy))

    @torch.no_grad()
    def dense_classes(self, images: Tensor, early: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Predicted classes int64 `[B, H, W]`, dense at the finest stride and dense at the coarsest.

        Args:
            early: rows of the stages that the mask does not decide; by default they are run.
        """
        first = self.first_selective
        layouts = [self.dense_layouts(images, stride) for stride in (self.strides[0], self.strides[-1])]
        with self.precision(images):
            early = self.backbone(images, layouts[0][:first]) if early is None else early
            classes = []
            for one in layouts:
                late = self.backbone.run_stages(early[-1], one, first)
                grid_logits = self.grid_logits([*early, *late], one)
                classes.append(self.upsample_classes(grid_logits, images, one[-1]))
        return classes[0], classes[1]

    def selective_layouts(self, images: Tensor, fine_blocks: Tensor | None = None) -> list[SiteLayout]:
        """Layouts of layer1..layer4: each on its natural stride, but at most the coarsest of `strides`, with
        the finer levels that the mask (by default the policy's) asks for; stages above the finest stride are
        dense."""
        check_images(images)  # before a policy sees them
        blocks = self.policy(images) if fine_blocks is None else fine_blocks
        return selective_layouts(images, blocks, self.strides)

    def dense_layouts(self, images: Tensor, output_stride: int) -> list[SiteLayout]:
        """Layouts of layer1..layer4 of the plain dense network."""
        return dense_layouts(images, output_stride)
