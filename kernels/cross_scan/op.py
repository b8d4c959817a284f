"""`cross_scan`: selective scans of a grid by rows, by columns, and both backwards, summed at the cells."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import call_kind, check_devices, check_floating, check_shapes, known, remember
from ..dispatch import Backend, cast_for_autocast, choose
from .chunked import cross_scan_chunked
from .reference import cross_scan_reference

_LARGEST_STATE = 256


def cross_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """Selective scans of a grid along four orders of its cells, added up at the cells.

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t,      y_t = sum_n C_tn h_tn + D x_t

    for each of the orders 0 by rows (j fastest), 1 by columns (i fastest), 2 the reverse of 0, 3 the reverse of 1. All
    tensors are given by cell, whatever the order.

    Args:
        x: Input, (b, i, j, d), the same for all orders.
        dt: Steps after softplus, not negative, (b, 4, i, j, d).
        A: Rates, negative, (4, d, n).
        B: Input maps, (b, 4, i, j, n).
        C: Output maps, (b, 4, i, j, n).
        D: Skips, (4, d).
        backend: "auto", "reference", "chunked" or "triton"; see `omnissm.kernels.use_backend`.

    Returns:
        y, (b, i, j, d), in float32 (float64 for float64 inputs), so that it can be normed before it is rounded.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes or devices disagree, or there are not four orders.
        BackendError: if `backend` is named explicitly and cannot run here; Triton takes n <= 256.

    16-bit inputs are computed in float32. Under autocast x, B and C are cast; dt, A and D are not. Differentiable in
    all tensors; the reference and chunked paths twice and more.
    Source: Liu et al. (2024), VMamba, section 4.
    """
    kind = call_kind("cross_scan", x, dt, A, B, C, D)
    if not known(kind):
        _check(x, dt, A, B, C, D)
        remember(kind)
    x, B, C = cast_for_autocast(x, B, C)
    dtype = torch.promote_types(torch.promote_types(x.dtype, A.dtype), torch.float32)
    A, n = A if A.dtype == dtype else A.to(dtype), A.shape[2]
    obstacle = None if n <= _LARGEST_STATE else f"Triton takes n up to {_LARGEST_STATE}, got n={n}"
    name = choose(backend, x, op="cross_scan", obstacle=obstacle)
    if name == "reference":
        return cross_scan_reference(x.to(dtype), dt.to(dtype), A, B.to(dtype), C.to(dtype), D)
    if name == "triton" and x.numel() > 0 and n > 0:
        from .triton_impl import cross_scan_triton

        return cross_scan_triton(x, dt, A, B, C, None if D is None else D.to(dtype))
    return cross_scan_chunked(x, dt, A, B, C, D)


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> None:
    check_floating(x=x, dt=dt, A=A, B=B, C=C, D=D)
    sizes = check_shapes(
        x=(x, "b i j d"),
        dt=(dt, "b k i j d"),
        A=(A, "k d n"),
        B=(B, "b k i j n"),
        C=(C, "b k i j n"),
        D=(D, "k d"),
    )
    check_devices(x=x, dt=dt, A=A, B=B, C=C, D=D)
    if sizes["k"] != 4:
        raise ValueError(f"`dt` must have 4 orders in dim 1, got {sizes['k']}.")
