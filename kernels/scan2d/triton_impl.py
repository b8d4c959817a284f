"""The grid scans in Triton: one launch forwards and one backwards, states in registers.

A lane holds K neighbouring states of one channel, SUB lanes hold all n of them. The grid is cut into strips of TJ
columns. A lane walks the rows of its strip from the top with the states of the row above, TJ times K of them, in
registers, so that a row is TJ multiply-adds one after the other and nothing is scanned. What a strip hands to the next
one, the states of its last column, goes through memory. S strips are worked on at once, each one chunk of R rows behind
its left neighbour; lanes that are through with a strip go on with the one S to the right (of the next "panel") without
waiting for the others.

Of the states only those borders and every R-th row are written. The backward pass walks the strips from the right and
their chunks from the bottom: it forms the R rows of a chunk again from the row above it and the border to its left,
leaves them in a scratch buffer, and goes back over them with the adjoints of the row below in registers. Sums over
channels leave a program as partial sums, which a kernel of their own adds in a fixed order; a second launch for the
other half of the channels adds to those of the first, each number in one program. Directions are signs of steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..replay import replayed
from ..transforms import FirstDerivative, apply, call, operator
from ..triton_utils import INTERPRETED, cdiv, multiprocessors, next_power_of_2, on_device
from .triton_backward import _grid_scan_bwd_kernel, _grid_scan_sums_kernel
from .triton_kernels import _grid_scan_fwd_kernel

MEAN, SEPARABLE, COUPLED = 0, 1, 2
_RATES = {MEAN: 2, SEPARABLE: 1, COUPLED: 4}
_COLUMNS = 4  # of a strip at most: their inputs are loaded at once and held in registers
_LANES = 256  # of a program at most, with up to 255 registers each
_WARPS = 11  # wanted for each multiprocessor
_REGISTERS = 168  # of a thread with 16-bit inputs: so many warps then run at once; coupled states need more


class Tile(NamedTuple):
    """How lanes, columns and rows are cut; see the module."""

    K: int
    SUB: int
    BD: int
    S: int
    TJ: int
    R: int
    panels: int


def tile_of(x: Tensor, n: int, rule: int) -> Tile:
    """Strips are added while warps are few; a lane has as many columns and states as fit its registers."""
    batch, rows, columns, channels = x.shape
    n, channels = int(n), int(channels)  # a compiler may be tracing sizes
    padded = next_power_of_2(n)
    k = min(2 if rule == COUPLED else 4, padded)
    if INTERPRETED:  # it pays per operation
        k = 2 if padded == 4 else 1
    sub = padded // k
    lanes = max(32, sub)  # one warp
    bd = min(lanes // sub, next_power_of_2(channels))
    processors = 1 if INTERPRETED else multiprocessors(x.device)
    # The fewer channels, the more partial sums: programs of coupled states, of up to eight warps, are to take most of
    # the multiprocessors, and others to be so many that none of these is left with few.
    wanted = 0.75 if rule == COUPLED else 2
    while bd > 2 and batch * cdiv(channels, bd) < wanted * processors:
        bd //= 2
    warps = batch * cdiv(channels, bd)
    s = lanes // (sub * bd)
    while not INTERPRETED and s * _COLUMNS < columns and s * sub * bd < _LANES and warps < _WARPS * processors:
        s, warps = 2 * s, 2 * warps
    while s >= 2 * cdiv(columns, _COLUMNS):
        s //= 2
    panels = cdiv(columns, s * _COLUMNS)
    tj = cdiv(columns, s * panels)
    # Coupled states are two for each cell, so that rows kept for the gradient take as long to write as to walk again.
    r = cdiv(rows, cdiv(rows, 8 if s * sub * bd <= lanes or rule == COUPLED else 4))
    return Tile(k, sub, bd, s, tj, r, panels)


def grid_scan_triton(
    x: Tensor,
    dt1: Tensor,
    A1: Tensor,
    B1: Tensor,
    C: Tensor,
    dt2: Tensor | None,
    A2: Tensor | None,
    B2: Tensor | None,
    D: Tensor | None,
    rule: str,
    flip: tuple[str, ...],
) -> Tensor:
    """See `grid_scan`."""
    A2, D = (None if t is None else t if t.dtype == A1.dtype else t.to(A1.dtype) for t in (A2, D))
    kind = MEAN if rule == "mean" else SEPARABLE
    return scan(x, dt1, dt2, None, B1, B2, C, None, A1, A2, None, None, D, kind, False, flip)


def scan(
    x: Tensor,
    dt1: Tensor,
    dt2: Tensor | None,
    r1: Tensor | None,
    B1: Tensor,
    B2: Tensor | None,
    C1: Tensor,
    C2: Tensor | None,
    A1: Tensor,
    A2: Tensor | None,
    c2: Tensor | None,
    c3: Tensor | None,
    D: Tensor | None,
    rule: int,
    held: bool,
    flip: tuple[str, ...],
) -> Tensor:
    """All rules; A, c (g, d, n) and D (g, d), or (d, n) and (d,), in the dtype of the states; b a multiple of g."""
    tensors = (x, dt1, dt2, r1, B1, B2, C1, C2, A1, A2, c2, c3, D)
    arguments = (rule, held, "i" in flip, "j" in flip, torch.is_grad_enabled())
    y, _, _ = apply(_Scan, *tensors, *arguments)
    return y


@operator("grid_scan_triton_fwd")
@replayed
def _forward(
    x: Tensor,
    dt1: Tensor,
    dt2: Tensor | None,
    r1: Tensor | None,
    B1: Tensor,
    B2: Tensor | None,
    C1: Tensor,
    C2: Tensor | None,
    A1: Tensor,
    A2: Tensor | None,
    c2: Tensor | None,
    c3: Tensor | None,
    D: Tensor | None,
    rule: int,
    held: bool,
    flip_i: bool,
    flip_j: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output; the states at the right borders of strips; with `save` those of every R-th row."""
    tensors = _contiguous(x, dt1, dt2, r1, B1, B2, C1, C2, A1, A2, c2, c3, D)
    y, border, kept = _outputs(x, A1, rule, save)
    tile = tile_of(x, A1.shape[-1], rule)
    with on_device(x):
        _grid_scan_fwd_kernel[_grid(x, tile)](
            *(x if t is None else t for t in tensors), y, border, kept, *_sizes(x, A1, tile, flip_i, flip_j),
            SAVE=save, **_options(x, A1, tile, rule, held, r1, c2, c3, D),
        )  # fmt: skip
    return y, border, kept


