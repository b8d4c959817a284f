"""Launchers of the kernels of `ssd` that run its recurrence: sweeps over states, and outputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..autotune import fastest
from ..triton_utils import INTERPRETED, cdiv, multiprocessors
from .triton_halves import _ssd_fwd_halves_kernel
from .triton_kernels import DESCENDING, _ssd_carry_kernel, _ssd_fwd_kernel, _ssd_sweep_kernel
from .triton_tiles import Tiles, alternatives, in_halves, options, padded, tiles


class Sweep(NamedTuple):
    """One recurrence over states: its inputs as the kernels read them, and its MODE."""

    values: Tensor  # (b, l, h, p)
    keys: Tensor  # (b, l, g, n)
    log_decay: Tensor  # (b, l, h)
    weight: Tensor | None  # (b, l, h)
    state: Tensor | None  # what stands before the first step, (b, h, p, n)
    mode: int
    fine: bool = False  # float32 products to the last digits, for gradients that are small differences of others

    def cut(self, rows: slice, span: slice = slice(None)) -> Sweep:
        """The same for some rows of the batch, and for some of their positions."""
        return self._replace(
            values=self.values[rows, span],
            keys=self.keys[rows, span],
            log_decay=self.log_decay[rows, span],
            weight=None if self.weight is None else self.weight[rows, span],
            state=None if self.state is None else self.state[rows],
        )


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
    finals: int = 0,
    skip: bool = False,
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
        STORE=store, SKIP=skip, FINALS=finals, SUBS=subs,
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
    skip: bool = False,
) -> tuple[Tensor, Tensor]:
    """States at all borders, (sweeps, b, h, borders, p, n) in the dtype of the values, and at the end of each sweep.

    With `last_final` only the end of the last sweep is written, there, unless it has no heads. With `skip` borders
    where a sweep without a state begins are left as they are.
    """
    batch, length, nheads, _ = sweeps[0].values.shape
    step = chosen.chunk * subs
    parts, part_length = choose_parts(len(sweeps) * batch * nheads, length, step, sweeps[0].values.device, parts)
    entering = entering_states(sweeps, seq_idx, chosen, subs, parts, part_length)
    return sweep_parts(sweeps, entering, seq_idx, chosen, subs, parts, part_length, last_final, skip)


def sweep_parts(
    sweeps: tuple[Sweep, ...],
    entering: tuple[Tensor | None, ...],
    seq_idx: Tensor | None,
    chosen: Tiles,
    subs: int,
    parts: int,
    part_length: int,
    last_final: Tensor | None = None,
    skip: bool = False,
) -> tuple[Tensor, Tensor]:
    """`run_sweeps` from the states that enter the parts."""
    x, log_decay = sweeps[0].values, sweeps[0].log_decay
    (batch, length, nheads, headdim), n = x.shape, sweeps[0].keys.shape[3]
    step = chosen.chunk * subs
    borders = x.new_empty(len(sweeps), batch, nheads, cdiv(length, step), headdim, n)
    finals = log_decay.new_empty(len(sweeps), batch, nheads, headdim, n) if last_final is None else last_final
    outputs = borders, finals, finals, finals
    count = len(sweeps) if last_final is None else min(1, last_final.shape[1])
    _launch_sweeps(
        sweeps,
        entering,
        seq_idx,
        chosen,
        subs,
        parts,
        part_length // step,
        outputs,
        True,
        count,
        skip,
    )
    return borders, finals


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
    name, kernel = ("fwd in halves", _ssd_fwd_halves_kernel) if in_halves(x, n) else ("fwd", _ssd_fwd_kernel)

    def run(chosen: Tiles) -> None:
        of_sweep = sweeping._replace(chunk=chunk or sweeping.chunk)
        step = max(chosen.chunk, of_sweep.chunk)
        count, part_length = choose_parts(batch * nheads, length, step, x.device, parts)
        (entering,) = entering_states((sweep,), seq_idx, of_sweep, 1, count, part_length)
        kernel[(batch * count * nheads,)](
            x, log_decay, B, C, weight, D, seq_idx, entering, y, final, length, nheads, nheads // groups, count,
            part_length, *strides(x, B, C, D), HAS_WEIGHT=weight is not None, HAS_D=D is not None,
            HAS_STATE=entering is not None, **options(x, n, log_decay, seq_idx, chosen, sweep.fine),
        )  # fmt: skip

    if chunk:
        run(tiles(name, *sizes)._replace(chunk=chunk))
    else:
        run(fastest("ssd outputs", alternatives(name, *sizes), run, x.device, sizes=sizes))
