"""Initial values of recurrence parameters, and marks that optimisers and re-initialisation respect."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def dt_bias_init(
    size: int | Sequence[int],
    dt_min: float = 1e-3,
    dt_max: float = 0.1,
    *,
    dt_floor: float = 1e-4,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Bias b with softplus(b) log-uniform in [dt_min, dt_max].

    Args:
        size: Shape of the bias.
        dt_min: Shortest step.
        dt_max: Longest step.
        dt_floor: Steps below this are raised to it.
        device: Where to create it.
        dtype: Floating dtype of the result.

    Raises:
        ValueError: if not 0 < dt_min <= dt_max.

    Source: Gu & Dao (2023), section 3.6.
    """
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"Steps need 0 < dt_min <= dt_max, got dt_min={dt_min}, dt_max={dt_max}.")
    low, high = math.log(dt_min), math.log(dt_max)
    shape = (size,) if isinstance(size, int) else tuple(size)
    dt = torch.empty(shape, device=device, dtype=dtype).uniform_(low, high).exp().clamp(min=dt_floor)
    return inverse_softplus(dt)


def inverse_softplus(dt: Tensor) -> Tensor:
    """b with softplus(b) = dt > 0, exact for steps far below 1."""
    return dt + torch.log(-torch.expm1(-dt))


def a_log_init(*shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Logarithm of decay rates 1, 2, ..., n along the last dimension, the same for all others (S4D-real)."""
    rates = torch.arange(1, shape[-1] + 1, device=device, dtype=dtype or torch.get_default_dtype())
    return rates.log().expand(shape).clone()


def no_weight_decay(*parameters: nn.Parameter) -> None:
    """Mark parameters that optimisers must not decay and generic re-initialisation must not overwrite.

    Marks are attributes of the parameter object and get lost with it (deep copies, sharding); modules therefore also
    declare the names by a method `no_decay_names()`.
    """
    for parameter in parameters:
        parameter._no_weight_decay = True  # type: ignore[attr-defined]
        parameter._no_reinit = True  # type: ignore[attr-defined]


def residual_init_(module: nn.Module, n_residual: int, names: Sequence[str] = ("out_proj", "fc2")) -> None:
    """Draw the matrices that write to the residual stream anew, smaller by sqrt(n_residual); in place.

    The stream is a sum of n_residual branches; this keeps its variance independent of depth. Calling it twice draws
    twice and scales once.

    Args:
        module: Module whose linear submodules with these names are set.
        n_residual: Number of branches that add to the stream.
        names: Last parts of the submodules' names.

    Raises:
        ValueError: if `n_residual` is below 1.

    Source: Radford et al. (2019), section 2.3, as in GPT-2 and Mamba.
    """
    if n_residual < 1:
        raise ValueError(f"expected n_residual of at least 1, got {n_residual}.")
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear) and name.rpartition(".")[2] in names:
            nn.init.kaiming_uniform_(part.weight, a=math.sqrt(5))
            with torch.no_grad():
                part.weight /= math.sqrt(n_residual)