@operator("grid_scan_triton_bwd")
@replayed
def _backward(
    x: Tensor,
    dt1: Tensor,
    dt2: Tensor | None,
    r1: Tensor | None,
    B1: Tensor,
    B2: Tensor | None,
    C1: Tensor,
    C2: Tensor | None,
    A1: Tensor,
    A2: Tensor | None,
    c2: Tensor | None,
    c3: Tensor | None,
    D: Tensor | None,
    border: Tensor,
    kept: Tensor,
    dy: Tensor,
    rule: int,
    held: bool,
    flip_i: bool,
    flip_j: bool,
) -> list[Tensor]:
    """Gradients of those tensors that are not None, in order."""
    tensors = _contiguous(x, dt1, dt2, r1, B1, B2, C1, C2, A1, A2, c2, c3, D)
    dy = dy.contiguous()
    batch, rows, columns, channels = x.shape
    n, groups = A1.shape[-1], _groups(A1)
    tile = tile_of(x, n, rule)
    options = _options(x, A1, tile, rule, held, r1, c2, c3, D)
    passes = _passes(x, tile, options)
    wide = A1.new_empty
    values, saved = _values(tile, rule)
    lanes = tile.BD * tile.SUB
    parts = cdiv(cdiv(channels, tile.BD), passes)
    programs, maps = batch * parts, 4 if rule == COUPLED else 3 if rule == MEAN else 2
    found = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors]
    written = [x if t is None else t for t in found]
    dmaps = wide(parts, maps, batch, rows, columns, n)
    drates = wide(batch * tile.S, channels, _RATES[rule], n)
    dD = wide(batch * tile.S, channels)
    scratch = wide(programs, tile.R + 1, tile.TJ * saved * tile.S * lanes)
    dborder = wide(programs, tile.S, rows, values * lanes) if border.numel() else border
    with on_device(x):
        for again in range(passes):
            _grid_scan_bwd_kernel[(programs,)](
                *(x if t is None else t for t in tensors), dy, border, kept, dborder, scratch, *written[:4], dmaps,
                drates, dD, *_sizes(x, A1, tile, flip_i, flip_j), again, PASSES=passes, **options,
            )  # fmt: skip
        many, few = (2**14, 2**12) if INTERPRETED else (512, 32)
        blocks = cdiv(channels * _RATES[rule] * n, few) + cdiv(channels, few)
        _grid_scan_sums_kernel[(maps * cdiv(batch * rows * columns * n, many) + groups * blocks,)](
            dmaps, drates, dD, *written[4:], parts, batch * rows * columns * n, batch // groups * tile.S,
            MANY=many, PARTS=8, FEW=few, ROWS=64,
            **{name: options[name] for name in ("RULE", "HAS_C2", "HAS_C3", "HAS_D", "CHANNELS", "N", "ACC")},
        )  # fmt: skip
    return [t for t in found if t is not None]


