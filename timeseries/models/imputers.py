"""Imputers: from a window with gaps to values at all its steps, (b, i, lookback).

Both add a learned correction, zero at first, to straight lines between observed neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...ssmcore import Stack
from .grid import GridEncoder, patch
from .layers import interpolate

if TYPE_CHECKING:
    from ..windows import WindowBatch

__all__ = ["ChimeraImputer", "SequenceImputer"]


class ChimeraImputer(nn.Module):
    """Grid of patches, 2-D state-space blocks along both ways of time, and a linear map from token to patch.

    Args:
        n_variates: Number of variates.
        lookback: Steps of a window.
        d_model: Width of a token.
        d_state: State size per channel and kind.
        n_layer: Number of blocks.
        patch_len: Steps in a patch; gaps shorter than a patch are filled from within it.
        dropout: Dropout after each mixer.
        mixer: Further options of `Chimera2D`.

    Raises:
        ValueError: if a size is below 1.
    """

    def __init__(
        self,
        n_variates: int,
        lookback: int = 96,
        *,
        d_model: int = 32,
        d_state: int = 4,
        n_layer: int = 1,
        patch_len: int = 4,
        dropout: float = 0.0,
        mixer: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.lookback = lookback
        self.encoder = GridEncoder(
            n_variates,
            d_model=d_model,
            d_state=d_state,
            n_layer=n_layer,
            patch_len=patch_len,
            dropout=dropout,
            mixer=mixer,
        )
        self.head = _zero(nn.Linear(d_model, patch_len))

    def forward(self, batch: WindowBatch) -> Tensor:
        """Values at observed and missing steps alike, (b, i, lookback), in the units of `batch.x`."""
        lines = interpolate(batch.x, batch.x_mask)
        return lines + self.head(self.encoder(batch.x, batch.x_mask)).flatten(2)[..., : lines.shape[-1]]


class SequenceImputer(nn.Module):
    """All variates of a patch are one token, straight lines in its gaps; sequence mixers along both ways of time.

    Args:
        n_variates: Number of variates.
        lookback: Steps of a window.
        d_model: Width of a token.
        n_layer: Number of blocks.
        patch_len: Steps in a patch.
        mixer: Name of a sequence mixer, see `omnissm.ssmcore.create_mixer`.
        mixer_options: Its options; by default a small Mamba for either way.

    Raises:
        ValueError: if the mixer is unknown.
    """

    def __init__(
        self,
        n_variates: int,
        lookback: int = 96,
        *,
        d_model: int = 64,
        n_layer: int = 2,
        patch_len: int = 1,
        mixer: str = "bidirectional",
        mixer_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if mixer_options is None and mixer == "bidirectional":
            mixer_options = {"mixer": "mamba", "mixer_options": {"d_state": 8, "expand": 1}}
        self.n_variates, self.lookback, self.patch_len = n_variates, lookback, patch_len
        self.embed = nn.Linear(2 * n_variates * patch_len, d_model)
        self.stack = Stack(d_model, [mixer] * n_layer, mixer_options=mixer_options)
        self.head = _zero(nn.Linear(d_model, n_variates * patch_len))

    def forward(self, batch: WindowBatch) -> Tensor:
        """Values at observed and missing steps alike, (b, i, lookback), in the units of `batch.x`."""
        if batch.x.shape[1] != self.n_variates:
            raise ValueError(f"the model was built for {self.n_variates} variates, the data has {batch.x.shape[1]}")
        lines = interpolate(batch.x, batch.x_mask)
        x = patch(torch.cat([lines, batch.x_mask.to(lines.dtype)], dim=1), self.patch_len)
        hidden = self.stack(self.embed(x.transpose(1, 2).flatten(2)))
        y = self.head(hidden).unflatten(-1, (self.n_variates, self.patch_len)).transpose(1, 2).flatten(2)
        return lines + y[..., : lines.shape[-1]]


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
