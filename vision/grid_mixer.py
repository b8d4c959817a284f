"""The grid recurrence of Chimera: four state-space models, one from each corner of an image, over its cells.

For the corner at the top left, with steps dt0 along the row and dt1 along the column (0 where there is no neighbour),
m the number of neighbours it comes from, and w = sqrt(max(1, m)) or max(1, m), per head with a state (n, p):

    S[i,j] = (e^{-dt0[i,j]} S[i,j-1] + e^{-dt1[i,j]} S[i-1,j]) / w + g[i,j] B[i,j] x[i,j]^T,   y[i,j] = C[i,j] S[i,j]

The gain g is (dt0 + dt1) / w, which is 0 in the corner itself (as published), or with the steps before they were set to
0 at the border. Other corners: the same on the flipped grid. The result is the sum of the four, halved.
Source: Lahoti, Marwah, Puduppully & Gu (2025), Chimera, section 4; the recurrence replaces their product of powers.

Rows are taken in blocks. Inside a block the sum over all paths between two cells, P = (I - A)^{-1}, is built by rows,
and y = ((C B^T) * P) x is one masked product; between blocks the states of the last row go on. One block covers small
grids; memory and time grow with the number of rows, not with its square.
"""

# No postponed annotations here: TorchScript reads those of the functions that it leaves alone.

from typing import Literal

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Normalization = Literal["auto", "sqrt_in", "in"]

CORNERS = ((), (2,), (1,), (1, 2))  # dimensions of (b, i, j, ...) that each corner's grid is flipped along
GROUPS = (0, 1, 1, 0)  # which of the two sets of B and C a corner reads
_CELLS = 256  # of a block: its (cells, cells) matrices stay small beside the projections


@register_notrace_function
@torch.jit.ignore
def grid_mix(
    x: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    B: Tensor,
    C: Tensor,
    normalization: str = "auto",
    published_gain: bool = False,
) -> Tensor:
    """Sum of the four corners' recurrences, halved, with float32 states.

    Args:
        x: Input, (b, i, j, h, p).
        dt: Steps before bias and softplus, (b, i, j, h, 4, 2): corners (top left, top right, bottom left, bottom right)
            and axes (along the row, along the column).
        dt_bias: (h,).
        B: Input maps, (b, i, j, 2, n): one for the corners 0 and 3, one for 1 and 2.
        C: Output maps, like `B`.
        normalization: "sqrt_in", "in", or "auto": the former up to 16 x 16 cells. With it weights of paths grow on
            larger grids.
        published_gain: Give the corner cell a gain of 0.

    Returns:
        (b, i, j, h, p) in float32, float64 for float64 inputs.

    Raises:
        ValueError: if `normalization` is unknown.
    """
    if normalization not in ("auto", "sqrt_in", "in"):
        raise ValueError(f"normalization must be 'auto', 'sqrt_in' or 'in', got {normalization!r}.")
    if normalization == "auto":
        normalization = "sqrt_in" if max(x.shape[1:3]) <= 16 else "in"
    with torch.autocast(x.device.type, enabled=False):  # it would round decays and sums
        wide = torch.promote_types(x.dtype, torch.float32)
        steps = F.softplus(dt.to(wide) + dt_bias.to(wide)[:, None, None])
        arguments = (x.to(wide), steps, B.to(wide), C.to(wide), normalization == "sqrt_in", published_gain)
        if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
            # The masks of all heads and corners are many times larger than what they are made from.
            return checkpoint(_four_corners, *arguments, use_reentrant=False)
        return _four_corners(*arguments)


def _four_corners(x: Tensor, steps: Tensor, B: Tensor, C: Tensor, root: bool, published: bool) -> Tensor:
    total = torch.zeros_like(x)
    for group in (0, 1):
        parts = []
        for corner, dims in enumerate(CORNERS):
            if GROUPS[corner] == group:
                parts.append(_flipped(_coefficients(_flipped(steps[..., corner, :], dims), root, published), dims))
        corners = [dims for corner, dims in enumerate(CORNERS) if GROUPS[corner] == group]
        if x.shape[1] * x.shape[2] <= _CELLS:
            total = total + _one_block(x, parts, B[..., group, :], C[..., group, :], corners)
        else:
            for part, dims in zip(parts, corners):
                part, cell, into, out = (_flipped(t, dims) for t in (part, x, B[..., group, :], C[..., group, :]))
                total = total + _flipped(_rows(cell, part, into, out), dims)
    return total / 2


