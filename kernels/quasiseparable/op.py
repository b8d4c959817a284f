"""`quasiseparable`: a matrix state from each end of the row, for models that see both sides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import call_kind, check_devices, check_floating, check_log_decays, check_shapes, known, remember
from ..dispatch import Backend, cast_for_autocast, choose
from ..isolation import isolated
from ..packing import check_seq_idx
from ..ssd.op import check_groups, in_dtype, ssd_obstacle, state_dtype
from .chunked import quasiseparable_chunked
from .reference import Side, quasiseparable_reference


def quasiseparable(
    x: Tensor,
    log_decay_f: Tensor,
    weight_f: Tensor | None,
    B_f: Tensor,
    C_f: Tensor,
    log_decay_b: Tensor,
    weight_b: Tensor | None,
    B_b: Tensor,
    C_b: Tensor,
    diag: Tensor,
    initial_state: Tensor | None = None,
    *,
    shift: bool = True,
    seq_idx: Tensor | None = None,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Product with a quasiseparable matrix: a recurrence from the left, one from the right, and a diagonal.

        Hf_t = exp(log_decay_f_t) Hf_{t-1} + weight_f_t x_t B_f_t^T         (h, p, n)
        Hb_t = exp(log_decay_b_t) Hb_{t+1} + weight_b_t x_t B_b_t^T
        y_t  = Hf_{t-1} C_f_{t-1} + Hb_{t+1} C_b_{t+1} + diag_t x_t         without shift: Hf_t C_f_t + Hb_t C_b_t + ...

    The first term is 0 at the first position of a sequence, the second one at its last.

    Args:
        x: Input, (b, l, h, p).
        log_decay_f: Logarithm of the forward decay, <= 0, (b, l, h).
        weight_f: Weight of each input in the forward recurrence, (b, l, h); ones if None.
        B_f: What enters the forward state, (b, l, g, n); each of the g groups serves h / g consecutive heads.
        C_f: What is read from the forward state, (b, l, g, n).
        log_decay_b: Logarithm of the backward decay, <= 0, (b, l, h).
        weight_b: Weight of each input in the backward recurrence, (b, l, h); ones if None.
        B_b: What enters the backward state, (b, l, g, n).
        C_b: What is read from the backward state, (b, l, g, n).
        diag: Diagonal of the matrix, (b, l, h).
        initial_state: Forward state before the first position and backward state after the last, (2, b, h, p, n).
        shift: Read the states of the neighbours (Hydra). False reads those of the position itself, so that its own
            input counts in both.
        seq_idx: Which packed sequence a position belongs to, (b, l) integers that do not decrease along a row. Both
            states start from zero with each new sequence; the initial ones enter a row's first and last sequence.
        chunk_size: Positions per chunk of the chunked path; None is 64 on a CPU and 128 elsewhere. Triton has its own.
        backend: "auto", "reference", "chunked" or "triton"; see `omnissm.kernels.use_backend`.

    Returns:
        y, (b, l, h, p) in the dtype of `x`, and the forward state after the last position and the backward one after
        the first, (2, b, h, p, n), in float32 (float64 for float64 inputs). With l = 0 they are the initial states.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes or devices disagree, g does not divide h, chunk_size is below 1, or, as far as a CPU in
            eager mode sees it, a log-decay is positive or `seq_idx` decreases.
        BackendError: if `backend` is named explicitly and cannot run here.

    16-bit inputs are multiplied and summed in float32. Under autocast `x`, the B and the C are cast; decays, weights,
    states and `diag` are not. Differentiable in all floating tensors, also twice.
    Source: Hwang, Lahoti, Dao & Gu (2024), "Hydra", section 3.
    """
    floating = {
        "x": x,
        "log_decay_f": log_decay_f,
        "weight_f": weight_f,
        "B_f": B_f,
        "C_f": C_f,
        "log_decay_b": log_decay_b,
        "weight_b": weight_b,
        "B_b": B_b,
        "C_b": C_b,
        "diag": diag,
        "initial_state": initial_state,
    }
    kind = call_kind("quasiseparable", *floating.values(), seq_idx, chunk_size)
    if not known(kind):
        _check(chunk_size, seq_idx, **floating)
        remember(kind)
    check_seq_idx(seq_idx)
    check_log_decays(log_decay_f=log_decay_f, log_decay_b=log_decay_b)
    batch, _, nheads, headdim = x.shape
    n = B_f.shape[3]

    x, B_f, C_f, B_b, C_b = cast_for_autocast(x, B_f, C_f, B_b, C_b)
    dtype = state_dtype(*floating.values())
    chosen = choose(backend, x, op="quasiseparable", obstacle=ssd_obstacle(headdim, n))
    state = None if initial_state is None else initial_state.to(dtype)
    empty = x.numel() == 0 or n == 0
    if state is None and (empty or chosen != "triton"):
        state = x.new_zeros((), dtype=dtype).expand(2, batch, nheads, headdim, n)  # takes no memory
    if x.numel() == 0:
        assert state is not None  # made above
        return torch.zeros_like(x), state.clone()
    diag = in_dtype(diag, dtype)
    weight_f, weight_b = (None if weight is None else in_dtype(weight, dtype) for weight in (weight_f, weight_b))

    def run(x: Tensor, diag: Tensor, forward: Side, backward: Side, state: Tensor | None) -> tuple[Tensor, Tensor]:
        if chosen == "triton" and not empty:
            from .triton_impl import quasiseparable_triton

            return quasiseparable_triton(x, forward, backward, diag, state, shift, seq_idx)
        assert state is not None  # made above
        wide = x.to(dtype)
        if chosen == "reference":
            y, final = quasiseparable_reference(wide, forward, backward, diag, state, shift, seq_idx)
        else:
            y, final = quasiseparable_chunked(wide, forward, backward, diag, state, shift, seq_idx, chunk_size)
        return y.to(x.dtype), final

    forward, backward = in_dtype(log_decay_f, dtype), in_dtype(log_decay_b, dtype)
    if seq_idx is None:
        return run(x, diag, Side(forward, weight_f, B_f, C_f), Side(backward, weight_b, B_b, C_b), state)

    def scan(*parts: Any) -> tuple[Tensor, ...]:
        x, diag, weight_f, B_f, C_f, weight_b, B_b, C_b, forward, backward, left, right = parts
        state = None if left is None else torch.stack([left, right])
        y, final = run(x, diag, Side(forward, weight_f, B_f, C_f), Side(backward, weight_b, B_b, C_b), state)
        return y, final[0], final[1]

    y, left, right = isolated(
        scan,
        seq_idx,
        (x, diag, weight_f, B_f, C_f, weight_b, B_b, C_b),
        decays=(forward, backward),
        first=(None if state is None else state[0],),
        last=(None if state is None else state[1],),
        reach="both",
        ends=(-1, 0),
    )
    return y, torch.stack([left, right])


def _check(chunk_size: int | None, seq_idx: Tensor | None, **floating: Tensor | None) -> None:
    check_floating(allow_complex=False, **floating)
    per_head, per_group = "b l h", "b l g n"
    shapes = {
        "x": "b l h p",
        "log_decay_f": per_head,
        "weight_f": per_head,
        "B_f": per_group,
        "C_f": per_group,
        "log_decay_b": per_head,
        "weight_b": per_head,
        "B_b": per_group,
        "C_b": per_group,
        "diag": per_head,
        "initial_state": "2 b h p n",
    }
    named = {name: (floating[name], dims) for name, dims in shapes.items()}
    sizes = check_shapes(**named, seq_idx=(seq_idx, "b l"))
    check_devices(**floating, seq_idx=seq_idx)
    check_groups(sizes["h"], sizes["g"])
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
