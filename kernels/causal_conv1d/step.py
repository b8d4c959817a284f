"""One position of `causal_conv1d`, for decoding. Where no gradient is asked for, one Triton kernel on a GPU."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_devices, check_floating, check_shapes, check_state_index
from ..dispatch import cast_for_autocast, choose
from ..overwriting import overwriting
from ..transforms import plain_call


def conv_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = "silu",
    state_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One position of the causal `causal_conv1d`: y = act(bias + sum_i weight_i [state, x]_i).

    Args:
        x: Input, (b, c).
        state: The k - 1 inputs before this one, oldest first, (b, c, k - 1); with `state_index` a pool of states,
            (s, c, k - 1).
        weight: One filter per channel, (c, k), k from 1 to 8; the last tap is the current position.
        bias: (c,).
        activation: "silu" or None.
        state_index: Which state of the pool belongs to each row, (b,) integers, each state at most once. A negative
            index marks a row that is padding: its output is 0 and no state changes for it.

    Returns:
        y, (b, c) in the dtype of `x`, and the new state or pool, in the dtype of `state`.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes or devices disagree, k is out of range or the activation is unknown; on a CPU in eager
            mode also if `state_index` names a state that is not there, or one twice.

    Sums are float32, or wider for such parameters. Differentiable in all floating tensors. `conv_step_` writes into
    `state`.
    Source: Gu & Dao (2023), section 3.4.
    """
    if overwriting():
        y = conv_step_(x, state, weight, bias, activation=activation, state_index=state_index)
        return y, state
    _check(x, state, weight, bias, activation, state_index)
    if _fused(x, state, weight, bias):
        new = state.clone()
        return _in_place(x, new, weight, bias, activation, state_index), new
    y, new = _advance(x, state, weight, bias, activation, state_index)
    if state_index is None:
        return y, new
    # Padding rows write to a place behind the last state, which is cut off again.
    count = state.shape[0]
    place = torch.where(state_index < 0, count, state_index).long()
    return y, F.pad(state, (0, 0, 0, 0, 0, 1)).index_copy(0, place, new)[:count]


@torch.no_grad()
def conv_step_(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = "silu",
    state_index: Tensor | None = None,
) -> Tensor:
    """`conv_step` in place: overwrite `state` and return y; no gradients, no wait for the device, fit for CUDA graphs.

    Args:
        x: Input, (b, c).
        state: The k - 1 inputs before this one, (b, c, k - 1), or a pool of states (s, c, k - 1); overwritten.
        weight: One filter per channel, (c, k).
        bias: (c,).
        activation: "silu" or None.
        state_index: Which state of the pool belongs to each row, (b,) integers; negative for padding.

    Returns:
        y, (b, c) in the dtype of `x`.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes or devices disagree, k is out of range or the activation is unknown; on a CPU in eager
            mode also if `state_index` names a state that is not there, or one twice.
    """
    _check(x, state, weight, bias, activation, state_index)
    if _fused(x, state, weight, bias):
        return _in_place(x, state, weight, bias, activation, state_index)
    y, new = _advance(x, state, weight, bias, activation, state_index)
    if state_index is None:
        state.copy_(new)
    elif x.shape[0]:
        # A padding row repeats what the first row that is none writes, so that it needs no place of its own. Without
        # such a row all rows write a state back as it was.
        real = state_index >= 0
        source = torch.where(real, torch.arange(x.shape[0], device=x.device), real.int().argmax())
        place = state_index.clamp(min=0).long().index_select(0, source)
        written = torch.where(real.any(), new.index_select(0, source), state.index_select(0, place))
        state.index_put_((place,), written)
    return y


def _check(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state_index: Tensor | None
) -> None:
    check_floating(x=x, state=state, weight=weight, bias=bias)
    sizes = check_shapes(
        x=(x, "b c"),
        weight=(weight, "c k"),
        bias=(bias, "c"),
        state=(state, "b c m" if state_index is None else "s c m"),
        state_index=(state_index, "b"),
    )
    check_devices(x=x, state=state, weight=weight, bias=bias, state_index=state_index)
    check_state_index(state_index, state.shape[0])
    k = sizes["k"]
    if not 1 <= k <= 8:
        raise ValueError(f"`weight` has k={k}, expected 1 to 8.")
    if sizes["m"] != k - 1:
        raise ValueError(
            f"`state` has {sizes['m']} inputs, expected {k - 1} (k - 1 of `weight`), the oldest first; "
            "of a cache that holds k inputs, drop the oldest."
        )
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}.")


def _fused(x: Tensor, state: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the Triton kernel, which has no gradient, takes this call."""
    if x.numel() == 0 or not state.is_contiguous() or not plain_call(x, state, *parameters):
        return False
    return choose("auto", x, op="conv_step") == "triton"


def _in_place(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state_index: Tensor | None
) -> Tensor:
    from .triton_step import conv_step_triton

    (x,) = cast_for_autocast(x)
    double = torch.promote_types(x.dtype, weight.dtype) == torch.float64
    return conv_step_triton(x, state, weight, bias, activation == "silu", state_index, double)


def _advance(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y and the new state of each row, (b, c, k - 1), in the dtype of `state`."""
    (x,) = cast_for_autocast(x)
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    before = state if state_index is None else state.index_select(0, state_index.clamp(min=0).long())
    window = torch.cat([before.to(x.dtype), x[..., None]], dim=-1)
    y = (window.to(dtype) * weight.to(dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = F.silu(y)
    if state_index is not None:
        y = torch.where((state_index >= 0)[:, None], y, torch.zeros_like(y))
    return y.to(x.dtype), window[..., 1:].to(state.dtype)