def _flipped(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    return tensor.flip(dims) if dims else tensor


def _coefficients(steps: Tensor, root: bool, published: bool) -> Tensor:
    """Weights from the left and from above, and the gain, (b, i, j, h, 3), of a corner at the top left."""
    rows, columns = steps.shape[1:3]
    exists = steps.new_ones(rows, columns, 1, 2)
    exists[:, 0, :, 0] = 0
    exists[0, :, :, 1] = 0
    weight = exists.sum(-1).clamp(min=1)
    weight = weight.sqrt() if root else weight
    gain = (steps * exists if published else steps).sum(-1) / weight
    return torch.cat([torch.exp(-steps) * exists / weight[..., None], gain[..., None]], dim=-1)


def _one_block(x: Tensor, parts: list[Tensor], B: Tensor, C: Tensor, corners: list[tuple[int, ...]]) -> Tensor:
    """Corners that share B and C, as one product with the sum of their masks."""
    rows, columns = x.shape[1:3]
    mask = x.new_zeros(())
    for part, dims in zip(parts, corners, strict=True):
        paths = _paths(_flipped(part, dims)).unflatten(3, (rows, columns)).unflatten(2, (rows, columns))
        paths = _flipped(paths, tuple(dim + shift for dim in dims for shift in (1, 3))).flatten(4, 5).flatten(2, 3)
        paths = paths * part[..., 2].flatten(1, 2).mT[:, :, None]  # (b, h, t, s)
        mask = mask + paths
    mixing = mask * (C.flatten(1, 2) @ B.flatten(1, 2).mT)[:, None]
    return (mixing @ x.flatten(1, 2).movedim(2, 1)).movedim(1, 2).reshape(x.shape)


def _paths(coefficients: Tensor) -> Tensor:
    """Sum over all paths from cell s to cell t of the product of their weights, (b, h, t, s)."""
    left, above = coefficients[..., 0].movedim(-1, 1), coefficients[..., 1].movedim(-1, 1)  # (b, h, i, j)
    batch, nheads, rows, columns = left.shape
    along = _along_rows(left)
    found: list[Tensor] = []
    for i in range(rows):
        own = along[:, :, i]
        line = [own, own.new_zeros(batch, nheads, columns, columns * (rows - i - 1))]
        if found:
            line.insert(0, (own * above[:, :, i, None, :]) @ found[-1][..., : columns * i])
        found.append(torch.cat(line, dim=-1))
    return torch.cat(found, dim=2)


def _along_rows(left: Tensor) -> Tensor:
    """Product of the weights from the left between two cells of a row, (..., j, s), 0 for s > j."""
    columns = left.shape[-1]
    steps = left[..., :, None].expand(*left.shape, columns)
    after = torch.ones(columns, columns, dtype=torch.bool, device=left.device).tril(-1)
    return torch.where(after, steps, steps.new_ones(())).cumprod(dim=-2).tril()


def _rows(x: Tensor, coefficients: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One corner, in blocks of rows with the states of the row before each block handed on."""
    rows, columns = x.shape[1:3]
    size = max(1, _CELLS // columns)
    state: Tensor | None = None  # (b, h, j, n, p)
    found = []
    for start in range(0, rows, size):
        cut = slice(start, start + size)
        y, state = _block(x[:, cut], coefficients[:, cut], B[:, cut], C[:, cut], state)
        found.append(y)
    return torch.cat(found, dim=1)


def _block(x: Tensor, coefficients: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    columns = x.shape[2]
    paths = _paths(coefficients)  # (b, h, t, s)
    weighted = (x * coefficients[..., 2, None]).flatten(1, 2).movedim(2, 1)  # (b, h, s, p)
    into, out = B.flatten(1, 2), C.flatten(1, 2)  # (b, s, n)
    y = (paths * (out @ into.mT)[:, None]) @ weighted
    last = paths[:, :, -columns:]
    leaving = torch.einsum("bhjs,bsn,bhsp->bhjnp", last, into, weighted)
    if state is not None:
        entering = paths[..., :columns] * coefficients[:, 0, :, :, 1].movedim(-1, 1)[:, :, None]  # (b, h, t, j)
        y = y + torch.einsum("bhtj,btn,bhjnp->bhtp", entering, out, state)
        leaving = leaving + torch.einsum("bhtj,bhjnp->bhtnp", entering[:, :, -columns:], state)
    return y.movedim(1, 2).reshape(x.shape), leaving
