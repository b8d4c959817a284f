"""`selective_scan`: the selective state-space recurrence of Mamba, with states (d, n)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import call_kind, check_devices, check_floating, check_shapes, known, remember
from ..dispatch import Backend, cast_for_autocast, choose
from ..isolation import Reach, isolated
from ..packing import FinalStates, by_segments, check_seq_idx, read_packing
from .chunked import selective_scan_chunked
from .reference import selective_scan_reference


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    final_states: FinalStates = "last",
    window: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Selective scan (Mamba, S6) along dim 1: every channel has n states and input-dependent steps.

        h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,      h_{-1} = initial_state (zeros if None)
        y_t = sum_n C_tn h_tn + D u_t,                 times silu(z_t) if z is given

    Args:
        u: Input, (b, l, d).
        dt: Steps after softplus, not negative, (b, l, d).
        A: Rates, real part negative, (d, n). Real, or complex for one state of each conjugate pair: the sum over n is
            then 2 Re(C h).
        B: Input map, (b, l, n), or (b, l, g, n) for g groups of d / g neighbouring channels. Complex only with A.
        C: Output map, of the shape of `B`. Complex only with A.
        D: Skip, (d,).
        z: Gate, (b, l, d).
        initial_state: State before the first position, (b, d, n).
        seq_idx: Which packed sequence a position belongs to, (b, l) integers that do not decrease along a row. The
            state starts from zero with each new sequence; `initial_state` enters the first one of a row.
        cu_seqlens: Where the packed sequences of a single row (b = 1) begin and the last one ends, (s + 1,) integers,
            instead of `seq_idx`. `initial_state` may then have a row for each sequence.
        final_states: "last" returns the state of a row's last sequence, "segments" with `cu_seqlens` those of all s.
        window: Segment length m >= 1 of a second, local scan backwards in time (locally bidirectional). Segments start
            at multiples of m from the start of a sequence; None or 1 is the plain scan.
        backend: "auto", "reference", "chunked" or "triton"; see `omnissm.kernels.use_backend`.

    Returns:
        y, (b, l, d) in the dtype of `u`, and the state after the last position, (b, d, n), in float32 (float64 or
        complex for such inputs). With l = 0 that is the initial state.

    Raises:
        TypeError: if an argument is no floating tensor, or B, C or the state is complex and A is not.
        ValueError: if shapes, devices or packing arguments disagree, d is no multiple of g, or window is below 1.
        BackendError: if `backend` is named explicitly and cannot run here; Triton takes real tensors with n <= 256.

    16-bit inputs are computed in float32. Under autocast u, B, C and z are cast; dt, A, D and states are not.
    Differentiable in all floating tensors; the reference and chunked paths twice and more.
    Source: Gu & Dao (2023), algorithm 2; the window: Zhang et al. (2025), LBMamba.
    """
    kind = call_kind("selective_scan", u, dt, A, B, C, D, z, initial_state, seq_idx, window)
    if not known(kind):
        check_floating(u=u, dt=dt, D=D, z=z)
        check_floating(A=A, B=B, C=C, initial_state=initial_state, allow_complex=True)
    initial_rows = None if initial_state is None else initial_state.shape[0]
    seq_idx, each = read_packing(u, seq_idx, cu_seqlens, final_states, initial_rows)
    if each:
        assert cu_seqlens is not None  # sequences have states of their own only with it

        def scan(count: Tensor, initial: tuple[Tensor, ...] | None, **rows: Any) -> tuple[Tensor, tuple[Tensor]]:
            before = None if initial is None else initial[0]
            y, final = selective_scan(**rows, A=A, D=D, initial_state=before, window=window, backend=backend)
            return y, (final,)

        inputs = {"u": u, "dt": dt, "B": B, "C": C, "z": z}
        initial = None if initial_state is None else (initial_state,)
        y, (final,) = by_segments(scan, inputs, initial, cu_seqlens, final_states)
        return y, final
    if not known(kind):
        _check(u, dt, A, B, C, D, z, initial_state, seq_idx, window)
        remember(kind)
    check_seq_idx(seq_idx)
    (u,) = cast_for_autocast(u)
    if z is not None:
        (z,) = cast_for_autocast(z)
    B, C = (x if x.is_complex() else cast_for_autocast(x)[0] for x in (B, C))
    dtype = torch.promote_types(torch.promote_types(u.dtype, A.dtype), torch.float32)
    A = A.to(dtype)
    initial_state = None if initial_state is None else initial_state.to(dtype)
    if u.numel() == 0 or A.shape[1] == 0:
        skip = torch.zeros_like(u) if D is None else (u * D).to(u.dtype)
        final = u.new_zeros(u.shape[0], *A.shape, dtype=dtype) if initial_state is None else initial_state.clone()
        return skip if z is None else (skip * torch.nn.functional.silu(z)).to(u.dtype), final
    obstacle = None
    if A.is_complex():
        obstacle = "Triton takes real tensors only, got a complex `A`"
    elif A.shape[1] > 256:
        obstacle = f"Triton takes n up to 256, got n={A.shape[1]}"
    chosen = choose(backend, u, op="selective_scan", obstacle=obstacle)
    if chosen == "triton":
        from .triton_impl import selective_scan_triton

        return selective_scan_triton(u, dt, A, B, C, D, z, initial_state, seq_idx, window)
    if B.dim() == 3:
        B, C = B[:, :, None], C[:, :, None]
    if chosen == "reference":
        return selective_scan_reference(u, dt, A, B, C, D, z, initial_state, seq_idx, window)
    if seq_idx is None:
        return selective_scan_chunked(u, dt, A, B, C, D, z, initial_state, seq_idx, window)

    def run(*parts: Any) -> tuple[Tensor, Tensor]:
        u, dt, B, C, z, initial_state, A, D = parts
        return selective_scan_chunked(u, dt, A, B, C, D, z, initial_state, seq_idx, window)

    reach: Reach = "after" if window is None else "both"
    positions, shared = (u, dt, B, C, z), (A, D)
    y, final = isolated(run, seq_idx, positions, first=(initial_state,), shared=shared, reach=reach, ends=(-1,))
    return y, final


def _check(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    window: int | None,
) -> None:
    maps = "b l g n" if B.dim() == 4 else "b l n"
    sizes = check_shapes(
        u=(u, "b l d"),
        dt=(dt, "b l d"),
        A=(A, "d n"),
        B=(B, maps),
        C=(C, maps),
        D=(D, "d"),
        z=(z, "b l d"),
        initial_state=(initial_state, "b d n"),
        seq_idx=(seq_idx, "b l"),
    )
    check_devices(u=u, dt=dt, A=A, B=B, C=C, D=D, z=z, initial_state=initial_state, seq_idx=seq_idx)
    for name, tensor in (("B", B), ("C", C), ("initial_state", initial_state)):
        if tensor is not None and tensor.is_complex() and not A.is_complex():
            raise TypeError(f"`{name}` is complex and `A` is not; make `A` complex too, e.g. A.to(torch.complex64).")
    groups = sizes.get("g", 1)
    if groups < 1 or sizes["d"] % groups != 0:
        raise ValueError(f"`B` has g={groups}, expected a divisor of d={sizes['d']} (from `u`).")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}; None switches it off.")
