"""The classes of every pixel in static graphs, with work only where classes meet.

Resizing in runtimes is slow (onnxruntime: 5 to 9 ms for 11 x 360 x 480 on one core, and 3 for the ArgMax)
where two matrix products take 3.7, and tiles about 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Tiles(nn.Module):
    """Classes with work only where classes meet, for sizes that the trained stride divides.

    Between four cells lies a tile of `stride` x `stride` pixels. Where the four have one class, every pixel
    has it; the others are interpolated, each tile by the same matrix.

    Args:
        cells: `(h, w)` of the logits; size: `(H, W)` of the images.
    """

    shares: Tensor
    corners: Tensor

    def __init__(
        self, batch: int, cells: tuple[int, int], size: tuple[int, int], stride: int, trained_stride: int
    ) -> None:
        super().__init__()
        self.cells, self.size, self.stride = cells, size, stride
        self.first = stride - trained_stride // 2  # of the first tile's pixels, those left of the image
        self.count = tuple(-(-(length + self.first) // stride) for length in size)
        place = (torch.arange(stride) + 0.5) / stride  # of a tile's pixels between its cells
        share = torch.stack([1 - place, place])
        shares = torch.einsum("ay,bx->yxab", share, share).reshape(stride * stride, 4)
        self.register_buffer("shares", shares, persistent=False)
        lower, upper = (self._near(0), self._near(1))
        corners = [(y, x) for y in (lower[0], upper[0]) for x in (lower[1], upper[1])]
        one = torch.stack([(y[:, None] * cells[1] + x).reshape(-1) for y, x in corners])  # [4, tiles]
        images = [one + image * cells[0] * cells[1] for image in range(batch)]
        self.register_buffer("corners", torch.cat(images, 1), persistent=False)

    @staticmethod
    def fit(size: tuple[int, int], stride: int, trained_stride: int, align_corners: bool) -> bool:
        """Whether tiles are alike, more than a pixel, and none starts inside the image."""
        alike = not align_corners and not any(length % trained_stride for length in size)
        return alike and stride > 1 and trained_stride <= 2 * stride

    def forward(self, logits: Tensor) -> Tensor:
        """Logits `[B, K, h, w]` to classes uint8 `[B, H, W]`."""
        batch, classes = int(logits.shape[0]), int(logits.shape[1])
        rows = logits.permute(0, 2, 3, 1).reshape(-1, classes)
        own = rows.argmax(1)
        four = own.index_select(0, self.corners.reshape(-1)).reshape(4, -1)
        mixed = (four[1:] != four[:1]).sum(0).nonzero().reshape(-1)  # [n]
        values = rows.index_select(0, self.corners.index_select(1, mixed).reshape(-1)).reshape(4, -1)
        pixels = torch.matmul(self.shares, values).reshape(self.stride**2, -1, classes).argmax(2)
        tiles = four[0].to(torch.uint8)[:, None].expand(-1, self.stride**2)
        tiles = tiles.index_put((mixed,), pixels.to(torch.uint8).t())
        canvas = tiles.reshape(batch, self.count[0], self.count[1], self.stride, self.stride)
        canvas = canvas.permute(0, 1, 3, 2, 4).reshape(batch, self.count[0] * self.stride, -1)
        (top, left), (height, width) = (self.first, self.first), self.size
        return canvas[:, top : top + height, left : left + width]

    def _near(self, side: int) -> list[Tensor]:
        """Rows and columns of the cells before (0) or behind (1) each tile, inside the grid."""
        return [
            (torch.arange(count) - 1 + side).clamp(0, cells - 1)
            for count, cells in zip(self.count, self.cells, strict=True)
        ]
