"""Between images and sequences: patch stems, orders of the cells of a grid, and their cross scan and merge.

An image is (batch, channels, height, width); a grid is (b, i, j, d), i rows and j columns; position t of a sequence in
an order o is the cell o[t], counted row by row: i * columns + j.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

from .patches import PatchConv2d

__all__ = [
    "CROSS4",
    "SNAKE4",
    "PatchEmbed",
    "ScanOrder",
    "cross_merge",
    "cross_scan",
    "drop_path_rates",
    "init_linear_",
    "pad_grid",
    "scan_order",
]

CROSS4 = ("row", "col", "row_rev", "col_rev")
SNAKE4 = ("snake_row", "snake_row_rev", "snake_col", "snake_col_rev")


class ScanOrder(NamedTuple):
    """An order of the cells of a grid, each an int64 tensor (rows * columns,).

    Attributes:
        order: Cell at each position.
        inverse: Position of each cell: inverse[order[t]] = t.
        move: Step that led to a position: 0 start, 1 right, 2 left, 3 up, 4 down, 5 any other.
    """

    order: Tensor
    inverse: Tensor
    move: Tensor


def _row(rows: int, columns: int) -> Tensor:
    return torch.arange(rows * columns)


def _snake(rows: int, columns: int) -> Tensor:
    cells = torch.arange(rows * columns).view(rows, columns).clone()
    cells[1::2] = cells[1::2].flip(1)
    return cells.flatten()


def _transposed(order: Callable[[int, int], Tensor], rows: int, columns: int) -> Tensor:
    cells = order(columns, rows)
    return cells % rows * columns + cells // rows


def _diagonal(rows: int, columns: int, sign: int) -> Tensor:
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.argsort(((i + sign * j + columns) * rows + i).flatten())


_ORDERS: dict[str, Callable[[int, int], Tensor]] = {
    "row": _row,
    "col": lambda rows, columns: _transposed(_row, rows, columns),
    "snake_row": _snake,
    "snake_col": lambda rows, columns: _transposed(_snake, rows, columns),
    "diag": lambda rows, columns: _diagonal(rows, columns, 1),
    "antidiag": lambda rows, columns: _diagonal(rows, columns, -1),
}


def scan_order(name: str, rows: int, columns: int, device: torch.device | str | None = None) -> ScanOrder:
    """Order of the cells of a grid, cached by size and device.

    Args:
        name: "row", "col" (from the top left, row by row or column by column), "snake_row", "snake_col" (likewise,
            every second line backwards, so that neighbours in the sequence are neighbours in the grid), "diag" (by
            i + j, then i), "antidiag" (by i - j, then i); each with "_rev" for its reverse.
        rows: Rows of the grid.
        columns: Its columns.
        device: Where the tensors shall be.

    Raises:
        ValueError: if the name is unknown or the grid empty.
    """
    if name.removesuffix("_rev") not in _ORDERS:
        raise ValueError(f"unknown order {name!r}; expected one of {', '.join(_ORDERS)}, or one of these with _rev.")
    if rows < 1 or columns < 1:
        raise ValueError(f"an order needs at least one row and one column, got {rows} x {columns}.")
    # Tensors made while a graph is recorded belong to that graph.
    ordered = _ordered if torch.compiler.is_compiling() else _cached
    return ordered(name, rows, columns, str(device or "cpu"))


def _ordered(name: str, rows: int, columns: int, device: str) -> ScanOrder:
    order = _ORDERS[name.removesuffix("_rev")](rows, columns)
    if name.endswith("_rev"):
        order = order.flip(0)
    down, right = (torch.diff(order // columns), torch.diff(order % columns))
    move = torch.full_like(order, 5)
    move[0] = 0
    for code, (di, dj) in enumerate(((0, 1), (0, -1), (-1, 0), (1, 0)), start=1):
        move[1:][(down == di) & (right == dj)] = code
    return ScanOrder(order.to(device), torch.argsort(order).to(device), move.to(device))


_cached = functools.lru_cache(maxsize=256)(_ordered)


def cross_scan(x: Tensor) -> Tensor:
    """Four sequences of a grid: by rows, by columns, and both backwards; (b, i, j, d) -> (b, 4, l, d), l = i * j."""
    rows = x.flatten(1, 2)
    columns = x.transpose(1, 2).flatten(1, 2)
    return torch.stack([rows, columns, rows.flip(1), columns.flip(1)], dim=1)


def cross_merge(y: Tensor, rows: int, columns: int) -> Tensor:
    """Sum of four sequences at their cells, the adjoint of `cross_scan`: (b, 4, l, d) -> (b, rows, columns, d)."""
    along_rows = y[:, 0] + y[:, 2].flip(1)
    along_columns = y[:, 1] + y[:, 3].flip(1)
    return along_rows.unflatten(1, (rows, columns)) + along_columns.unflatten(1, (columns, rows)).transpose(1, 2)


class PatchEmbed(nn.Module):
    """Square patches of an image as vectors, by one convolution.

    Args:
        img_size: Height and width that the model is built for, pixels.
        patch_size: Side of a patch.
        in_chans: Channels of the image.
        embed_dim: Width of a token.
        stride: Distance of neighbouring patches; None is `patch_size`, less makes them overlap.
        dynamic: Take images of any size; those that the patches do not cover are padded with zeros below and on the
            right.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if a patch or their distance is no pixel wide, or the image is smaller than a patch.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 192,
        *,
        stride: int | None = None,
        dynamic: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if patch_size < 1 or (stride is not None and stride < 1):
            raise ValueError(f"patches and their distance take at least one pixel, got {patch_size} and {stride}.")
        if min(height, width) < patch_size:
            raise ValueError(f"img_size {height} x {width} is smaller than one patch of {patch_size} x {patch_size}.")
        self.img_size = (height, width)
        self.patch_size = patch_size
        self.stride = stride or patch_size
        self.dynamic = dynamic
        self.grid_size = self.dynamic_feat_size(self.img_size)
        kind = PatchConv2d if self.stride == patch_size else nn.Conv2d
        self.proj = kind(in_chans, embed_dim, patch_size, self.stride, device=device, dtype=dtype)

    def feat_ratio(self) -> int:
        """Pixels per token along each axis."""
        return self.stride

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the grid of an image of this height and width."""
        if self.dynamic:
            return (
                max(0, math.ceil((img_size[0] - self.patch_size) / self.stride)) + 1,
                max(0, math.ceil((img_size[1] - self.patch_size) / self.stride)) + 1,
            )
        return (
            (img_size[0] - self.patch_size) // self.stride + 1,
            (img_size[1] - self.patch_size) // self.stride + 1,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (b, i, j, d), in the dtype of the weights."""
        if self.dynamic:
            x = pad_image(x, self.patch_size, self.stride)
        else:
            x = check_image_size(x, self.img_size[0], self.img_size[1])
        return self.proj(x).permute(0, 2, 3, 1).to(self.proj.weight.dtype)


