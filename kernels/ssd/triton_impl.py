"""`ssd` in Triton: launchers, custom ops and the autograd function around the kernels of `triton_kernels.py`.

Forward is one kernel with the state in registers. Where rows and heads give too few programs, rows are cut into parts:
one sweep finds what each part adds to its state, a small kernel carries the states over the parts, and the forward
kernel starts each part from its own. Backward is one launch of two sweeps, states from the left and their gradients
from the right, written between all chunks, and two kernels: one for all gradients of a chunk but those of B and C, one
for these. Only the inputs are kept for it. Sums over programs go through a buffer and one ordered reduction: no
atomics.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..autotune import fastest
from ..transforms import FirstDerivative, apply, fold, operator, unfold
from ..triton_utils import INTERPRETED, multiprocessors, on_device
from .op import heads_per_head
from .triton_kernels import (
    ADJOINT,
    DESCENDING,
    SHIFT,
    _ssd_bwd_links_kernel,
    _ssd_bwd_maps_kernel,
    _ssd_carry_kernel,
    _ssd_fwd_kernel,
    _ssd_sweep_kernel,
)


def ssd_triton(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    weight: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `ssd`; weight and D are (b, l, h), everything but x, B and C has the dtype of the sums."""
    dtype, sums = x.dtype, log_decay.dtype
    narrow = sums if sums == torch.float64 else torch.promote_types(torch.promote_types(dtype, B.dtype), C.dtype)
    x, B, C = x.to(narrow), B.to(narrow), C.to(narrow)
    batch, length, nheads, headdim = x.shape
    cut = heads_per_head(headdim, B.shape[3])
    assert cut is not None  # checked by the op
    if cut > 1:
        x = x.reshape(batch, length, nheads * cut, headdim // cut)
        log_decay = log_decay.repeat_interleave(cut, dim=2)
        weight = None if weight is None else weight.repeat_interleave(cut, dim=2)
        D = None if D is None else D.repeat_interleave(cut, dim=2)
        state = None if state is None else state.reshape(batch, nheads * cut, headdim // cut, -1)
    y, final = apply(_Ssd, x, log_decay, B, C, state, weight, D, seq_idx)
    if cut > 1:
        y, final = y.reshape(batch, length, nheads, headdim), final.reshape(batch, nheads, headdim, -1)
    return y.to(dtype), final


# States and gradients of states between the kernels take about this many bytes; rows are taken in groups that do.
_BORDER_BYTES = 2**28


class Tiles(NamedTuple):
    """Compile-time choices of one kernel."""

    chunk: int
    warps: int
    stages: int


class Sweep(NamedTuple):
    """One recurrence over states: its inputs as the kernels read them, and its MODE."""

    values: Tensor  # (b, l, h, p)
    keys: Tensor  # (b, l, g, n)
    log_decay: Tensor  # (b, l, h)
    weight: Tensor | None  # (b, l, h)
    state: Tensor | None  # what stands before the first step, (b, h, p, n)
    mode: int
    fine: bool = False  # float32 products to the last digits, for gradients that are small differences of others

    def cut(self, rows: slice) -> Sweep:
        """The same for some rows of the batch."""
        return self._replace(
            values=self.values[rows],
            keys=self.keys[rows],
            log_decay=self.log_decay[rows],
            weight=None if self.weight is None else self.weight[rows],
            state=None if self.state is None else self.state[rows],
        )


@functools.cache
def tiles(kernel: str, headdim: int, state: int, dtype: torch.dtype) -> Tiles:
    """Chunk, warps and stages of a kernel ("fwd", "two-sided", "sweep", "links", "maps") for padded p and n.

    Registers and shared memory are what limits them; float32 operands take twice the space, in two parts.
    """
    if INTERPRETED:
        return Tiles(128, 4, 1)
    if dtype == torch.float64:
        return Tiles(16, 4, 1)
    if dtype == torch.float32 and headdim * state > 64 * 128:
        return Tiles(16, 8, 1)
    wide = headdim * state > 64 * 64
    if dtype == torch.float32:
        # On 64 rows of few columns ptxas 12.8 reads operands of wgmma from registers it has not set; 32 rows need none.
        of_forward = Tiles(32 if wide or headdim < 64 else 64, 8, 1)
        two_sided = Tiles(64, 8, 1)
        if headdim < 64:
            # With eight warps on 64 rows and few columns, Triton 3.6 reads beyond its shared memory on Hopper.
            two_sided = Tiles(64, 4, 1) if state <= 64 else Tiles(32 if state == 128 else 16, 8, 1)
        of_kernel = {"sweep": Tiles(64, 4, 1), "maps": Tiles(64, 4, 1), "fwd": of_forward, "two-sided": two_sided}
        return of_kernel.get(kernel, Tiles(64, 8, 1))
    if headdim * state > 64 * 128:
        return Tiles(32, 8, 1)
    return ({"links": Tiles(64, 4, 1), "maps": Tiles(64, 4, 3)} if wide else {}).get(kernel, Tiles(64, 4, 2))


def alternatives(kernel: str, headdim: int, state: int, dtype: torch.dtype) -> tuple[Tiles, ...]:
    """What a search for tiles tries, see `autotune`: first the tiles of the table."""
    first = tiles(kernel, headdim, state, dtype)
    if INTERPRETED or dtype == torch.float64:
        return (first,)
    others = [Tiles(chunk, warps, stages) for chunk in (32, 64) for warps in (4, 8) for stages in (1, 2, 3)]
    if dtype == torch.float32 and headdim < 64:  # what `tiles` avoids
        others = [one for one in others if (one.chunk, one.warps) != (64, 8)]
    return first, *(one for one in others if one != first)


def options(
    x: Tensor, n: int, log_decay: Tensor, seq_idx: Tensor | None, chosen: Tiles, fine: bool = False
) -> dict[str, Any]:
    """Compile-time arguments that all kernels share."""
    return _options(x.shape[3], n, x.dtype, log_decay.dtype, seq_idx is not None, chosen, precision(x.dtype, fine))


@functools.cache
def _options(
    headdim: int, n: int, dtype: torch.dtype, sums: torch.dtype, packed: bool, chosen: Tiles, multiply: str
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "P": headdim,
        "N": n,
        "Q": chosen.chunk,
        "BLOCK_P": max(16, next_power_of_2(headdim)),
        "BLOCK_N": max(16, next_power_of_2(n)),
        "PACKED": packed,
        "EXACT": dtype == torch.float32,
        "DOT": tl.float32 if INTERPRETED and dtype.itemsize < 4 else getattr(tl, str(dtype).removeprefix("torch.")),
        "ACC": tl.float64 if sums == torch.float64 else tl.float32,
        "PRECISION": multiply,
        "STAGES": chosen.stages,
    }
    return found if INTERPRETED else found | {"num_warps": chosen.warps}


def precision(dtype: torch.dtype, fine: bool = False) -> str:
    """How kernels multiply: float32 as sums of two or three bfloat16 numbers, unless the user allows TensorFloat-32."""
    if INTERPRETED or dtype != torch.float32:
        return "ieee"
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "bf16x6" if fine else "bf16x3"


def cdiv(number: int, divisor: int) -> int:
    """The quotient, rounded up. That of Triton costs microseconds a call."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of 2 that is not smaller."""
    return 1 << (number - 1).bit_length()


def padded(x: Tensor, n: int) -> tuple[int, int]:
    return max(16, next_power_of_2(x.shape[3])), max(16, next_power_of_2(n))


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor (b, l, h, p), copied only if its last two dimensions are not dense or a tile's offsets are too far."""
    heads, width = tensor.shape[2:]
    dense = (tensor.stride(3) == 1 or width == 1) and (tensor.stride(2) == width or heads == 1)
    return tensor if dense and 0 < tensor.stride(1) < 2**23 else tensor.contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def strides(*tensors: Tensor | None) -> list[int]:
    """Those of batch and length of each tensor."""
    return [stride for tensor in tensors for stride in ((0, 0) if tensor is None else tensor.stride()[:2])]


def _launch_sweeps(
    sweeps: tuple[Sweep, ...],
    entering: tuple[Tensor | None, ...],
    seq_idx: Tensor | None,
    chosen: Tiles,
    subs: int,
    parts: int,
    part_borders: int,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    store: bool,
    last_final_only: bool = False,
) -> None:
    one, two = sweeps[0], sweeps[-1]
    (batch, length, nheads, _), (groups, n) = one.values.shape, one.keys.shape[2:]
    second = len(sweeps) > 1
    _ssd_sweep_kernel[(len(sweeps) * batch * parts * nheads,)](
        one.values, one.keys, one.log_decay, one.weight, entering[0],
        two.values, two.keys, two.log_decay, two.weight, entering[-1],
        seq_idx, *outputs, batch, length, nheads, nheads // groups, parts, part_borders,
        *strides(one.values, one.keys, two.values, two.keys),
        MODE=one.mode, HAS_WEIGHT=one.weight is not None, HAS_STATE=entering[0] is not None,
        MODE_2=two.mode if second else -1, HAS_WEIGHT_2=two.weight is not None, HAS_STATE_2=entering[-1] is not None,
        STORE=store, LAST_FINAL=last_final_only, SUBS=subs,
        **options(one.values, n, one.log_decay, seq_idx, chosen, one.fine),
    )  # fmt: skip


def choose_parts(programs: int, length: int, step: int, device: torch.device, parts: int) -> tuple[int, int]:
    """Number of parts of a row and the length of each, a multiple of `step`; `parts` 0 chooses."""
    if parts == 0:
        count = multiprocessors(device)
        enough = programs >= 1.5 * count
        parts = 1 if enough else max(1, min(cdiv(4 * count, programs), length // 256))
    part_length = cdiv(cdiv(length, parts), step) * step
    return cdiv(length, part_length), part_length


def entering_states(
    sweeps: tuple[Sweep, ...], seq_idx: Tensor | None, chosen: Tiles, subs: int, parts: int, part_length: int
) -> tuple[Tensor | None, ...]:
    """The state that enters each part, (b, h, parts, p, n), of each sweep; with one part that of the row, or None."""
    if parts == 1:
        return tuple(sweep.state for sweep in sweeps)
    x, log_decay = sweeps[0].values, sweeps[0].log_decay
    (batch, _, nheads, headdim), n = x.shape, sweeps[0].keys.shape[3]
    ends = log_decay.new_empty(len(sweeps), batch, nheads, parts, headdim, n)
    factors = log_decay.new_empty(len(sweeps), batch, nheads, parts)
    outputs = ends, ends, factors, ends
    part_borders = part_length // (chosen.chunk * subs)
    _launch_sweeps(sweeps, (None,) * len(sweeps), seq_idx, chosen, subs, parts, part_borders, outputs, False)
    block = 1024 if INTERPRETED else 256
    first, last = sweeps[0], sweeps[-1]
    _ssd_carry_kernel[(len(sweeps) * batch * nheads * cdiv(headdim * n, block),)](
        first.state, last.state, ends, factors, batch * nheads, parts, headdim * n,
        DESCENDS=bool(first.mode & DESCENDING), HAS_STATE=first.state is not None,
        DESCENDS_2=bool(last.mode & DESCENDING), HAS_STATE_2=last.state is not None, BLOCK=block,
    )  # fmt: skip
    return tuple(ends.unbind(0))


def run_sweeps(
    sweeps: tuple[Sweep, ...],
    seq_idx: Tensor | None,
    chosen: Tiles,
    subs: int,
    parts: int,
    last_final: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """States at all borders, (sweeps, b, h, borders, p, n) in the dtype of the values, and at the end of each sweep.

    With `last_final` only the end of the last sweep is written, there.
    """
    x, log_decay = sweeps[0].values, sweeps[0].log_decay
    (batch, length, nheads, headdim), n = x.shape, sweeps[0].keys.shape[3]
    step = chosen.chunk * subs
    parts, part_length = choose_parts(len(sweeps) * batch * nheads, length, step, x.device, parts)
    entering = entering_states(sweeps, seq_idx, chosen, subs, parts, part_length)
    borders = x.new_empty(len(sweeps), batch, nheads, cdiv(length, step), headdim, n)
    finals = log_decay.new_empty(len(sweeps), batch, nheads, headdim, n) if last_final is None else last_final
    outputs = borders, finals, finals, finals
    _launch_sweeps(
        sweeps, entering, seq_idx, chosen, subs, parts, part_length // step, outputs, True, last_final is not None
    )
    return borders, finals


class Gradients(NamedTuple):
    """Gradients of a recurrence in the shapes of its inputs, where the kernels write them."""

    dx: Tensor
    dlog_decay: Tensor
    dB: Tensor  # noqa: N815
    dC: Tensor  # noqa: N815
    dweight: Tensor
    dD: Tensor  # noqa: N815
    dstate: Tensor


def empty_gradients(sweep: Sweep, C: Tensor, D: Tensor | None, dx: Tensor | None = None) -> Gradients:
    """Tensors for the gradients of a recurrence; those of absent weights and D have no positions."""
    x, B, log_decay = sweep.values, sweep.keys, sweep.log_decay
    absent = x.shape[0], 0, x.shape[2]
    return Gradients(
        dx=x.new_empty(x.shape) if dx is None else dx,
        dlog_decay=log_decay.new_empty(log_decay.shape),
        dB=B.new_empty(B.shape),
        dC=C.new_empty(C.shape),
        dweight=log_decay.new_empty(absent if sweep.weight is None else log_decay.shape),
        dD=log_decay.new_empty(absent if D is None else log_decay.shape),
        dstate=log_decay.new_empty(x.shape[0], *x.shape[2:], B.shape[3]),
    )


def run_gradients(
    sweep: Sweep,
    C: Tensor,
    D: Tensor | None,
    seq_idx: Tensor | None,
    dy: Tensor,
    dfinal: Tensor | None,
    into: Gradients,
    *,
    add: bool = False,
    chunk: int = 0,
    parts: int = 0,
    blocks: int = 0,
) -> None:
    """Gradients of a recurrence; all tensors have dense rows.

    Args:
        sweep: The recurrence forward in its own direction; its `mode` may hold REVERSE and SHIFT.
        C: What is read, (b, l, g, n).
        D: Skip, (b, l, h).
        seq_idx: (b, l).
        dy: Gradient of the outputs, contiguous.
        dfinal: Gradient of the last state, (b, h, p, n).
        into: Where to write.
        add: Add to dx instead of overwriting it.
        chunk: Positions per chunk, 0 to choose.
        parts: Parts of a row, 0 to choose.
        blocks: Blocks of heads per group, each with its own sum for dB and dC, 0 to choose.
    """
    x, n = sweep.values, sweep.keys.shape[3]
    batch, length, nheads, headdim = x.shape

    def run(chosen: GradientTiles) -> None:
        state_bytes = 2 * nheads * cdiv(length, chosen.links.chunk) * headdim * n * x.element_size()
        group = max(1, _BORDER_BYTES // state_bytes)
        if group >= batch:
            run_gradients_at_once(sweep, C, D, seq_idx, dy, dfinal, into, chosen, add, parts, blocks)
            return
        for start in range(0, batch, group):
            rows = slice(start, start + group)
            some, index = sweep.cut(rows), None if seq_idx is None else seq_idx[rows]
            run_gradients_at_once(
                some, C[rows], None if D is None else D[rows], index, dy[rows],
                None if dfinal is None else dfinal[rows], Gradients(*(one[rows] for one in into)), chosen, add, parts,
                blocks,
            )  # fmt: skip

    first = gradient_tiles(x, n, chunk)
    if chunk or add:  # a search overwrites its results, and does not add to them
        run(first)
    else:
        run(fastest("ssd gradient", gradient_alternatives(first, x), run, x.device, sizes=(*padded(x, n), x.dtype)))


class GradientTiles(NamedTuple):
    """Tiles of the kernels of a gradient, one border per chunk of theirs."""

    links: Tiles
    maps: Tiles
    sweep: Tiles
    subs: int  # chunks of the sweep per border


def fine_products(x: Tensor, n: int) -> bool:
    """Whether float32 products can keep their last digits, for gradients that are small differences of others.

    Wide states have no room for it in shared memory.
    """
    headdim, state = padded(x, n)
    return x.dtype == torch.float32 and headdim * state <= 64 * 128


def fine_chunk(x: Tensor, n: int) -> int:
    """A short chunk where operands of products take three parts, else 0 for the tables'."""
    return 32 if fine_products(x, n) and not INTERPRETED else 0


def gradient_tiles(x: Tensor, n: int, chunk: int = 0) -> GradientTiles:
    """Those of the tables, or with another chunk."""
    links, maps, sweep = (tiles(kernel, *padded(x, n), x.dtype) for kernel in ("links", "maps", "sweep"))
    chunk = chunk or links.chunk
    of_sweep = min(sweep.chunk, chunk)
    return GradientTiles(
        links._replace(chunk=chunk), maps._replace(chunk=chunk), sweep._replace(chunk=of_sweep), chunk // of_sweep
    )


def gradient_alternatives(first: GradientTiles, x: Tensor) -> tuple[GradientTiles, ...]:
    """What a search tries: first the tiles of the tables."""
    if INTERPRETED or x.dtype == torch.float64:
        return (first,)
    others = [
        GradientTiles(Tiles(chunk, warps, stages), Tiles(chunk, 4, of_maps), Tiles(chunk, of_sweep, 2), 1)
        for chunk in (32, 64)
        for warps in (4, 8)
        for stages in (1, 2)
        for of_maps in (1, 2)
        for of_sweep in (4, 8)
    ]
    return first, *(one for one in others if one != first)


def run_gradients_at_once(
    sweep: Sweep,
    C: Tensor,
    D: Tensor | None,
    seq_idx: Tensor | None,
    dy: Tensor,
    dfinal: Tensor | None,
    into: Gradients,
    chosen: GradientTiles,
    add: bool = False,
    parts: int = 0,
    blocks: int = 0,
) -> Tensor:
    """`run_gradients` for all rows at once; returns the states around all chunks.

    Those that enter and the gradients of those that leave, (2, b, h, chunks, p, n), both in the order of the steps.
    """
    links, maps, sweeping, subs = chosen
    backward = Sweep(dy, C, sweep.log_decay, None, dfinal, sweep.mode | DESCENDING | ADJOINT, sweep.fine)
    forward = sweep._replace(mode=sweep.mode & ~SHIFT)
    borders, _ = run_sweeps((forward, backward), seq_idx, sweeping, subs, parts, into.dstate)
    _run_chunks(sweep, C, D, seq_idx, borders, dy, into, add, links, maps, blocks)
    return borders


def _run_chunks(
    sweep: Sweep,
    C: Tensor,
    D: Tensor | None,
    seq_idx: Tensor | None,
    borders: Tensor,
    dy: Tensor,
    into: Gradients,
    add: bool,
    links: Tiles,
    maps: Tiles,
    blocks: int,
) -> None:
    """The two kernels that compute the gradients of all chunks from the states at the borders."""
    x, B, log_decay, weight = sweep.values, sweep.keys, sweep.log_decay, sweep.weight
    (batch, length, nheads, _), (groups, n) = x.shape, B.shape[2:]
    repeats = nheads // groups
    programs = batch * cdiv(length, links.chunk) * groups
    if blocks == 0:
        blocks = max(1, min(repeats, 2 * multiprocessors(x.device) // programs))
    block_heads = cdiv(repeats, blocks)
    blocks = cdiv(repeats, block_heads)
    dB, dC = into.dB, into.dC
    if blocks > 1:
        dB, dC = (log_decay.new_empty(blocks, *one.shape) for one in (dB, dC))
    kernel = x.new_empty(programs * blocks, links.chunk, links.chunk)
    sizes = length, nheads, repeats, blocks, block_heads
    shared = {"MODE": sweep.mode, "HAS_WEIGHT": weight is not None}
    _ssd_bwd_links_kernel[(programs * blocks,)](
        x, log_decay, B, C, weight, D, seq_idx, borders[0], borders[1], dy, into.dx, into.dlog_decay, into.dweight,
        into.dD, kernel, *sizes, *strides(x, B, C, D), ADD=add, HAS_D=D is not None,
        **shared, **options(x, n, log_decay, seq_idx, links, sweep.fine),
    )  # fmt: skip
    _ssd_bwd_maps_kernel[(2 * programs * blocks,)](
        x, log_decay, B, C, weight, seq_idx, borders[0], borders[1], dy, kernel, dB, dC, batch, *sizes,
        *strides(x, B, C), **shared, **options(x, n, log_decay, seq_idx, maps, sweep.fine),
    )  # fmt: skip
    if blocks > 1:
        into.dB.copy_(dB.sum(0))
        into.dC.copy_(dC.sum(0))


def run_outputs(
    sweep: Sweep,
    C: Tensor,
    D: Tensor | None,
    seq_idx: Tensor | None,
    y: Tensor,
    final: Tensor,
    chunk: int = 0,
    parts: int = 0,
) -> None:
    """Write outputs of a recurrence and its last state to contiguous `y` and `final`; all tensors have dense rows."""
    x, B, log_decay, weight = sweep.values, sweep.keys, sweep.log_decay, sweep.weight
    (batch, length, nheads, _), (groups, n) = x.shape, B.shape[2:]
    sizes = *padded(x, n), x.dtype
    sweeping = tiles("sweep", *sizes)

    def run(chosen: Tiles) -> None:
        of_sweep = sweeping._replace(chunk=chunk or sweeping.chunk)
        step = max(chosen.chunk, of_sweep.chunk)
        count, part_length = choose_parts(batch * nheads, length, step, x.device, parts)
        (entering,) = entering_states((sweep,), seq_idx, of_sweep, 1, count, part_length)
        _ssd_fwd_kernel[(batch * count * nheads,)](
            x, log_decay, B, C, weight, D, seq_idx, entering, y, final, length, nheads, nheads // groups, count,
            part_length, *strides(x, B, C, D), HAS_WEIGHT=weight is not None, HAS_D=D is not None,
            HAS_STATE=entering is not None, **options(x, n, log_decay, seq_idx, chosen, sweep.fine),
        )  # fmt: skip

    if chunk:
        run(tiles("fwd", *sizes)._replace(chunk=chunk))
    else:
        run(fastest("ssd outputs", alternatives("fwd", *sizes), run, x.device, sizes=sizes))


@operator("ssd_triton_fwd")
def _forward(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    weight: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
    chunk: int,
    parts: int,
) -> tuple[Tensor, Tensor]:
    """`chunk` and `parts` (of a row) are 0 to be chosen."""
    x, B, C = dense_rows(x), dense_rows(B), dense_rows(C)
    log_decay, state, weight, seq_idx = (
        log_decay.contiguous(),
        contiguous(state),
        contiguous(weight),
        contiguous(seq_idx),
    )
    D = D if D is None or D.stride(2) == 1 else D.contiguous()
    y, final = x.new_empty(x.shape), log_decay.new_empty(x.shape[0], *x.shape[2:], B.shape[3])
    with on_device(x):
        run_outputs(Sweep(x, B, log_decay, weight, state, 0), C, D, seq_idx, y, final, chunk, parts)
    return y, final


@torch.library.register_fake("ssm::ssd_triton_fwd")
def _(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    weight: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
    chunk: int,
    parts: int,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), log_decay.new_empty(x.shape[0], x.shape[2], x.shape[3], B.shape[3])


@operator("ssd_triton_bwd")
def _backward(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    weight: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
    dy: Tensor,
    dfinal: Tensor | None,
    chunk: int,
    parts: int,
    blocks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, log_decay, B, C, state, weight and D; those of absent weights and D have no positions."""
    x, B, C, dy = dense_rows(x), dense_rows(B), dense_rows(C), dy.contiguous()
    log_decay, state, weight, seq_idx = (
        log_decay.contiguous(),
        contiguous(state),
        contiguous(weight),
        contiguous(seq_idx),
    )
    D = D if D is None or D.stride(2) == 1 else D.contiguous()
    sweep = Sweep(x, B, log_decay, weight, state, 0)
    found = empty_gradients(sweep, C, D)
    with on_device(x):
        run_gradients(
            sweep, C, D, seq_idx, dy, contiguous(dfinal), found, chunk=chunk, parts=parts, blocks=blocks
        )  # fmt: skip
    return found.dx, found.dlog_decay, found.dB, found.dC, found.dstate, found.dweight, found.dD


@torch.library.register_fake("ssm::ssd_triton_bwd")
def _(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    weight: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
    dy: Tensor,
    dfinal: Tensor | None,
    chunk: int,
    parts: int,
    blocks: int,
) -> tuple[Tensor, ...]:
    absent = x.shape[0], 0, x.shape[2]
    return (
        *(tensor.new_empty(tensor.shape) for tensor in (x, log_decay, B, C)),
        log_decay.new_empty(x.shape[0], x.shape[2], x.shape[3], B.shape[3]),
        *(log_decay.new_empty(absent if tensor is None else log_decay.shape) for tensor in (weight, D)),
    )


class _Ssd(torch.autograd.Function):
    """The forward op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return _forward(*arguments, 0, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, log_decay, B, C, state, weight, D, seq_idx = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(x)
        found = apply(_SsdGradient, x, log_decay, B, C, state, weight, D, seq_idx, dy, dfinal)
        *first, dstate, dweight, dD = found
        optional = (None if given is None else one for given, one in ((state, dstate), (weight, dweight), (D, dD)))
        return *first, *optional, None


class _SsdGradient(FirstDerivative):
    name = "ssd"

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _backward(*arguments, 0, 0, 0)


def mapped(op: Any, info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """Batching rule of an op all of whose tensors have the batch first: the mapped dimension joins it."""
    count = info.batch_size
    folded = [
        fold(argument, dim, count) if isinstance(argument, Tensor) else argument
        for argument, dim in zip(arguments, in_dims, strict=True)
    ]
    outputs = tuple(unfold(output, count) for output in op(*folded))
    return outputs, (0,) * len(outputs)


@torch.library.register_vmap("ssm::ssd_triton_fwd")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    return mapped(_forward, info, in_dims, arguments)


@torch.library.register_vmap("ssm::ssd_triton_bwd")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    return mapped(_backward, info, in_dims, arguments)
