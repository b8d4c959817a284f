"""One position of `ssd`, for decoding. Where no gradient is asked for, one Triton kernel on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_devices, check_floating, check_shapes, check_state_index
from ..dispatch import cast_for_autocast, choose
from ..overwriting import overwriting
from ..transforms import plain_call
from .op import check_groups, state_dtype


def ssd_step(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    weight: Tensor | None = None,
    D: Tensor | None = None,
    state_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One position of `ssd`: y = H' C + D x with H' = exp(log_decay) H + weight x B^T.

    Args:
        x: Input, (b, h, p).
        log_decay: Logarithm of the decay, <= 0, (b, h).
        B: What enters the state, (b, g, n).
        C: What is read from the state, (b, g, n).
        state: State before this position, (b, h, p, n); with `state_index` a pool of states, (s, h, p, n).
        weight: Weight of the input, (b, h); None: `x` comes weighted already.
        D: Skip from `x` to the output, (h,) or (b, h).
        state_index: Which state of the pool belongs to each row, (b,) integers, each state at most once. A negative
            index marks a row that is padding: its output is 0 and no state changes for it.

    Returns:
        y, (b, h, p) in the dtype of `x`, and the new state or pool, in the dtype of `state`.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes or devices disagree or g does not divide h; on a CPU in eager mode also if `state_index`
            names a state that is not there, or one twice.

    Sums are float32, or wider if an input is. Differentiable in all floating tensors. `ssd_step_` writes into `state`.
    Source: Dao & Gu (2024), "Transformers are SSMs".
    """
    if overwriting():
        return ssd_step_(x, log_decay, B, C, state, weight=weight, D=D, state_index=state_index), state
    arguments = (x, log_decay, B, C, state, weight, D, state_index)
    _check(*arguments)
    if _fused(x, state, arguments):
        new = state.clone()
        return _in_place(*arguments[:4], new, *arguments[5:]), new
    y, new = _advance(*arguments)
    if state_index is None:
        return y, new.to(state.dtype)
    # For each state of the pool the row that writes it; padding rows write to a place behind the last state.
    count = state.shape[0]
    rows = torch.arange(x.shape[0], device=x.device)
    writer = rows.new_full((count + 1,), -1).scatter(0, torch.where(state_index < 0, count, state_index).long(), rows)
    writer = writer[:count]
    written = new.to(state.dtype).index_select(0, writer.clamp(min=0)) if x.shape[0] else state
    return y, torch.where((writer >= 0)[:, None, None, None], written, state)


@torch.no_grad()
def ssd_step_(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    weight: Tensor | None = None,
    D: Tensor | None = None,
    state_index: Tensor | None = None,
) -> Tensor:
    """`ssd_step` in place: overwrite `state` and return y; no gradients, no wait for the device, fit for CUDA graphs.

    Args:
        x: Input, (b, h, p).
        log_decay: Logarithm of the decay, (b, h).
        B: What enters the state, (b, g, n).
        C: What is read from the state, (b, g, n).
        state: State, (b, h, p, n), or a pool of states (s, h, p, n); overwritten.
        weight: Weight of the input, (b, h).
        D: Skip from `x` to the output, (h,) or (b, h).
        state_index: Which state of the pool belongs to each row, (b,) integers; negative for padding.

    Returns:
        y, (b, h, p) in the dtype of `x`.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes or devices disagree or g does not divide h; on a CPU in eager mode also if `state_index`
            names a state that is not there, or one twice.
    """
    arguments = (x, log_decay, B, C, state, weight, D, state_index)
    _check(*arguments)
    if _fused(x, state, arguments):
        return _in_place(*arguments)
    y, new = _advance(*arguments)
    new = new.to(state.dtype)
    if state_index is None:
        state.copy_(new)
    elif x.shape[0]:
        # A padding row repeats what the first row that is none writes, so that it needs no place of its own. Without
        # such a row all rows write a state back as it was.
        real = state_index >= 0
        rows = torch.arange(x.shape[0], device=x.device)
        source = torch.where(real, rows, real.int().argmax())
        place = state_index.clamp(min=0).long().index_select(0, source)
        written = torch.where(real.any(), new.index_select(0, source), state.index_select(0, place))
        state.index_put_((place,), written)
    return y


def _check(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    weight: Tensor | None,
    D: Tensor | None,
    state_index: Tensor | None,
) -> None:
    check_floating(x=x, log_decay=log_decay, B=B, C=C, state=state, weight=weight, D=D)
    sizes = check_shapes(
        x=(x, "b h p"),
        log_decay=(log_decay, "b h"),
        B=(B, "b g n"),
        C=(C, "b g n"),
        state=(state, "b h p n" if state_index is None else "s h p n"),
        weight=(weight, "b h"),
        D=(D, "h" if D is not None and D.dim() == 1 else "b h"),
        state_index=(state_index, "b"),
    )
    check_devices(x=x, log_decay=log_decay, B=B, C=C, state=state, weight=weight, D=D, state_index=state_index)
    check_state_index(state_index, state.shape[0])
    check_groups(sizes["h"], sizes["g"])


def _fused(x: Tensor, state: Tensor, arguments: tuple[Tensor | None, ...]) -> bool:
    """Whether the Triton kernel, which has no gradient, takes this call."""
    if x.numel() == 0 or state.numel() == 0 or not state.is_contiguous() or not plain_call(*arguments):
        return False
    return choose("auto", x, op="ssd_step") == "triton"


def _in_place(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    weight: Tensor | None,
    D: Tensor | None,
    state_index: Tensor | None,
) -> Tensor:
    from .triton_step import ssd_step_triton

    x, B, C = cast_for_autocast(x, B, C)
    double = state_dtype(x, log_decay, B, C, state, weight, D) == torch.float64
    return ssd_step_triton(x, log_decay, B, C, state, weight, D, state_index, double)


def _advance(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    weight: Tensor | None,
    D: Tensor | None,
    state_index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the new state of each row, (b, h, p, n), in the dtype of the sums."""
    x, B, C = cast_for_autocast(x, B, C)
    dtype = state_dtype(x, log_decay, B, C, state, weight, D)
    groups = B.shape[1]
    wide = x.to(dtype)
    h = (state if state_index is None else state.index_select(0, state_index.clamp(min=0).long())).to(dtype)
    v = wide if weight is None else wide * weight.to(dtype)[..., None]
    heads = (groups, x.shape[1] // groups)
    entering = v.unflatten(1, heads)[..., None] * B.to(dtype)[:, :, None, None]
    h = log_decay.to(dtype).exp()[..., None, None] * h + entering.flatten(1, 2)
    y = (h.unflatten(1, heads) * C.to(dtype)[:, :, None, None]).sum(-1).flatten(1, 2)
    if D is not None:
        y = y + D.to(dtype)[..., None] * wide
    if state_index is not None:
        y = torch.where((state_index >= 0)[:, None, None], y, torch.zeros_like(y))
    return y.to(x.dtype), h
