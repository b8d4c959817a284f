"""Neighbourhood attention: each cell of a grid sees a window of K x K cells around it, or of cells D apart.

Along an axis of N cells, cell t = p D + g belongs to class g of its n_g = ceil((N - g) / D) cells. It sees the cells
s, ..., s + K - 1 of its class, s = clamp(p - (K - 1) / 2, 0, n_g - K): at borders the window moves inside. Its bias for
the k-th of them is entry s - p + K - 1 + k of a table of 2 K - 1. On an axis with fewer than K cells the window becomes
the largest odd one that fits, with the central part of the table, and the distance D the largest with D K <= N.

    scores   s_tk = q_t . k_{n(t, k)} + bias          average   y_t = sum_k w_tk v_{n(t, k)}

The adjoint of either is made of the other and of the sum over the cells that see a cell, so that no neighbour is ever
stored twice, and gradients of any order are exact.
Source: Hassani, Walton, Li, Li & Shi (2023), Neighborhood attention; Hassani & Shi (2022) for distances.
"""

# No postponed annotations here: TorchScript reads those of the functions that it leaves alone.

import functools
from typing import Any, NamedTuple

import torch
from timm.models import register_notrace_function
from torch import Tensor

__all__ = ["fitted_axis", "neighborhood_average", "neighborhood_scores"]

_BAND = 16  # columns that share one product: wider ones waste more on keys outside their windows


