"""`scan2d` and `selective_scan2d`: the coupled two-state recurrence over a grid of variates and time steps."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..checks import call_kind, check_devices, check_floating, check_shapes, known, remember
from ..dispatch import Backend, choose
from .chunked import scan2d_chunked
from .reference import per_batch, scan2d_reference, selective_scan2d_reference
from .selective import Terms, selective_scan2d_chunked

Coupling = Literal["full", "none", "time_to_variate", "variate_to_time"]
InputDiscretization = Literal["euler", "zoh"]
_LARGEST_STATE = 256
_SHAPES = (
    dict.fromkeys(("x", "dt1", "dt2"), "b i j d")
    | dict.fromkeys(("A1_log", "A4_log", "theta2", "theta3"), "g d n")
    | dict.fromkeys(("B1", "B2", "C1", "C2"), "b i j n")
    | {"D": "g d", "time_gap": "gap_rows j"}
)


def scan2d(
    a1: Tensor, a2: Tensor, a3: Tensor, a4: Tensor, b1: Tensor, b2: Tensor, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Two coupled states over a grid, from coefficients written out in full.

        h1[i,j] = a1[i,j] h1[i,j-1] + a2[i,j] h2[i,j-1] + b1[i,j]
        h2[i,j] = a3[i,j] h1[i-1,j] + a4[i,j] h2[i-1,j] + b2[i,j]          states outside the grid are zero

    Args:
        a1: Transition of h1 along j, (b, i, j, d, n); d and n may be 1 and broadcast, here and in a2, a3, a4. Any
            value; bounded for |a1| + |a2| <= 1 and |a3| + |a4| <= 1.
        a2: Transition from h2 to h1 along j.
        a3: Transition from h1 to h2 along i.
        a4: Transition of h2 along i.
        b1: Input of h1, (b, i, j, d, n).
        b2: Input of h2, (b, i, j, d, n).
        backend: "auto", "reference" or "chunked"; see `omnissm.kernels.use_backend`.

    Returns:
        h1 and h2, each (b, i, j, d, n), in float32 for 16-bit inputs.

    Raises:
        TypeError: if a tensor has no floating dtype.
        ValueError: if shapes or devices disagree, or i j = 0.
        BackendError: if `backend` is named explicitly and cannot run here.

    Differentiable in all tensors; for a second derivative use backend="reference".
    Source: Behrouz, Santacatterina & Zabih (2024), Chimera, the discrete 2-D recurrence.
    """
    tensors: dict[str, Any] = {"a1": a1, "a2": a2, "a3": a3, "a4": a4, "b1": b1, "b2": b2}
    check_floating(**tensors)
    full, broadcast = "b i j d n", "b i j d? n?"
    sizes = check_shapes(
        b1=(b1, full), b2=(b2, full), a1=(a1, broadcast), a2=(a2, broadcast), a3=(a3, broadcast), a4=(a4, broadcast)
    )
    check_devices(**tensors)
    check_grid("scan2d", sizes, "variate", "time step")
    backend_chosen = choose(backend, b1, op="scan2d", implementations=("reference", "chunked"))
    dtype = _state_dtype(*tensors.values())
    wide = [tensor.to(dtype).expand(b1.shape) for tensor in tensors.values()]
    if backend_chosen == "reference":
        return scan2d_reference(*wide)
    return scan2d_chunked(*wide)


