"""`ema_scan`: an exponential moving average whose weight is given per position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import call_kind, check_devices, check_floating, check_shapes, known, remember
from ..dispatch import Backend, cast_for_autocast, choose
from ..isolation import isolated
from ..packing import FinalStates, by_segments, check_seq_idx, read_packing
from .chunked import ema_scan_chunked
from .reference import ema_scan_reference


def ema_scan(
    x: Tensor,
    p: Tensor,
    initial_state: Tensor | None = None,
    *,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    final_states: FinalStates = "last",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Moving average along dim 1 with one weight per position, shared by the channels.

        m_t = p_t x_t + (1 - p_t) m_{t-1},      m_{-1} = initial_state (zeros if None)

    Args:
        x: Input, (b, l, d).
        p: Weight of the new input, in [0, 1], (b, l). 1 forgets what was before, 0 ignores the input, both exactly.
        initial_state: Mean before the first position, (b, d).
        seq_idx: Which packed sequence a position belongs to, (b, l) integers that do not decrease along a row. The
            mean starts from zero with each new sequence; `initial_state` enters the first one of a row.
        cu_seqlens: Where the packed sequences of a single row (b = 1) begin and the last one ends, (s + 1,) integers,
            instead of `seq_idx`. `initial_state` may then have a row for each sequence.
        final_states: "last" returns the state of a row's last sequence, "segments" with `cu_seqlens` those of all s.
        backend: "auto", "reference", "chunked" or "triton"; see `omnissm.kernels.use_backend`.

    Returns:
        All means, (b, l, d) in the dtype of `x`, and the last one, (b, d), in float32 (float64 for float64 inputs).
        With l = 0 that is the initial state.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes, devices or packing arguments disagree; the message names tensor and dimension.
        BackendError: if `backend` is named explicitly and cannot run here.

    16-bit inputs are summed in float32. Under autocast `x` is cast, `p` and the state are not. Differentiable in all
    floating tensors; the reference and chunked paths any number of times.
    Source: Hwang, Wang & Gu (2025), "Dynamic chunking for end-to-end hierarchical sequence modeling", section 2.2.
    """
    kind = call_kind("ema_scan", x, p, initial_state, seq_idx)
    if not known(kind):
        check_floating(x=x, p=p, initial_state=initial_state)
    initial_rows = None if initial_state is None else initial_state.shape[0]
    seq_idx, each = read_packing(x, seq_idx, cu_seqlens, final_states, initial_rows)
    if each:
        assert cu_seqlens is not None  # sequences have states of their own only with it

        def scan(count: Tensor, initial: tuple[Tensor, ...] | None, **rows: Any) -> tuple[Tensor, tuple[Tensor]]:
            means, final = ema_scan(**rows, initial_state=None if initial is None else initial[0], backend=backend)
            return means, (final,)

        initial = None if initial_state is None else (initial_state,)
        means, (final,) = by_segments(scan, {"x": x, "p": p}, initial, cu_seqlens, final_states)
        return means, final
    if not known(kind):
        check_shapes(x=(x, "b l d"), p=(p, "b l"), initial_state=(initial_state, "b d"), seq_idx=(seq_idx, "b l"))
        check_devices(x=x, p=p, initial_state=initial_state, seq_idx=seq_idx)
        remember(kind)
    check_seq_idx(seq_idx)
    (x,) = cast_for_autocast(x)
    dtype = torch.promote_types(torch.promote_types(x.dtype, p.dtype), torch.float32)
    state = initial_state
    if state is not None:
        dtype = torch.promote_types(dtype, state.dtype)
        state = state.to(dtype)
    p = p.to(dtype)
    chosen = choose(backend, x, op="ema_scan")
    if state is None and (chosen != "triton" or x.numel() == 0):
        state = x.new_zeros(x.shape[0], x.shape[2], dtype=dtype)
    if x.numel() == 0:
        assert state is not None  # made above
        return x.clone(), state.clone()

    def run(x: Tensor, p: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        if chosen == "triton":
            from .triton_impl import ema_scan_triton

            return ema_scan_triton(x, p, state, seq_idx)
        assert state is not None  # made above
        scan = ema_scan_reference if chosen == "reference" else ema_scan_chunked
        return scan(x, p, state, seq_idx)

    if seq_idx is None:
        return run(x, p, state)
    means, final = isolated(run, seq_idx, (x, p), first=(state,), ends=(-1,))
    return means, final