@torch.library.register_fake("ssm::grid_scan_triton_fwd")
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, arguments[7], arguments[12], arguments[-1])


@torch.library.register_fake("ssm::grid_scan_triton_bwd")
def _(*arguments: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in arguments[:13] if t is not None]


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _groups(A1: Tensor) -> int:
    return A1.shape[0] if A1.dim() == 3 else 1


def _passes(x: Tensor, tile: Tile, options: dict[str, Any]) -> int:
    """Launches of the gradient, each for a part of the channels.

    Two where one has not enough room for all programs at once anyway: their partial sums and scratch buffers then take
    half as much memory.
    """
    if INTERPRETED:
        return 1
    warps = options["num_warps"]
    at_once = max(1, 65536 // (options.get("maxnreg", 255) * 32) // warps) * multiprocessors(x.device)
    return 2 if 2 * _grid(x, tile)[0] >= 3 * at_once else 1


def _grid(x: Tensor, tile: Tile) -> tuple[int]:
    return (x.shape[0] * cdiv(x.shape[3], tile.BD),)


def _values(tile: Tile, rule: int) -> tuple[int, int]:
    """Numbers that a lane hands on to the next cell, and that it leaves in the scratch buffer for each cell."""
    values = 2 * tile.K if rule == COUPLED else tile.K
    return values, values + (tile.K if rule == SEPARABLE else 0)


def _outputs(x: Tensor, A1: Tensor, rule: int, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[1]
    tile = tile_of(x, A1.shape[-1], rule)
    (programs,) = _grid(x, tile)
    values, _ = _values(tile, rule)
    lanes = tile.BD * tile.SUB
    borders = tile.S * tile.panels - 1
    kept = cdiv(rows, tile.R) - 1 if save else 0
    border = A1.new_empty(programs * borders * rows * values * lanes)
    kept_rows = A1.new_empty(programs * kept * tile.panels * tile.TJ * values * lanes * tile.S)
    return torch.empty_like(x, memory_format=torch.contiguous_format), border, kept_rows


def _sizes(x: Tensor, A1: Tensor, tile: Tile, flip_i: bool, flip_j: bool) -> tuple[int, ...]:
    share = x.shape[0] // _groups(A1)
    strips = tile.S * tile.panels
    return x.shape[1], x.shape[2], share, tile.panels, strips, -1 if flip_i else 1, -1 if flip_j else 1


def _options(
    x: Tensor,
    A1: Tensor,
    tile: Tile,
    rule: int,
    held: bool,
    r1: Tensor | None,
    c2: Tensor | None,
    c3: Tensor | None,
    D: Tensor | None,
) -> dict[str, Any]:
    options: dict[str, Any] = {
        "RULE": rule, "HELD": held, "HAS_R": r1 is not None, "HAS_C2": c2 is not None, "HAS_C3": c3 is not None,
        "HAS_D": D is not None, "CHANNELS": x.shape[3], "N": A1.shape[-1],
        "K": tile.K, "SUB": tile.SUB, "BD": tile.BD, "S": tile.S, "TJ": tile.TJ, "R": tile.R,
        "PRECISE": x.element_size() >= 4, "ACC": tl.float64 if A1.dtype == torch.float64 else tl.float32,
    }  # fmt: skip
    if INTERPRETED:
        return options
    cap = {"maxnreg": _REGISTERS} if rule != COUPLED and x.element_size() < 4 else {}
    return options | {"num_warps": max(1, tile.S * tile.BD * tile.SUB // 32)} | cap


class _Scan(torch.autograd.Function):
    """The forward op with its gradient."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return call(_forward, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, rule, held, flip_i, flip_j, _ = inputs
        ctx.options = (rule, held, flip_i, flip_j)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        *tensors, border, kept = ctx.saved_tensors
        if dy is None:
            return (None,) * 18
        found = iter(apply(_Gradient, *tensors, border, kept, dy, *ctx.options))
        return *(None if t is None else next(found) for t in tensors), None, None, None, None, None


class _Gradient(FirstDerivative):
    name = "the grid scan"

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(call(_backward, *arguments))
