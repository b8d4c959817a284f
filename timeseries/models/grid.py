"""Trunk of the models that look at a whole window at once: tokens of neighbouring patches, mixed over variates and,
since nothing has to be forecast, over time in both directions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ssmcore import Chimera2D, Stack

__all__ = ["GridEncoder", "patch"]


class GridEncoder(nn.Module):
    """Windows to tokens (b, i, j, d), j = ceil(l / patch_len), after blocks of `Chimera2D` along both ways of time.

    Args:
        n_variates: Number of variates.
        d_model: Width of a token.
        d_state: State size per channel and kind.
        n_layer: Number of blocks.
        patch_len: Steps in a patch; patches do not overlap, the last one is filled up with missing steps.
        dropout: Dropout after each mixer.
        two_way: Scan time in both directions, each with its own parameters.
        mixer: Further options of `Chimera2D`.

    Raises:
        ValueError: if a size is below 1.
    """

    def __init__(
        self,
        n_variates: int,
        *,
        d_model: int = 32,
        d_state: int = 4,
        n_layer: int = 1,
        patch_len: int = 1,
        dropout: float = 0.1,
        two_way: bool = True,
        mixer: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, size in {"n_variates": n_variates, "n_layer": n_layer, "patch_len": patch_len}.items():
            if size < 1:
                raise ValueError(f"expected {name} of at least 1, got {size}")
        self.n_variates, self.patch_len = n_variates, patch_len
        self.embed = nn.Linear(2 * patch_len, d_model)  # values, and which are observed
        self.variate = nn.Parameter(0.5 * torch.randn(n_variates, 1, d_model))
        options = {"d_state": d_state, "dropout": dropout} | (mixer or {})
        kind = _BothWays if two_way else Chimera2D
        self.stack = Stack(d_model, [kind(d_model, **options) for _ in range(n_layer)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Encode windows.

        Args:
            x: (b, i, l), finite.
            mask: (b, i, l), True where observed; patches without an observation enter no state.
        """
        if x.shape[1] != self.n_variates:
            raise ValueError(f"the model was built for {self.n_variates} variates, the data has {x.shape[1]}")
        mask = patch(mask, self.patch_len)
        values = torch.where(mask, patch(x, self.patch_len), 0.0)
        hidden = self.embed(torch.cat([values, mask.to(x.dtype)], dim=-1)) + self.variate
        return self.stack(hidden, mask=mask.any(dim=-1))


class _BothWays(nn.Module):
    """Sum of a grid mixer along time and another one against it."""

    def __init__(self, d_model: int, **options: Any) -> None:
        super().__init__()
        self.ahead, self.back = Chimera2D(d_model, **options), Chimera2D(d_model, **options)

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        return self.ahead(x, mask=mask) + self.back(x.flip(2), mask=mask.flip(2)).flip(2)


def patch(x: Tensor, size: int) -> Tensor:
    """(b, i, l) -> (b, i, ceil(l / size), size), zeros (False) behind the end."""
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
