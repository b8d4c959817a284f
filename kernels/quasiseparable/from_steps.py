"""Hydra's product from what its projections give; for short 16-bit rows without gradients in two kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import call_kind, check_devices, check_floating, check_shapes, known, remember
from ..dispatch import Backend, choose
from ..ssd.op import check_groups
from ..transforms import call, plain_call
from .op import quasiseparable

_SHAPES = {
    "x": "b l h p",
    "dt_f": "b l h",
    "dt_b": "b l h",
    "dt_bias": "h",
    "A_log": "h",
    "B_f": "b l g n",
    "C_f": "b l g n",
    "B_b": "b l g n",
    "C_b": "b l g n",
    "diag": "b l h",
    "D": "h",
}
# Of the kernel for short rows.
_LONGEST, _WIDEST = 256, 128


def quasiseparable_from_steps(
    x: Tensor,
    dt_f: Tensor,
    dt_b: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    B_f: Tensor,
    C_f: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    diag: Tensor,
    D: Tensor,
    *,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`quasiseparable` with steps softplus(dt + dt_bias), decays exp(-exp(A_log) step) and the diagonal diag + D.

    Args:
        x: Input, (b, l, h, p).
        dt_f: Forward steps before bias and softplus, (b, l, h).
        dt_b: Backward ones.
        dt_bias: (h,).
        A_log: Logarithm of the decay rates, (h,).
        B_f: Input map forward, (b, l, g, n).
        C_f: Output map forward.
        B_b: Input map backward.
        C_b: Output map backward.
        diag: (b, l, h).
        D: (h,).
        chunk_size: Positions per chunk of the chunked path; None lets it choose.
        backend: As of `quasiseparable`.

    Returns:
        (b, l, h, p).

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes or devices disagree, g does not divide h, or chunk_size is below 1.
        BackendError: if `backend` is named explicitly and cannot run here.
    """
    tensors = x, dt_f, dt_b, dt_bias, A_log, B_f, C_f, B_b, C_b, diag, D
    kind = call_kind("quasiseparable_from_steps", *tensors, chunk_size)
    if not known(kind):
        _check(chunk_size, *tensors)
        remember(kind)
    short = plain_call(*tensors) and _short(x, B_f, C_f, B_b, C_b)
    if short and choose(backend, x, op="quasiseparable") == "triton":
        from .triton_short import quasiseparable_short

        return call(quasiseparable_short, *tensors)
    wide = torch.promote_types(x.dtype, torch.float32)
    rate = -A_log.to(wide).exp()
    forward, backward = (F.softplus(dt.to(wide) + dt_bias.to(wide)) for dt in (dt_f, dt_b))
    y, _ = quasiseparable(
        x,
        forward * rate,
        forward,
        B_f,
        C_f,
        backward * rate,
        backward,
        B_b,
        C_b,
        diag + D,
        chunk_size=chunk_size,
        backend=backend,
    )
    return y


def _check(chunk_size: int | None, *tensors: Tensor) -> None:
    floating = dict(zip(_SHAPES, tensors, strict=True))
    for name, tensor in floating.items():
        if tensor is None:
            raise TypeError(f"`{name}` must be a torch.Tensor of floating dtype, got NoneType.")
    check_floating(allow_complex=False, **floating)
    sizes = check_shapes(**{name: (floating[name], dims) for name, dims in _SHAPES.items()})
    check_devices(**floating)
    check_groups(sizes["h"], sizes["g"])
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")


def _short(x: Tensor, *maps: Tensor) -> bool:
    """Whether the kernel for short rows takes these."""
    if x.dtype.itemsize != 2 or not 0 < x.shape[1] <= _LONGEST or x.numel() == 0:
        return False
    return 0 < maps[0].shape[3] <= _WIDEST >= x.shape[3] and all(one.dtype == x.dtype for one in maps)
