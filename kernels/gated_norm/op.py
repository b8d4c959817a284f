"""`gated_norm`: RMS norm with a SiLU gate, at the exit of Mamba-2 and its relatives."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import call_kind, check_devices, check_floating, check_shapes, known, remember
from ..dispatch import Backend, cast_for_autocast, choose
from .chunked import gated_norm_chunked
from .reference import gated_norm_reference

# A group is one row of a tile in registers.
_WIDEST_GROUP = 16384


def gated_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """RMS norm over groups of channels, times a SiLU gate.

        y = rms(x * silu(z)) * weight              norm_before_gate: y = rms(x) * weight * silu(z)
        rms(u) = u / sqrt(mean(u^2) + eps)         the mean runs over a group of channels

    Args:
        x: (..., d).
        z: Gate before the SiLU, shape of `x`.
        weight: (d,).
        eps: Added to the mean square, > 0.
        group_size: Channels that share one mean, a divisor of d; d if None.
        norm_before_gate: False is Mamba-2, True is Hydra and Mamba-3. The two differ, and checkpoints depend on it.
        backend: "auto", "reference", "chunked" or "triton"; see `omnissm.kernels.use_backend`. In compiled code "auto"
            is the chunked path, which torch.compile turns into an equally fast kernel.

    Returns:
        y, shape and dtype of `x`.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes or devices disagree, group_size does not divide d, or eps is not positive.
        BackendError: if `backend` is named explicitly and cannot run here; Triton takes groups of up to 16384.

    Statistics are float32 (float64 for float64 parameters or inputs). Under autocast `x` and `z` are cast, `weight` is
    not. Differentiable in all tensors; the reference and chunked paths also twice.
    Source: Dao & Gu (2024), section 6; Zhang & Sennrich (2019).
    """
    kind = call_kind("gated_norm", x, z, weight, eps, group_size)
    if not known(kind):
        _check(x, z, weight, eps, group_size)
        remember(kind)
    channels = x.shape[-1]
    group_size = channels if group_size is None else group_size

    x, z = cast_for_autocast(x, z)
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    if x.numel() == 0:
        return x * z
    obstacle = None if group_size <= _WIDEST_GROUP else f"a group has {group_size} channels, Triton takes 16384 at most"
    options = weight.to(dtype), eps, group_size, norm_before_gate
    chosen = choose(backend, x, op="gated_norm", obstacle=obstacle, fusible=True)
    if chosen == "triton":
        from .triton_impl import gated_norm_triton

        return gated_norm_triton(x, z, *options)
    norm = gated_norm_reference if chosen == "reference" else gated_norm_chunked
    return norm(x.reshape(-1, channels), z.reshape(-1, channels), *options).view(x.shape)


def _check(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int | None) -> None:
    check_floating(x=x, z=z, weight=weight)
    check_shapes(x=(x, "... d"), weight=(weight, "d"))
    if z.shape != x.shape:
        raise ValueError(f"`z` must have the shape of `x`, {tuple(x.shape)}; got {tuple(z.shape)}.")
    check_devices(x=x, z=z, weight=weight)
    channels = x.shape[-1]
    if channels and group_size is not None and (group_size < 1 or channels % group_size):
        raise ValueError(f"group_size must divide d={channels}, got {group_size}.")
    if eps <= 0:
        raise ValueError(f"eps must be positive, got {eps}.")
