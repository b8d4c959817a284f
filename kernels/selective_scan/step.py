"""`selective_step`: one position of `selective_scan`, for decoding token by token.

Where no gradient is asked for, one Triton kernel on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_devices, check_floating, check_shapes, check_state_index
from ..dispatch import cast_for_autocast, choose
from ..overwriting import overwriting
from ..transforms import plain_call


def selective_step(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    state_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One position of `selective_scan`, from a state to the next one.

        h = exp(dt A) state + dt u B,      y = sum_n C_n h_n + D u,      times silu(z) if z is given

    Args:
        u: Input, (b, d).
        dt: Step after softplus, (b, d).
        A: Rates, (d, n); complex as in `selective_scan`.
        B: Input map, (b, n) or (b, g, n).
        C: Output map, of the shape of `B`.
        state: State before the position, (b, d, n), complex with a complex `A`; with `state_index` a pool of states,
            (s, d, n).
        D: Skip, (d,).
        z: Gate, (b, d).
        state_index: Which state of the pool belongs to each row, (b,) integers, each state at most once. A negative
            index marks a row that is padding: its output is 0 and no state changes for it.

    Returns:
        y, (b, d) in the dtype of `u`, and the new state or pool, in the dtype of `state`.

    Raises:
        TypeError: if an argument is no floating tensor, or B, C or the state is complex otherwise than `A`.
        ValueError: if shapes or devices disagree, or d is no multiple of g; on a CPU in eager mode also if
            `state_index` names a state that is not there, or one twice.

    Several positions at once are `selective_scan` with `initial_state`. Differentiable in all tensors.
    `selective_step_` writes into `state`.
    Source: Gu & Dao (2023), section 3.3.
    """
    if overwriting():
        return selective_step_(u, dt, A, B, C, state, D=D, z=z, state_index=state_index), state
    arguments = (u, dt, A, B, C, state, D, z, state_index)
    _check(*arguments)
    if not A.is_complex() and _fused(u, state, arguments):
        new = state.clone()
        return _in_place(*arguments[:5], new, *arguments[6:]), new
    y, slots, new = _advance(*arguments)
    return y, new if slots is None else state.index_copy(0, slots, new)


@torch.no_grad()
def selective_step_(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    state_index: Tensor | None = None,
) -> Tensor:
    """`selective_step` that writes the new state over the old one, for inference and CUDA graphs.

    Args:
        u: Input, (b, d).
        dt: Step after softplus, (b, d).
        A: Rates, (d, n); complex as in `selective_scan`.
        B: Input map, (b, n) or (b, g, n).
        C: Output map, of the shape of `B`.
        state: State, (b, d, n), or a pool of states, (s, d, n); overwritten.
        D: Skip, (d,).
        z: Gate, (b, d).
        state_index: Which state of the pool belongs to each row, (b,) integers; negative for padding.

    Returns:
        y, (b, d) in the dtype of `u`.

    Raises:
        TypeError: if an argument is no floating tensor, or B, C or the state is complex otherwise than `A`.
        ValueError: if shapes or devices disagree, or d is no multiple of g; on a CPU in eager mode also if
            `state_index` names a state that is not there, or one twice.

    No gradients. Nothing waits for the device and no shape depends on data.
    Source: Gu & Dao (2023), section 3.3.
    """
    arguments = (u, dt, A, B, C, state, D, z, state_index)
    _check(*arguments)
    if not A.is_complex() and _fused(u, state, arguments):
        return _in_place(*arguments)
    y, slots, new = _advance(*arguments)
    if slots is None:
        state.copy_(new)
    else:
        state.index_copy_(0, slots, new)
    return y


