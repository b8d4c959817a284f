"""One position of `trapezoid_ssd`, for decoding. Where no gradient is asked for, one Triton kernel on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_devices, check_floating, check_shapes, check_state_index
from ..dispatch import cast_for_autocast, choose
from ..overwriting import overwriting
from ..ssd.op import state_dtype
from ..transforms import plain_call
from .op import STATE_SHAPES, check_rotation, check_state, default_parameters
from .reference import advance
from .state import Rotation, TrapezoidState


def trapezoid_step(
    x: Tensor,
    log_decay: Tensor,
    gamma: Tensor,
    beta: Tensor,
    theta: Tensor,
    B: Tensor,
    C: Tensor,
    state: TrapezoidState,
    *,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    x_rank: Tensor | None = None,
    rotation: Rotation = "interleaved",
    state_index: Tensor | None = None,
) -> tuple[Tensor, TrapezoidState]:
    """One position of `trapezoid_ssd`, from a state to the next one.

    Args:
        x: Input, (b, h, p).
        log_decay: Logarithm of the decay, <= 0, (b, h).
        gamma: Weight of this input, (b, h).
        beta: Weight of the input before it, (b, h).
        theta: Angle rates before tanh, (b, s).
        B: What enters the state, (b, r, g, n).
        C: What is read from the state, (b, r, g, n).
        state: State before this position; with `state_index` a pool of states, whose parts have any number of rows.
        B_bias: Added to B for each head, (h, r, n).
        C_bias: Added to C for each head, (h, r, n).
        D: Skip from `v` to the output, (h,).
        x_rank: Factors that make the inputs of the ranks from `x`, (h, r, p); None is ones.
        rotation: "interleaved" or "half", as in `trapezoid_ssd`.
        state_index: Which state of the pool belongs to each row, (b,) integers, each state at most once. A negative
            index marks a row that is padding: its output is 0 and no state changes for it.

    Returns:
        y, (b, r, h, p) in the dtype of `x`, and the new state or pool, its parts in the dtypes of `state`.

    Raises:
        TypeError: if an argument is no floating tensor, or `state` no TrapezoidState.
        ValueError: if shapes or devices disagree, g does not divide h, there are more angles than pairs, or `rotation`
            is unknown; on a CPU in eager mode also if `state_index` names a state that is not there, or one twice.

    Sums are float32, or wider if an input is. Differentiable in all floating tensors. `trapezoid_step_` writes into
    `state`.
    Source: Lahoti, Li, Chen et al. (2026), "Mamba-3".
    """
    if overwriting():
        y = trapezoid_step_(
            x, log_decay, gamma, beta, theta, B, C, state,
            B_bias=B_bias, C_bias=C_bias, D=D, x_rank=x_rank, rotation=rotation, state_index=state_index,
        )  # fmt: skip
        return y, state
    arguments = (x, log_decay, gamma, beta, theta, B, C, state, B_bias, C_bias, D, x_rank, rotation, state_index)
    sizes = _check(*arguments)
    if _fused(*arguments):
        new = TrapezoidState(*(part.clone() for part in state))
        return _in_place(*arguments[:7], new, *arguments[8:]), new
    y, new = _advance(sizes, *arguments)
    if state_index is None:
        return y, new
    # For each state of the pool the row that writes it; padding rows write to a place behind the last state.
    count = state.phi.shape[0]
    rows = torch.arange(x.shape[0], device=x.device)
    writer = rows.new_full((count + 1,), -1).scatter(0, torch.where(state_index < 0, count, state_index).long(), rows)
    writer = writer[:count]
    chosen = writer.clamp(min=0)
    pool = []
    for old, part in zip(state, new, strict=True):
        written = part.index_select(0, chosen) if x.shape[0] else old
        pool.append(torch.where((writer >= 0).view(-1, *[1] * (old.dim() - 1)), written, old))
    return y, TrapezoidState(*pool)


@torch.no_grad()
def trapezoid_step_(
    x: Tensor,
    log_decay: Tensor,
    gamma: Tensor,
    beta: Tensor,
    theta: Tensor,
    B: Tensor,
    C: Tensor,
    state: TrapezoidState,
    *,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    x_rank: Tensor | None = None,
    rotation: Rotation = "interleaved",
    state_index: Tensor | None = None,
) -> Tensor:
    """`trapezoid_step` in place: overwrite `state` and return y; no gradients, no wait for the device.

    Args:
        x: Input, (b, h, p).
        log_decay: Logarithm of the decay, <= 0, (b, h).
        gamma: Weight of this input, (b, h).
        beta: Weight of the input before it, (b, h).
        theta: Angle rates before tanh, (b, s).
        B: What enters the state, (b, r, g, n).
        C: What is read from the state, (b, r, g, n).
        state: State before this position, or a pool of states; its parts are overwritten.
        B_bias: Added to B for each head, (h, r, n).
        C_bias: Added to C for each head, (h, r, n).
        D: Skip from `v` to the output, (h,).
        x_rank: Factors that make the inputs of the ranks from `x`, (h, r, p); None is ones.
        rotation: "interleaved" or "half", as in `trapezoid_ssd`.
        state_index: Which state of the pool belongs to each row, (b,) integers; negative for padding.

    Returns:
        y, (b, r, h, p) in the dtype of `x`.

    Raises:
        TypeError: if an argument is no floating tensor, or `state` no TrapezoidState.
        ValueError: if shapes or devices disagree, g does not divide h, there are more angles than pairs, or `rotation`
            is unknown; on a CPU in eager mode also if `state_index` names a state that is not there, or one twice.
    """
    arguments = (x, log_decay, gamma, beta, theta, B, C, state, B_bias, C_bias, D, x_rank, rotation, state_index)
    sizes = _check(*arguments)
    if _fused(*arguments):
        return _in_place(*arguments)
    y, new = _advance(sizes, *arguments)
    if state_index is None:
        for old, part in zip(state, new, strict=True):
            old.copy_(part)
    elif x.shape[0]:
        # A padding row repeats what the first row that is none writes, so that it needs no place of its own. Without
        # such a row all rows write a state back as it was.
        real = state_index >= 0
        rows = torch.arange(x.shape[0], device=x.device)
        source = torch.where(real, rows, real.int().argmax())
        place = state_index.clamp(min=0).long().index_select(0, source)
        for old, part in zip(state, new, strict=True):
            written = torch.where(real.any(), part.index_select(0, source), old.index_select(0, place))
            old.index_put_((place,), written)
    return y


def _check(
    x: Tensor,
    log_decay: Tensor,
    gamma: Tensor,
    beta: Tensor,
    theta: Tensor,
    B: Tensor,
    C: Tensor,
    state: TrapezoidState,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    D: Tensor | None,
    x_rank: Tensor | None,
    rotation: str,
    state_index: Tensor | None,
) -> dict[str, int]:
    """The sizes."""
    given = check_state(state)
    floating = {
        "x": x, "log_decay": log_decay, "gamma": gamma, "beta": beta, "theta": theta, "B": B, "C": C,
        "B_bias": B_bias, "C_bias": C_bias, "D": D, "x_rank": x_rank, **given,
    }  # fmt: skip
    check_floating(allow_complex=False, **floating)
    rows = "b" if state_index is None else "rows"
    sizes = check_shapes(
        x=(x, "b h p"),
        log_decay=(log_decay, "b h"),
        gamma=(gamma, "b h"),
        beta=(beta, "b h"),
        theta=(theta, "b s"),
        B=(B, "b r g n"),
        C=(C, "b r g n"),
        B_bias=(B_bias, "h r n"),
        C_bias=(C_bias, "h r n"),
        D=(D, "h"),
        x_rank=(x_rank, "h r p"),
        state_index=(state_index, "b"),
        **{name: (part, rows + dims[1:]) for (name, part), dims in zip(given.items(), STATE_SHAPES, strict=True)},
    )
    check_devices(**floating, state_index=state_index)
    check_state_index(state_index, state.phi.shape[0])
    check_rotation(rotation, sizes)
    return sizes


def _fused(
    x: Tensor,
    log_decay: Tensor,
    gamma: Tensor,
    beta: Tensor,
    theta: Tensor,
    B: Tensor,
    C: Tensor,
    state: TrapezoidState,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    D: Tensor | None,
    x_rank: Tensor | None,
    rotation: str,
    state_index: Tensor | None,
) -> bool:
    """Whether the Triton kernel, which has no gradient, takes this call."""
    if not (x.numel() and B.numel() and state.ssm.numel()) or not all(part.is_contiguous() for part in state):
        return False
    if not plain_call(x, log_decay, gamma, beta, theta, B, C, *state, B_bias, C_bias, D, x_rank):
        return False
    return choose("auto", x, op="trapezoid_step") == "triton"


def _in_place(
    x: Tensor,
    log_decay: Tensor,
    gamma: Tensor,
    beta: Tensor,
    theta: Tensor,
    B: Tensor,
    C: Tensor,
    state: TrapezoidState,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    D: Tensor | None,
    x_rank: Tensor | None,
    rotation: str,
    state_index: Tensor | None,
) -> Tensor:
    from .triton_step import trapezoid_step_triton

    x, B, C = cast_for_autocast(x, B, C)
    double = state_dtype(x, log_decay, gamma, beta, theta, B, C, *state, B_bias, C_bias, D, x_rank) == torch.float64
    return trapezoid_step_triton(
        x, log_decay, gamma, beta, theta, B, C, *state, B_bias, C_bias, D, x_rank, state_index, rotation == "half",
        double,
    )  # fmt: skip


def _advance(
    sizes: dict[str, int],
    x: Tensor,
    log_decay: Tensor,
    gamma: Tensor,
    beta: Tensor,
    theta: Tensor,
    B: Tensor,
    C: Tensor,
    state: TrapezoidState,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    D: Tensor | None,
    x_rank: Tensor | None,
    rotation: str,
    state_index: Tensor | None,
) -> tuple[Tensor, TrapezoidState]:
    """y and the new state of each row, in the dtypes of `state`."""
    x, B, C = cast_for_autocast(x, B, C)
    dtype = state_dtype(x, log_decay, gamma, beta, theta, B, C, *state, B_bias, C_bias, D, x_rank)
    log_decay, gamma, beta, theta = (part.to(dtype) for part in (log_decay, gamma, beta, theta))
    parameters = default_parameters(sizes, B_bias, C_bias, D, x_rank, x, dtype)
    before = state
    if state_index is not None:
        chosen = state_index.clamp(min=0).long()
        before = TrapezoidState(*(part.index_select(0, chosen) for part in state))
    y, new = advance(x, log_decay, gamma, beta, theta, B, C, before, *parameters, rotation == "half")
    if state_index is not None:
        y = torch.where((state_index >= 0)[:, None, None, None], y, torch.zeros_like(y))
    return y.to(x.dtype), TrapezoidState(*(part.to(old.dtype) for part, old in zip(new, state, strict=True)))