def selective_scan2d(
    x: Tensor,
    dt1: Tensor,
    dt2: Tensor,
    A1_log: Tensor,
    A4_log: Tensor,
    theta2: Tensor,
    theta3: Tensor,
    B1: Tensor,
    B2: Tensor,
    C1: Tensor,
    C2: Tensor,
    D: Tensor,
    *,
    kappa: float = 0.9,
    coupling: Coupling = "full",
    input_discretization: InputDiscretization = "euler",
    time_gap: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Selective two-dimensional state-space model; its coefficients are never written out.

        a1 = exp(-dt1 gap alpha1)      a2 = kappa tanh(theta2) (1 - a1)      b1 = dt1 B1 x      alpha1 = exp(A1_log)
        a4 = exp(-dt2 alpha4)          a3 = kappa tanh(theta3) (1 - a4)      b2 = dt2 B2 x      alpha4 = exp(A4_log)
        h1, h2 = scan2d(a1, a2, a3, a4, b1, b2)
        y = sum_n (C1 h1 + C2 h2) + D x

    so |a1| + |a2| < 1 and |a3| + |a4| < 1 in every cell for kappa < 1: the states stay bounded on any grid.

    Independent instances (heads, directions) are stacked in the batch: b = g * batch, index = group * batch + k.

    Args:
        x: Input, (b, i, j, d); i variates, j time steps.
        dt1: Step along time, (b, i, j, d), not negative.
        dt2: Step along variates, (b, i, j, d), not negative.
        A1_log: Logarithm of the decay rate of h1, (g, d, n).
        A4_log: Logarithm of the decay rate of h2, (g, d, n).
        theta2: Coupling from h2 to h1, (g, d, n), any value.
        theta3: Coupling from h1 to h2, (g, d, n), any value.
        B1: Input map of h1, (b, i, j, n), shared by the channels.
        B2: Input map of h2, (b, i, j, n).
        C1: Output map of h1, (b, i, j, n).
        C2: Output map of h2, (b, i, j, n).
        D: Skip, (g, d).
        kappa: Largest coupling relative to the decay, in [0, 1].
        coupling: "full"; "none" (a2 = a3 = 0); "time_to_variate" (a2 = 0, only h1 feeds h2); "variate_to_time" (a3 = 0,
            only h2 feeds h1).
        input_discretization: "euler", as above, or "zoh": (1 - exp(-dt alpha)) / alpha in place of dt in b1 and b2.
        time_gap: Time since the step before in units of the base step, positive, (b, j), or (batch, j) shared by the
            groups. Stretches the decay along time, not the input. None: 1 everywhere.
        backend: "auto", "reference", "chunked" or "triton"; see `omnissm.kernels.use_backend`.

    Returns:
        y, (b, i, j, d), in the dtype of `x`.

    Raises:
        TypeError: if a tensor has no floating dtype.
        ValueError: if shapes or devices disagree, i j = 0, g does not divide b, or an option is unknown.
        BackendError: if `backend` is named explicitly and cannot run here; Triton takes n <= 256.

    16-bit inputs are computed in float32; autocast changes nothing. Differentiable in all tensors; for a second
    derivative use backend="reference".
    Source: Behrouz, Santacatterina & Zabih (2024), Chimera, the selective 2-D model.
    """
    tensors: dict[str, Any] = {
        "x": x, "dt1": dt1, "dt2": dt2, "A1_log": A1_log, "A4_log": A4_log, "theta2": theta2, "theta3": theta3,
        "B1": B1, "B2": B2, "C1": C1, "C2": C2, "D": D, "time_gap": time_gap,
    }  # fmt: skip
    options = coupling, input_discretization, kappa
    kind = call_kind("selective_scan2d", *tensors.values(), *options)
    if not known(kind):
        _check_selective(tensors, *options)
        remember(kind)
    n = B1.shape[3]
    obstacle = None if 0 < n <= _LARGEST_STATE else f"Triton takes n from 1 to {_LARGEST_STATE}, got n={n}"
    backend_chosen = choose(backend, x, op="selective_scan2d", obstacle=obstacle)
    dtype, held = _state_dtype(*tensors.values()), input_discretization == "zoh"
    if backend_chosen == "reference":
        given: dict[str, Any] = {name: None if t is None else t.to(dtype) for name, t in tensors.items()}
        return selective_scan2d_reference(
            **given, kappa=kappa, coupling=coupling, input_discretization=input_discretization
        ).to(x.dtype)
    fused = backend_chosen == "triton" and x.numel() > 0  # kernels widen what they read
    data = {name: tensors[name] for name in ("x", "dt1", "dt2", "B1", "B2", "C1", "C2")}
    if not fused:
        data = {name: tensor.to(dtype) for name, tensor in data.items()}
    # Elementwise functions of small tensors are left to autograd, around the scan itself.
    A1_log, A4_log, theta2, theta3, D = (parameter.to(dtype) for parameter in (A1_log, A4_log, theta2, theta3, D))
    alpha1, alpha4 = A1_log.exp(), A4_log.exp()
    c2 = kappa * theta2.tanh() if coupling in ("full", "variate_to_time") else None
    c3 = kappa * theta3.tanh() if coupling in ("full", "time_to_variate") else None
    r1 = None
    if time_gap is not None:
        r1 = data["dt1"].to(dtype) * per_batch(time_gap.to(dtype), x.shape[0], repeat=True)[:, None, :, None]
    if fused:
        from .triton_impl import COUPLED, scan

        return scan(x, dt1, dt2, r1, B1, B2, C1, C2, -alpha1, -alpha4, c2, c3, D, COUPLED, held, ())
    y = selective_scan2d_chunked(Terms(**data, r1=r1, alpha1=alpha1, alpha4=alpha4, c2=c2, c3=c3), held=held)
    return torch.addcmul(y, per_batch(D, x.shape[0])[:, None, None], data["x"]).to(x.dtype)


def _check_selective(tensors: dict[str, Any], coupling: str, input_discretization: str, kappa: float) -> None:
    check_floating(**tensors)
    sizes = check_shapes(**{name: (tensor, _SHAPES[name]) for name, tensor in tensors.items()})
    check_devices(**tensors)
    check_grid("selective_scan2d", sizes, "variate", "time step")
    _check_groups(sizes)
    check_choice("coupling", coupling, get_args(Coupling))
    check_choice("input_discretization", input_discretization, get_args(InputDiscretization))
    if not 0 <= kappa <= 1:
        raise ValueError(f"`kappa` must lie in [0, 1] for bounded states, got {kappa}.")


def _state_dtype(*tensors: Tensor | None) -> torch.dtype:
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def check_grid(op: str, sizes: dict[str, int], row: str, column: str) -> None:
    """Refuse a grid without cells; `row` and `column` are what the caller's axes i and j count.

    Raises:
        ValueError: if i or j is 0.
    """
    if sizes["i"] * sizes["j"] == 0:
        raise ValueError(f"{op} needs at least one {row} and one {column}, got i={sizes['i']}, j={sizes['j']}.")


def _check_groups(sizes: dict[str, int]) -> None:
    batch, groups = sizes["b"], sizes["g"]
    if groups == 0 or batch % groups:
        raise ValueError(
            f"`x` has b={batch}, which must be a multiple of the g={groups} parameter groups (from `A1_log`)."
        )
    rows = sizes.get("gap_rows", batch)
    if rows not in (batch, batch // groups):
        raise ValueError(f"`time_gap` has {rows} rows, expected b={batch} or batch={batch // groups} (b over groups).")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse an option that is none of `choices`.

    Raises:
        ValueError: naming them.
    """
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
