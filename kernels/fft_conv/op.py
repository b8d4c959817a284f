"""`fft_conv`: the long convolution that a time-invariant state-space model amounts to."""

from __future__ import annotations

import torch
from torch import Tensor

from ..causal_conv1d.state import last_inputs, with_inputs_before
from ..checks import check_devices, check_floating, check_shapes
from ..dispatch import Backend, cast_for_autocast, choose
from ..packing import check_seq_idx
from .chunked import fft_conv_chunked
from .reference import fft_conv_reference


def fft_conv(
    x: Tensor,
    kernel: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    kernel_ahead: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Depthwise convolution of any width along dim 1, causal or two-sided.

        y_t = sum_{s<=t} kernel_{t-s} x_s + D x_t   (+ sum_{s>t} kernel_ahead_{s-t-1} x_s)

    Args:
        x: Input, (b, l, c).
        kernel: One impulse response per channel, (c, k), k >= 1, shorter or longer than l; entry 0 is the current
            position's. (The filters of `causal_conv1d` run the other way.)
        D: Skip, (c,).
        initial_state: The k - 1 inputs before the first position, oldest first, (b, c, k - 1); zeros if None.
        kernel_ahead: Response to later inputs, (c, k); entry 0 is the next position's. Takes no state.
        seq_idx: Which packed sequence a position belongs to, (b, l) integers that do not decrease along a row. The
            kernels stop at borders; `initial_state` belongs to the first sequence of a row.
        backend: "auto", "reference" or "chunked"; see `omnissm.kernels.use_backend`.

    Returns:
        y, (b, l, c) in the dtype of `x`, and the state after the last position, (b, c, k - 1) in the dtype of `x`
        (b, c, 0 if two-sided). With packing it is the state of a row's last sequence.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes or devices disagree, the kernel is empty, or `kernel_ahead` comes with a state.
        BackendError: if `backend` is named explicitly and cannot run here.

    FFTs, products and sums are float32 (float64 for float64 parameters or inputs), never narrower. Under autocast `x`
    is cast, the parameters are not. Differentiable any number of times in all floating tensors.
    Source: Gu, Goel & Ré (2021), section 3; two-sided form: Goel et al. (2022).
    """
    check_floating(x=x, kernel=kernel, D=D, initial_state=initial_state, kernel_ahead=kernel_ahead)
    sizes = check_shapes(
        x=(x, "b l c"),
        kernel=(kernel, "c k"),
        D=(D, "c"),
        initial_state=(initial_state, "b c m"),
        kernel_ahead=(kernel_ahead, "c k"),
        seq_idx=(seq_idx, "b l"),
    )
    check_devices(x=x, kernel=kernel, D=D, initial_state=initial_state, kernel_ahead=kernel_ahead, seq_idx=seq_idx)
    check_seq_idx(seq_idx)
    k, length = sizes["k"], sizes["l"]
    if k < 1:
        raise ValueError("`kernel` has k=0, expected at least 1; leave the op out for an empty kernel.")
    if kernel_ahead is not None and initial_state is not None:
        raise ValueError("kernel_ahead takes no initial_state, got both; put the earlier inputs in front of `x`.")
    if initial_state is not None and sizes["m"] != k - 1:
        raise ValueError(
            f"`initial_state` has {sizes['m']} inputs, expected {k - 1} (k - 1 of `kernel`); `initial_state` is "
            f"(b, c, k - 1), got shape {tuple(initial_state.shape)}."
        )

    (x,) = cast_for_autocast(x)
    dtype = torch.promote_types(torch.promote_types(x.dtype, kernel.dtype), torch.float32)
    state = last_inputs(x, initial_state, seq_idx, 0 if kernel_ahead is not None else k - 1)
    if x.numel() == 0:
        return x.clone(), state
    skip = None if D is None else D.to(dtype) * x.to(dtype)
    narrow = x.dtype
    if initial_state is not None and k > 1:
        x, seq_idx = with_inputs_before(x, initial_state, seq_idx)
    taps, lead = kernel.to(dtype), 0
    if kernel_ahead is not None:
        taps, lead = torch.cat([kernel_ahead.to(dtype).flip(1), taps], dim=1), k
    convolve = {"reference": fft_conv_reference, "chunked": fft_conv_chunked}[
        choose(backend, x, op="fft_conv", implementations=("reference", "chunked"))
    ]
    y = convolve(x.to(dtype), taps, lead, seq_idx)[:, x.shape[1] - length :]
    return (y if skip is None else y + skip).to(narrow), state