def fitted_axis(length: int, window: int, dilation: int) -> tuple[int, int]:
    """Window and distance that an axis of some cells has room for.

    Raises:
        ValueError: if the window is even or a number is below 1.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"a window must be odd and at least 1, got {window}.")
    if dilation < 1 or length < 1:
        raise ValueError(f"dilation and length must be at least 1, got {dilation} and {length}.")
    window = min(window, length - 1 + length % 2) if length > 1 else 1
    return window, max(1, min(dilation, length // window))


def axis_neighbors(length: int, window: int, dilation: int) -> tuple[list[list[int]], list[list[int]]]:
    """Neighbours of each cell of an axis, and their entries in a table of 2 window - 1 biases, (length, window)."""
    keys, entries = [], []
    for t in range(length):
        p, g = divmod(t, dilation)
        count = -(-(length - g) // dilation)
        start = min(max(p - window // 2, 0), count - window)
        keys.append([(start + k) * dilation + g for k in range(window)])
        entries.append([start - p + window - 1 + k for k in range(window)])
    return keys, entries


class _Band(NamedTuple):
    """Columns of one class: `queries` and the `keys` that they see, and which of the keys, (queries, window)."""

    queries: slice
    keys: slice
    place: Tensor


class _Tables(NamedTuple):
    """Rows that each row sees (i, window), their entries and those of columns in bias tables, and bands of columns."""

    rows: Tensor
    row_entries: Tensor
    column_entries: Tensor
    bands: tuple[_Band, ...]


def _tables(tensor: Tensor, window: int, dilation: int) -> _Tables:
    """Tables of a tensor (n, i, j, ...) on its device."""
    arguments = (tensor.shape[1], tensor.shape[2], window, dilation, str(tensor.device))
    # Tensors made while a graph is recorded belong to that graph.
    return _built(*arguments) if torch.compiler.is_compiling() else _cached(*arguments)


def _built(rows: int, columns: int, window: int, dilation: int, device: str) -> _Tables:
    row_keys, row_entries = axis_neighbors(rows, *fitted_axis(rows, window, dilation))
    width, step = fitted_axis(columns, window, dilation)
    column_keys, column_entries = axis_neighbors(columns, width, step)
    bands = []
    for g in range(step):
        own = range(g, columns, step)
        for first in range(0, len(own), max(_BAND, width)):
            queries = own[first : first + max(_BAND, width)]
            start, stop = column_keys[queries[0]][0], column_keys[queries[-1]][-1] + 1
            place = [[(key - start) // step for key in column_keys[t]] for t in queries]
            index = torch.tensor(place, device=device)
            bands.append(_Band(slice(queries[0], queries[-1] + 1, step), slice(start, stop, step), index))
    row_table, row_bias, column_bias = (
        torch.tensor(table, device=device) for table in (row_keys, row_entries, column_entries)
    )
    return _Tables(row_table, row_bias, column_bias, tuple(bands))


_cached = functools.lru_cache(maxsize=128)(_built)


def _dot(q: Tensor, k: Tensor, window: int, dilation: int) -> Tensor:
    """q_t . k_{n(t, k)}: (n, i, j, c) twice -> (n, i, j, rows' window, columns' window)."""
    tables = _tables(q, window, dilation)
    shape = (*q.shape[:3], tables.rows.shape[1], tables.column_entries.shape[1])
    found = q.new_empty(shape)
    for band in tables.bands:
        left, right = q[:, :, band.queries], k[:, :, band.keys].mT
        index = band.place.expand(*q.shape[:2], -1, -1)
        for a in range(shape[3]):
            products = left @ right.index_select(1, tables.rows[:, a])
            found[:, :, band.queries, a] = products.gather(-1, index).to(found.dtype)
    return found


def _spread(weights: Tensor, band: _Band, a: int) -> Tensor:
    """Weights of the a-th row of the windows of a band as a matrix over its keys, (n, i, queries, keys)."""
    index = band.place.expand(*weights.shape[:2], -1, -1)
    count = len(range(band.keys.start, band.keys.stop, band.keys.step))
    empty = weights.new_zeros(*weights.shape[:2], index.shape[2], count)
    return empty.scatter(-1, index, weights[:, :, band.queries, a])


def _gathered(weights: Tensor, v: Tensor, window: int, dilation: int) -> Tensor:
    """sum_k w_tk v_{n(t, k)}: (n, i, j, rows' window, columns' window) and (n, i, j, c) -> (n, i, j, c)."""
    tables = _tables(v, window, dilation)
    found = torch.zeros_like(v)
    for band in tables.bands:
        values = v[:, :, band.keys]
        total: Any = 0
        for a in range(weights.shape[3]):
            total = total + _spread(weights, band, a) @ values.index_select(1, tables.rows[:, a])
        found[:, :, band.queries] = total.to(found.dtype)
    return found


def _returned(weights: Tensor, y: Tensor, window: int, dilation: int) -> Tensor:
    """sum of w_tk y_t over all t, k with n(t, k) = s, the adjoint of `_gathered` in v; shapes as there."""
    tables = _tables(y, window, dilation)
    found = torch.zeros_like(y)
    for band in tables.bands:
        outputs, own = y[:, :, band.queries], found[:, :, band.keys]
        for a in range(weights.shape[3]):
            own.index_add_(1, tables.rows[:, a], (_spread(weights, band, a).mT @ outputs).to(own.dtype))
    return found


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, window: int, dilation: int) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.sizes = (window, dilation)
        return _dot(q, k, window, dilation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        q, k = ctx.saved_tensors
        return _Gathered.apply(grad, k, *ctx.sizes), _Returned.apply(grad, q, *ctx.sizes), None, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, v: Tensor, window: int, dilation: int) -> Tensor:
        ctx.save_for_backward(weights, v)
        ctx.sizes = (window, dilation)
        return _gathered(weights, v, window, dilation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        weights, v = ctx.saved_tensors
        return _Dot.apply(grad, v, *ctx.sizes), _Returned.apply(weights, grad, *ctx.sizes), None, None


class _Returned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, y: Tensor, window: int, dilation: int) -> Tensor:
        ctx.save_for_backward(weights, y)
        ctx.sizes = (window, dilation)
        return _returned(weights, y, window, dilation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        weights, y = ctx.saved_tensors
        return _Dot.apply(y, grad, *ctx.sizes), _Gathered.apply(weights, grad, *ctx.sizes), None, None


@register_notrace_function
@torch.jit.ignore
def neighborhood_scores(q: Tensor, k: Tensor, bias: Tensor | None, window: int, dilation: int) -> Tensor:
    """Products of each cell's query with the keys of its window.

    Args:
        q: Queries, (b, h, i, j, c).
        k: Keys, like `q`.
        bias: Added by relative position, (h, 2 window - 1, 2 window - 1), or None.
        window: Side of the window, odd; less where the grid is smaller.
        dilation: Distance of the window's cells; less where the grid is too small for it.

    Returns:
        (b, h, i, j, rows' window, columns' window).

    Raises:
        ValueError: if the window is even or the distance below 1.
    """
    with torch.autocast(q.device.type, enabled=False):
        k = k.to(q.dtype)
        found = _Dot.apply(q.flatten(0, 1), k.flatten(0, 1), window, dilation).unflatten(0, q.shape[:2])
        if bias is None:
            return found
        tables = _tables(q.flatten(0, 1), window, dilation)
        cut = [(2 * window - 1 - 2 * side + 1) // 2 for side in found.shape[-2:]]
        by_row = bias.to(q.dtype)[:, tables.row_entries + cut[0]]  # (h, i, rows' window, 2 window - 1)
        by_cell = by_row[..., tables.column_entries + cut[1]]  # (h, i, rows' window, j, columns' window)
        return found + by_cell.transpose(2, 3)


@register_notrace_function
@torch.jit.ignore
def neighborhood_average(weights: Tensor, v: Tensor, window: int, dilation: int) -> Tensor:
    """Sums of the values in each cell's window.

    Args:
        weights: (b, h, i, j, rows' window, columns' window), as `neighborhood_scores` shapes them.
        v: Values, (b, h, i, j, c).
        window: Side of the window.
        dilation: Distance of its cells.

    Returns:
        (b, h, i, j, c) in the dtype of the values.

    Raises:
        ValueError: if the window is even or the distance below 1.
    """
    with torch.autocast(v.device.type, enabled=False):
        weights = weights.to(v.dtype).flatten(0, 1)
        return _Gathered.apply(weights, v.flatten(0, 1), window, dilation).unflatten(0, v.shape[:2])
