"""`causal_conv1d`: the short depthwise convolution before a state-space recurrence."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..checks import call_kind, check_devices, check_floating, check_shapes, known, remember
from ..dispatch import Backend, cast_for_autocast, choose
from ..packing import check_seq_idx
from ..transforms import plain_call, transforming
from .chunked import causal_conv1d_chunked
from .reference import causal_conv1d_reference
from .state import last_inputs, with_inputs_before

# From here on the positions that see the state are worked out apart.
_LONG = 64


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = "silu",
    symmetric: bool = False,
    seq_idx: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Depthwise convolution of width k along dim 1, causal or centred.

        y_t = act(bias + sum_{i<k} weight_i x_{t-k+1+i})          symmetric: x_{t-(k-1)/2+i}

    Args:
        x: Input, (b, l, c).
        weight: One filter per channel, (c, k), k from 1 to 8; the last tap is the current position.
        bias: (c,).
        initial_state: The k - 1 inputs before the first position, oldest first, (b, c, k - 1); zeros if None.
        activation: "silu" or None.
        symmetric: Centre the filter on the position (k odd) instead of ending it there. Takes no state.
        seq_idx: Which packed sequence a position belongs to, (b, l) integers that do not decrease along a row. The
            filter stops at borders; `initial_state` belongs to the first sequence of a row.
        backend: "auto", "reference", "chunked" or "triton"; see `omnissm.kernels.use_backend`.

    Returns:
        y, (b, l, c) in the dtype of `x`, and the state after the last position, (b, c, k - 1) in the dtype of `x`
        (b, c, 0 if symmetric). With packing it is the state of a row's last sequence.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes or devices disagree, k is out of range, or symmetric comes with an even k or a state.
        BackendError: if `backend` is named explicitly and cannot run here.

    Products and sums are float32 (float64 for float64 parameters or inputs). Under autocast `x` is cast, the parameters
    are not. Differentiable in all floating tensors; the reference and chunked paths also twice.
    Source: Gu & Dao (2023), section 3.4; centred form: Hwang et al. (2024), section 4.
    """
    kind = call_kind("causal_conv1d", x, weight, bias, initial_state, activation, symmetric, seq_idx)
    if not known(kind):
        _check(x, weight, bias, initial_state, activation, symmetric, seq_idx)
        remember(kind)
    check_seq_idx(seq_idx)
    k, length = weight.shape[1], x.shape[1]

    (x,) = cast_for_autocast(x)
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    chosen = choose(backend, x, op="causal_conv1d") if x.numel() else "chunked"
    size = 0 if symmetric else k - 1
    # In eager mode Triton's function takes along a state that is the end of x.
    along = chosen == "triton" and initial_state is None and seq_idx is None
    along = along and not torch.compiler.is_compiling() and not transforming() and length >= size
    state = None if along else last_inputs(x, initial_state, seq_idx, size)
    left = (k - 1) // 2 if symmetric else k - 1
    if initial_state is not None and k > 1 and length > 0:
        if not torch.compiler.is_compiling() and length > _LONG and plain_call(x, weight, bias, initial_state):
            # Only the first positions see the state: no copy of all of x with the state in front.
            options: dict[str, Any] = {"activation": activation, "backend": backend}
            y, _ = causal_conv1d(x, weight, bias, seq_idx=seq_idx, **options)
            first = x[:, : k - 1], None if seq_idx is None else seq_idx[:, : k - 1]
            y[:, : k - 1] = causal_conv1d(first[0], weight, bias, initial_state, seq_idx=first[1], **options)[0]
            assert state is not None  # made above
            return y, state
        x, seq_idx = with_inputs_before(x, initial_state, seq_idx)
        left = 0
    silu = activation == "silu"
    if chosen == "triton":
        from .triton_impl import causal_conv1d_triton

        y, end = causal_conv1d_triton(x, weight, bias, seq_idx, left, length, silu, size if along else 0)
        return y, end if state is None else state
    assert state is not None  # made above
    if x.numel() == 0 or length == 0:
        return x[:, x.shape[1] - length :].clone(), state
    convolve = causal_conv1d_reference if chosen == "reference" else causal_conv1d_chunked
    return convolve(x, weight, bias, seq_idx, left, length, silu), state


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    activation: str | None,
    symmetric: bool,
    seq_idx: Tensor | None,
) -> None:
    check_floating(x=x, weight=weight, bias=bias, initial_state=initial_state)
    sizes = check_shapes(x=(x, "b l c"), weight=(weight, "c k"), bias=(bias, "c"), seq_idx=(seq_idx, "b l"))
    check_devices(x=x, weight=weight, bias=bias, initial_state=initial_state, seq_idx=seq_idx)
    k = sizes["k"]
    if not 1 <= k <= 8:
        raise ValueError(f"`weight` has k={k}, expected 1 to 8; use `fft_conv` for wider filters.")
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}.")
    if symmetric and (k % 2 == 0 or initial_state is not None):
        reason = f"k={k}" if k % 2 == 0 else "an initial_state"
        raise ValueError(f"symmetric=True needs an odd k and no initial_state, got {reason}.")
    check_shapes(x=(x, "b l c"), initial_state=(initial_state, f"b c {k - 1}"))