def _advance(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    state_index: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Output, the slots that are written (None: all, in order), and what is written to them."""
    if state_index is None:
        y, new = _position(u, dt, A, B, C, state, D, z)
        return y, None, new.to(state.dtype)
    if u.shape[0] == 0:
        return u.clone(), state_index.long(), state[:0]
    valid, slots = state_index >= 0, state_index.clamp(min=0).long()
    old = state.index_select(0, slots)
    y, new = _position(u, dt, A, B, C, old, D, z)
    y = torch.where(valid[:, None], y, torch.zeros_like(y))
    new = torch.where(valid[:, None, None], new.to(state.dtype), old)
    # Padding writes once more what the first valid row writes, so that no slot gets two values.
    writer = torch.where(valid, torch.arange(valid.shape[0], device=valid.device), valid.long().argmax())
    return y, slots.index_select(0, writer), new.index_select(0, writer)


def _check(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    state_index: Tensor | None,
) -> None:
    check_floating(u=u, dt=dt, D=D, z=z)
    check_floating(A=A, B=B, C=C, state=state, allow_complex=True)
    maps = "b g n" if B.dim() == 3 else "b n"
    sizes = check_shapes(
        u=(u, "b d"),
        dt=(dt, "b d"),
        A=(A, "d n"),
        state=(state, "b d n" if state_index is None else "slots d n"),
        B=(B, maps),
        C=(C, maps),
        D=(D, "d"),
        z=(z, "b d"),
        state_index=(state_index, "b"),
    )
    check_devices(u=u, dt=dt, A=A, B=B, C=C, D=D, z=z, state=state, state_index=state_index)
    check_state_index(state_index, state.shape[0])
    for name, tensor in (("B", B), ("C", C)):
        if tensor.is_complex() and not A.is_complex():
            raise TypeError(f"`{name}` is complex and `A` is not; make `A` complex too, e.g. A.to(torch.complex64).")
    if state.is_complex() != A.is_complex():
        raise TypeError(f"`state` has dtype {state.dtype} and `A` {A.dtype}; both or none must be complex.")
    groups = sizes.get("g", 1)
    if groups < 1 or sizes["d"] % groups != 0:
        raise ValueError(f"`B` has g={groups}, expected a divisor of d={sizes['d']} (from `u`).")


def _fused(u: Tensor, state: Tensor, arguments: tuple[Tensor | None, ...]) -> bool:
    """Whether the Triton kernel, which has no gradient, takes this call."""
    if u.numel() == 0 or state.numel() == 0 or not state.is_contiguous() or not plain_call(*arguments):
        return False
    return choose("auto", u, op="selective_step") == "triton"


def _in_place(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    state_index: Tensor | None,
) -> Tensor:
    from .triton_step import selective_step_triton

    u, B, C = cast_for_autocast(u, B, C)
    if z is not None:
        (z,) = cast_for_autocast(z)
    B, C = (x if x.dim() == 3 else x[:, None] for x in (B, C))
    double = torch.promote_types(u.dtype, A.dtype) == torch.float64
    return selective_step_triton(u, dt, A, B, C, state, D, z, state_index, double)


def _position(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, D: Tensor | None, z: Tensor | None
) -> tuple[Tensor, Tensor]:
    (u,) = cast_for_autocast(u)
    if z is not None:
        (z,) = cast_for_autocast(z)
    B, C = (x if x.is_complex() else cast_for_autocast(x)[0] for x in (B, C))
    dtype = torch.promote_types(torch.promote_types(u.dtype, A.dtype), torch.float32)
    groups = B.shape[1] if B.dim() == 3 else 1
    B, C = (x.to(dtype).reshape(x.shape[0], groups, 1, A.shape[1]) for x in (B, C))  # (b, g, 1, n)
    wide_u, wide_dt = (x.to(dtype.to_real()).unflatten(1, (groups, -1))[..., None] for x in (u, dt))
    decay = torch.exp(wide_dt * A.to(dtype).unflatten(0, (groups, -1)))
    h = decay * state.to(dtype).unflatten(1, (groups, -1)) + wide_dt * wide_u * B
    y = (C * h).sum(-1).flatten(1)
    y = 2 * y.real if y.is_complex() else y
    if D is not None:
        y = y + D * u.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(u.dtype), h.flatten(1, 2)
