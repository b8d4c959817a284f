"""What the contracts of all families share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_declarations(mixer: nn.Module) -> None:
    """Names declared free of weight decay, or with their own rate, are parameters of the mixer."""
    own = dict(mixer.named_parameters())
    for declaration in ("no_decay_names", "lr_names"):
        for name in getattr(mixer, declaration, tuple)():
            require(name in own, f"{declaration}() names `{name}`, which is no parameter")


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    """The same normal numbers for the same seed, on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def require(fulfilled: bool, otherwise: str) -> None:
    """Raise AssertionError with what is otherwise the case."""
    if not fulfilled:
        raise AssertionError(f"The mixer breaks its contract: {otherwise}.")
