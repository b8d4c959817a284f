"""`ssd`: the recurrence with one scalar decay per head and position, and a matrix as state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import call_kind, check_devices, check_floating, check_log_decays, check_shapes, known, remember
from ..dispatch import Backend, cast_for_autocast, choose
from ..isolation import isolated
from ..packing import FinalStates, by_segments, check_seq_idx, read_packing
from .chunked import ssd_chunked
from .reference import ssd_reference


def ssd(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    D: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    final_states: FinalStates = "last",
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """State-space duality: a matrix state per head that decays by one scalar per position.

        H_t = exp(log_decay_t) H_{t-1} + weight_t x_t B_t^T      (h, p, n)
        y_t = H_t C_t + D x_t,      H_{-1} = initial_state (zeros if None)

    Args:
        x: Input, (b, l, h, p).
        log_decay: Logarithm of the decay, <= 0, (b, l, h); for Mamba-2 `dt * A`.
        B: What enters the state, (b, l, g, n); each of the g groups serves h / g consecutive heads.
        C: What is read from the state, (b, l, g, n).
        initial_state: State before the first position, (b, h, p, n).
        weight: Weight of each input, (b, l, h); for Mamba-2 `dt`. None: `x` comes weighted already.
        D: Skip from `x` to the output, (h,) or (b, l, h).
        seq_idx: Which packed sequence a position belongs to, (b, l) integers that do not decrease along a row. The
            state starts from zero with each new sequence; `initial_state` enters the first one of a row.
        cu_seqlens: Where the packed sequences of a single row (b = 1) begin and the last one ends, (s + 1,) integers,
            instead of `seq_idx`. `initial_state` may then have a row for each sequence.
        final_states: "last" returns the state of a row's last sequence, "segments" with `cu_seqlens` those of all s.
        chunk_size: Positions per chunk of the chunked path; None is 64 on a CPU and 128 elsewhere. Triton has its own.
        backend: "auto", "reference", "chunked" or "triton"; see `omnissm.kernels.use_backend`.

    Returns:
        y, (b, l, h, p) in the dtype of `x`, and the state after the last position, (b, h, p, n), in float32 (float64
        for float64 inputs). With packing it is the state of a row's last sequence, with l = 0 the initial state.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes, devices or packing arguments disagree, g does not divide h, chunk_size is below 1, or,
            as far as a CPU in eager mode sees it, a log-decay is positive or `seq_idx` decreases.
        BackendError: if `backend` is named explicitly and cannot run here.

    16-bit inputs are multiplied and summed in float32. Under autocast `x`, `B` and `C` are cast; decays, weights,
    states and `D` are not. Differentiable in all floating tensors, any number of times.
    Source: Dao & Gu (2024), "Transformers are SSMs", sections 3 and 6.
    """
    kind = call_kind("ssd", x, log_decay, B, C, initial_state, weight, D, seq_idx, chunk_size)
    if not known(kind):
        check_floating(x=x, log_decay=log_decay, B=B, C=C, initial_state=initial_state, weight=weight, D=D)
    initial_rows = None if initial_state is None else initial_state.shape[0]
    seq_idx, each = read_packing(x, seq_idx, cu_seqlens, final_states, initial_rows)
    if each:
        assert cu_seqlens is not None  # sequences have states of their own only with it

        def scan(count: Tensor, initial: tuple[Tensor, ...] | None, **rows: Any) -> tuple[Tensor, tuple[Tensor]]:
            options: dict[str, Any] = {"D": D, "chunk_size": chunk_size, "backend": backend} | rows
            y, final = ssd(**options, initial_state=None if initial is None else initial[0])
            return y, (final,)

        inputs = {"x": x, "log_decay": log_decay, "B": B, "C": C, "weight": weight}
        if D is not None and D.dim() == 3:
            inputs["D"] = D
        initial = None if initial_state is None else (initial_state,)
        y, (final,) = by_segments(scan, inputs, initial, cu_seqlens, final_states)
        return y, final
    if not known(kind):
        _check(x, log_decay, B, C, initial_state, weight, D, seq_idx, chunk_size)
        remember(kind)
    check_seq_idx(seq_idx)
    check_log_decays(log_decay=log_decay)
    (batch, length, nheads, headdim), n = x.shape, B.shape[3]

    x, B, C = cast_for_autocast(x, B, C)
    dtype = state_dtype(x, log_decay, B, C, initial_state, weight, D)
    obstacle = ssd_obstacle(headdim, n)
    chosen = choose(backend, x, op="ssd", obstacle=obstacle)
    state = None if initial_state is None else initial_state.to(dtype)
    empty = x.numel() == 0 or n == 0
    if state is None and (empty or chosen != "triton"):
        state = x.new_zeros(batch, nheads, headdim, n, dtype=dtype)
    if empty:
        assert state is not None  # made above
        return torch.zeros_like(x), state.clone()
    log_decay = in_dtype(log_decay, dtype)
    weight = None if weight is None else in_dtype(weight, dtype)
    if D is not None:
        D = in_dtype(D, dtype)
        if chosen != "triton" or seq_idx is not None:
            D = D.expand(batch, length, nheads)

    def run(
        x: Tensor,
        B: Tensor,
        C: Tensor,
        weight: Tensor | None,
        D: Tensor | None,
        log_decay: Tensor,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if chosen == "triton":
            from .triton_impl import ssd_triton

            return ssd_triton(x, log_decay, B, C, state, weight, D, seq_idx)
        assert state is not None  # made above
        if chosen == "reference":
            return ssd_reference(x, log_decay, B, C, state, weight, D, seq_idx)
        return ssd_chunked(x, log_decay, B, C, state, weight, D, seq_idx, chunk_size)

    if seq_idx is None:
        return run(x, B, C, weight, D, log_decay, state)
    y, final = isolated(run, seq_idx, (x, B, C, weight, D), decays=(log_decay,), first=(state,), ends=(-1,))
    return y, final


def _check(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    weight: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int | None,
) -> None:
    sizes = check_shapes(
        x=(x, "b l h p"),
        log_decay=(log_decay, "b l h"),
        B=(B, "b l g n"),
        C=(C, "b l g n"),
        initial_state=(initial_state, "b h p n"),
        weight=(weight, "b l h"),
        D=(D, "h" if D is not None and D.dim() == 1 else "b l h"),
        seq_idx=(seq_idx, "b l"),
    )
    check_devices(x=x, log_decay=log_decay, B=B, C=C, initial_state=initial_state, weight=weight, D=D, seq_idx=seq_idx)
    check_groups(sizes["h"], sizes["g"])
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")


def ssd_obstacle(headdim: int, state: int) -> str | None:
    """Why Triton cannot take heads and states of these sizes, None if it can."""
    if state > 256:
        return f"Triton takes n up to 256, got n={state}"
    if heads_per_head(headdim, state) is None:
        return f"Triton takes p up to {widest(state)}, or with a divisor from 16 to 64, got p={headdim}"
    return None


def heads_per_head(headdim: int, state: int) -> int | None:
    """Into how many narrower heads Triton cuts a head to hold its state, None if its width has no suitable divisor."""
    if headdim <= widest(state):
        return 1
    return next((headdim // width for width in range(64, 15, -1) if headdim % width == 0), None)


def widest(state: int) -> int:
    """The widest head that one program holds, padded, with its state."""
    return 128 if state <= 128 else 64


def check_groups(nheads: int, groups: int) -> None:
    """Check that the groups share the heads evenly.

    Raises:
        ValueError: if they do not.
    """
    if groups < 1 or nheads % groups:
        raise ValueError(f"`B` has g={groups} groups, expected a divisor of the {nheads} heads of `x`.")


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or the widest dtype among the tensors if that is wider."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None and tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; `Tensor.to` takes its time also where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
