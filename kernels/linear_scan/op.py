"""`linear_scan`: the first-order linear recurrence, the primitive of every diagonal state-space model."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import call_kind, check_devices, check_floating, check_shapes, known, remember
from ..dispatch import Backend, choose
from ..isolation import isolated
from ..packing import FinalStates, by_segments, check_seq_idx, read_packing
from .chunked import linear_scan_chunked
from .reference import linear_scan_reference


def linear_scan(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    final_states: FinalStates = "last",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """First-order linear recurrence along dim 1.

        h_t = a_t * h_{t-1} + b_t,      h_{-1} = initial_state (zeros if None)

    Args:
        a: Decay, (b, l, d), or (b, l, 1) shared by the channels, or (d,) shared by rows and positions. Real or
            complex, any value; stable for |a| <= 1. Either of `b`'s dtype or wider.
        b: Input, (b, l, d), real or complex.
        initial_state: State before the first position, (b, d).
        reverse: Run from the last position to the first; `initial_state` then stands after the last one.
        seq_idx: Which packed sequence a position belongs to, (b, l) integers that do not decrease along a row. The
            state starts from zero with each new sequence; `initial_state` enters the first one that the scan meets.
        cu_seqlens: Where the packed sequences of a single row (b = 1) begin and the last one ends, (s + 1,) integers,
            instead of `seq_idx`. `initial_state` may then have a row for each sequence.
        final_states: "last" returns the state of a row's last sequence, "segments" with `cu_seqlens` those of all s.
        backend: "auto", "reference", "chunked" or "triton"; see `omnissm.kernels.use_backend`.

    Returns:
        All states, (b, l, d) in the dtype of `b`, and the last one the scan reached, (b, d), in float32 (float64 or
        complex for such inputs). With l = 0 that is the initial state.

    Raises:
        TypeError: if an argument is no floating or complex tensor.
        ValueError: if shapes, devices or packing arguments disagree; the message names tensor and dimension.
        BackendError: if `backend` is named explicitly and cannot run here; Triton takes real tensors only.

    16-bit inputs are accumulated in float32; autocast changes nothing. Differentiable in all floating tensors; the
    reference and chunked paths also twice. Packing costs one more reading and two masked copies of the inputs.
    Source: Blelloch (1990), first-order recurrences; Gu & Dao (2023), section 3.3.
    """
    kind = call_kind("linear_scan", a, b, initial_state, seq_idx)
    if not known(kind):
        check_floating(a=a, b=b, initial_state=initial_state, allow_complex=True)
    initial_rows = None if initial_state is None else initial_state.shape[0]
    seq_idx, each = read_packing(b, seq_idx, cu_seqlens, final_states, initial_rows)
    if each:
        assert cu_seqlens is not None  # sequences have states of their own only with it

        def scan(
            count: Tensor, initial: tuple[Tensor, ...] | None, a: Tensor, b: Tensor
        ) -> tuple[Tensor, tuple[Tensor]]:
            padding = torch.arange(b.shape[1], device=b.device) >= count[:, None]
            a = torch.where(padding[..., None], 1, a)  # the state passes
            before = None if initial is None else initial[0]
            states, final = linear_scan(a, b, before, reverse=reverse, backend=backend)
            return states, (final,)

        inputs = {"b": b, "a": a.expand(1, b.shape[1], -1) if a.dim() == 1 else a}
        initial = None if initial_state is None else (initial_state,)
        states, (final,) = by_segments(scan, inputs, initial, cu_seqlens, final_states, reverse=reverse)
        return states, final
    if not known(kind):
        check_shapes(
            b=(b, "b l d"),
            a=(a, "d" if a.dim() == 1 else "b l d?"),
            initial_state=(initial_state, "b d"),
            seq_idx=(seq_idx, "b l"),
        )
        check_devices(b=b, a=a, initial_state=initial_state, seq_idx=seq_idx)
        remember(kind)
    check_seq_idx(seq_idx)
    if a.is_complex() and not b.is_complex():
        b = b.to(a.dtype)
    state_dtype = torch.promote_types(b.dtype, torch.float32)
    if a.dtype != b.dtype:
        a = a.to(state_dtype)
    if a.dim() == 1:
        a = a[None, None]
    if b.numel() == 0:
        final = b.new_zeros(b.shape[0], b.shape[2]) if initial_state is None else initial_state.clone()
        return b.clone(), final.to(state_dtype)
    obstacle = "Triton takes real tensors only, got complex ones" if b.is_complex() else None
    chosen = choose(backend, b, op="linear_scan", obstacle=obstacle)

    def run(b: Tensor, a: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        if seq_idx is not None:
            a = _without_links(a, seq_idx, reverse)
        match chosen:
            case "reference":
                return linear_scan_reference(a, b, initial_state, reverse, state_dtype)
            case "triton":
                from .triton_impl import linear_scan_triton

                return linear_scan_triton(a, b, initial_state, reverse, state_dtype)
            case _:
                return linear_scan_chunked(a, b, initial_state, reverse, state_dtype)

    if seq_idx is None:
        return run(b, a, initial_state)
    if a.shape[0] != b.shape[0]:  # one decay for all positions
        a = a.expand(*b.shape[:2], -1)
    if reverse:
        states, final = isolated(run, seq_idx, (b, a), last=(initial_state,), reach="before", ends=(0,))
    else:
        states, final = isolated(run, seq_idx, (b, a), first=(initial_state,), ends=(-1,))
    return states, final


def _without_links(a: Tensor, seq_idx: Tensor, reverse: bool) -> Tensor:
    """Set the decay to zero where the scan passes from one packed sequence to the next."""
    linked = seq_idx[:, 1:] == seq_idx[:, :-1]
    always = linked.new_ones(seq_idx.shape[0], 1)
    linked = torch.cat([linked, always] if reverse else [always, linked], dim=1)
    return torch.where(linked[..., None], a, torch.zeros((), dtype=a.dtype, device=a.device))