@register_notrace_function
def check_image_size(x: Tensor, height: int, width: int) -> Tensor:
    """The image itself.

    Raises:
        ValueError: if it has another size.
    """
    if x.shape[2] != height or x.shape[3] != width:
        raise ValueError(
            f"The model takes images of {height} x {width}, got {x.shape[2]} x {x.shape[3]}."
            " Build it with img_size=(height, width), or with dynamic_img_size=True for any size."
        )
    return x


@register_notrace_function
def pad_image(x: Tensor, patch: int, stride: int) -> Tensor:
    """Zeros below and on the right of (batch, channels, height, width), so that patches cover all of it."""
    height, width = x.shape[2], x.shape[3]
    rows = max(0, (height - patch + stride - 1) // stride) * stride + patch
    columns = max(0, (width - patch + stride - 1) // stride) * stride + patch
    if rows == height and columns == width:
        return x
    return F.pad(x, [0, columns - width, 0, rows - height])


@register_notrace_function
def pad_grid(x: Tensor, multiple: int) -> Tensor:
    """Zeros below and on the right of a grid (b, i, j, d), so that both sides are multiples of a number."""
    below, right = (-x.shape[1]) % multiple, (-x.shape[2]) % multiple
    if below == 0 and right == 0:
        return x
    return F.pad(x, [0, 0, 0, right, 0, below])


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Rates of stochastic depth that grow linearly from 0 at the first block to `rate` at the last.

    Raises:
        ValueError: if the rate is not in [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate is a probability below 1, such as 0.1; got {rate}.")
    return [rate * k / max(1, depth - 1) for k in range(depth)]


def init_linear_(module: nn.Module) -> None:
    """Normal(0, 0.02) cut at two deviations and zero bias for linear maps; zero bias and unit weight for norms.

    Modules with the attribute `own_init` keep their values, with all that is inside them: initial steps and rates of a
    recurrence are chosen, and a general rule must not undo that.
    """
    if getattr(module, "own_init", False):
        return
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    for child in module.children():
        init_linear_(child)
