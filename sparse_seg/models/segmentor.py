"""The network: images -> stages on a layout -> head -> logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse_seg.masks import MaskPolicy, block_shape
from sparse_seg.models.heads import LOW_LEVEL_STRIDE
from sparse_seg.models.resnet import STAGE_STRIDES, ResNet
from sparse_seg.models.upsample import upsample_logits
from sparse_seg.sparse import SiteLayout, rows_to_grid

MIN_SIZE = 32  # pixels; below it the coarsest stage has no cell left


class Outputs(NamedTuple):
    """Logits `[B, K, H, W]`, and those of the auxiliary head (None without one or outside training)."""

    logits: Tensor
    auxiliary: Tensor | None


class SelectiveSegmentor(nn.Module):
    """A segmentation network that runs coarse everywhere and fine where a mask asks for it.

    One set of weights serves `model(images)` (mask by the policy), `model(images, fine_blocks=mask)` and
    `model.dense(images, output_stride=8)`.

    Args:
        backbone, head, policy: built by `build_model`.
        trained_stride: output stride the head's last upsampling was trained at, in pixels.
        auxiliary: head on layer3's rows, used in training only.
        align_corners: of the last upsampling.
    """

    def __init__(
        self,
        backbone: ResNet,
        head: nn.Module,
        policy: MaskPolicy,
        trained_stride: int = 8,
        auxiliary: nn.Module | None = None,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.auxiliary = backbone, head, auxiliary
        self.policy, self.trained_stride, self.align_corners = policy, trained_stride, align_corners

    def forward(self, images: Tensor, fine_blocks: Tensor | None = None) -> Tensor:
        """Logits `[B, K, H, W]` of normalised images `[B, 3, H, W]`, any size from 32x32 up.

        Args:
            fine_blocks: bool `[B, ceil(H/16), ceil(W/16)]`; by default the policy chooses.

        Raises:
            ValueError: images or mask of a wrong shape or dtype.
        """
        return self.outputs(images, self.selective_layouts(images, fine_blocks)).logits

    def dense(self, images: Tensor, output_stride: int = 8) -> Tensor:
        """Logits `[B, K, H, W]` of the same weights run dense at output stride 8, 16 or 32."""
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
        features = self.backbone(images, layouts)
        auxiliary = None
        if self.auxiliary is not None and self.training:
            auxiliary = self._upsample(self.auxiliary(features[2], layouts[2]), images, layouts[2].stride)
        return Outputs(self._logits(images, features, layouts), auxiliary)

    def grid_logits(self, features: list[Tensor], layouts: list[SiteLayout]) -> Tensor:
        """The head's logits `[B, K, h, w]` from the stages' rows, before the last upsampling."""
        if not getattr(self.head, "uses_low_level", False):
            return self.head(features[3], layouts[3])
        low_level = rows_to_grid(features[0], layouts[0].batch, layouts[0].size)
        return self.head(features[3], layouts[3], low_level)

    def _logits(self, images: Tensor, features: list[Tensor], layouts: list[SiteLayout]) -> Tensor:
        logits = self.grid_logits(features, layouts)
        if not getattr(self.head, "uses_low_level", False):
            return self._upsample(logits, images, layouts[3].stride)
        return self._upsample(logits, images, LOW_LEVEL_STRIDE, LOW_LEVEL_STRIDE)

    def _upsample(
        self, logits: Tensor, images: Tensor, stride: int, trained_stride: int | None = None
    ) -> Tensor:
        size = (images.shape[2], images.shape[3])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return upsample_logits(
            logits, size, stride, trained_stride or self.trained_stride, self.align_corners
        )

    def selective_layouts(self, images: Tensor, fine_blocks: Tensor | None = None) -> list[SiteLayout]:
        """Layouts of layer1..layer4: dense at 4 and 8, then two levels by the mask."""
        _check_images(images)
        if fine_blocks is None:
            fine_blocks = self.policy(images)
        if tuple(fine_blocks.shape) != block_shape(images) or fine_blocks.dtype != torch.bool:
            raise ValueError(
                f"fine_blocks must be bool {list(block_shape(images))} for images {list(images.shape)}, "
                f"not {fine_blocks.dtype} {list(fine_blocks.shape)}"
            )
        quarter, eighth = (_dense_layout(images, stride) for stride in STAGE_STRIDES[:2])
        selective = SiteLayout.from_fine_blocks(fine_blocks.to(images.device), eighth.size, eighth.stride)
        return [quarter, eighth, selective, selective]

    def dense_layouts(self, images: Tensor, output_stride: int) -> list[SiteLayout]:
        """Layouts of layer1..layer4 of the plain dense network."""
        _check_images(images)
        if output_stride not in STAGE_STRIDES[1:]:
            raise ValueError(f"output_stride must be 8, 16 or 32, not {output_stride}")
        strides = [min(stride, output_stride) for stride in STAGE_STRIDES]
        layouts = {stride: _dense_layout(images, stride) for stride in strides}
        return [layouts[stride] for stride in strides]


def _dense_layout(images: Tensor, stride: int) -> SiteLayout:
    size = (-(-images.shape[2] // stride), -(-images.shape[3] // stride))
    return SiteLayout(images.shape[0], size, stride, device=images.device)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images must be float [B, 3, H, W], normalised; got {images.dtype} {list(images.shape)}"
        )
    if min(images.shape[2:]) < MIN_SIZE:
        raise ValueError(f"images must be at least {MIN_SIZE}x{MIN_SIZE} px, not {list(images.shape[2:])}")
