"""`grid_scan`: state-space recurrences with one state over a grid."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..checks import call_kind, check_devices, check_floating, check_shapes, known, remember
from ..dispatch import Backend, cast_for_autocast, choose
from .grid_paths import grid_scan_chunked, grid_scan_reference
from .op import check_choice, check_grid

Rule = Literal["mean", "separable"]
_LARGEST_STATE = 256


def grid_scan(
    x: Tensor,
    dt1: Tensor,
    A1: Tensor,
    B1: Tensor,
    C: Tensor,
    dt2: Tensor | None = None,
    A2: Tensor | None = None,
    B2: Tensor | None = None,
    D: Tensor | None = None,
    *,
    rule: Rule = "mean",
    flip: tuple[Literal["i", "j"], ...] = (),
    backend: Backend = "auto",
) -> Tensor:
    """Selective scan of a grid from one of its corners; every channel has n states.

        "mean"       h[i,j] = ( exp(dt1 A1) h[i,j-1] + dt1 B1 x + exp(dt2 A2) h[i-1,j] + dt2 B2 x ) / 2
        "separable"  g[i,j] = exp(dt1 A1) g[i,j-1] + dt1 B1 x,      h[i,j] = exp(dt1 A1) h[i-1,j] + g[i,j]
        y = sum_n C h + D x

    With "mean" a cell of the first row takes the whole of its first half (steps along j), and any other cell of the
    first column the whole of its second one.

    Args:
        x: Input, (b, i, j, d).
        dt1: Steps along j (with "separable" along both axes), not negative, (b, i, j, d).
        A1: Rates along j, negative, (d, n).
        B1: Input map, (b, i, j, n).
        C: Output map, (b, i, j, n).
        dt2: Steps along i, (b, i, j, d); with "mean" only.
        A2: Rates along i, (d, n); with "mean" only.
        B2: Input map along i, (b, i, j, n); with "mean" only.
        D: Skip, (d,).
        rule: "mean" or "separable".
        flip: Axes that are walked backwards: () starts at the top left, ("j",) at the top right, ("i",) at the bottom
            left, ("i", "j") at the bottom right.
        backend: "auto", "reference", "chunked" or "triton"; see `omnissm.kernels.use_backend`.

    Returns:
        y, (b, i, j, d) in the dtype of `x`.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes or devices disagree, a tensor is missing or too many for the rule, i j = 0, or an option
            is unknown.
        BackendError: if `backend` is named explicitly and cannot run here; Triton takes n <= 256.

    16-bit inputs are computed in float32. Under autocast x, B and C are cast. Differentiable in all tensors; the
    reference and chunked paths twice and more.
    Source: Baty, Hernandez Diaz et al. (2024), Mamba2D ("mean"); Zhang et al. (2025), 2DMamba ("separable").
    """
    axes = flip if type(flip) is tuple else (flip,)
    kind = call_kind("grid_scan", x, dt1, A1, B1, C, dt2, A2, B2, D, rule, *axes)
    if not known(kind):
        _check(x, dt1, A1, B1, C, dt2, A2, B2, D, rule, flip)
        remember(kind)
    x, B1, C = cast_for_autocast(x, B1, C)
    if B2 is not None:
        (B2,) = cast_for_autocast(B2)
    dtype, n = torch.promote_types(torch.promote_types(x.dtype, A1.dtype), torch.float32), A1.shape[1]
    obstacle = None if n <= _LARGEST_STATE else f"Triton takes n up to {_LARGEST_STATE}, got n={n}"
    name = choose(backend, x, op="grid_scan", obstacle=obstacle)
    if x.numel() == 0 or n == 0:
        return torch.zeros_like(x) if D is None else (x * D).to(x.dtype)
    if name == "triton":
        from .triton_impl import grid_scan_triton

        rates = A1 if A1.dtype == dtype else A1.to(dtype)
        return grid_scan_triton(x, dt1, rates, B1, C, dt2, A2, B2, D, rule, tuple(flip))
    wide = [None if t is None else t.to(dtype) for t in (x, dt1, A1, B1, C, dt2, A2, B2)]
    dims = [1 + "ij".index(axis) for axis in flip]
    wide = [t.flip(dims) if t is not None and t.dim() == 4 and dims else t for t in wide]
    scan: Any = grid_scan_reference if name == "reference" else grid_scan_chunked
    y = scan(*wide, rule == "mean")
    y = y.flip(dims) if dims else y
    return (y if D is None else torch.addcmul(y, D.to(dtype), x.to(dtype))).to(x.dtype)


def check_flip(flip: tuple[str, ...]) -> None:
    """Refuse unknown or repeated axes."""
    if isinstance(flip, str) or not set(flip) <= {"i", "j"} or len(set(flip)) != len(flip):
        raise ValueError(f"`flip` must be (), ('i',), ('j',) or ('i', 'j'), got {flip!r}.")


def _check(
    x: Tensor,
    dt1: Tensor,
    A1: Tensor,
    B1: Tensor,
    C: Tensor,
    dt2: Tensor | None,
    A2: Tensor | None,
    B2: Tensor | None,
    D: Tensor | None,
    rule: str,
    flip: tuple[str, ...],
) -> None:
    tensors: dict[str, Any] = {
        "x": x, "dt1": dt1, "A1": A1, "B1": B1, "C": C, "dt2": dt2, "A2": A2, "B2": B2, "D": D,
    }  # fmt: skip
    check_floating(**tensors)
    sizes = check_shapes(
        x=(x, "b i j d"),
        dt1=(dt1, "b i j d"),
        A1=(A1, "d n"),
        B1=(B1, "b i j n"),
        C=(C, "b i j n"),
        dt2=(dt2, "b i j d"),
        A2=(A2, "d n"),
        B2=(B2, "b i j n"),
        D=(D, "d"),
    )
    check_devices(**tensors)
    check_choice("rule", rule, get_args(Rule))
    check_flip(flip)
    for name in ("dt2", "A2", "B2"):
        if (tensors[name] is None) == (rule == "mean"):
            wanted = "needs" if rule == "mean" else "takes no"
            raise ValueError(f"rule={rule!r} {wanted} `{name}`; dt2, A2 and B2 are given with 'mean' and only there.")
    check_grid("grid_scan", sizes, "row", "column")
