"""Classifiers of whole series. A classifier maps a `SeriesBatch` to logits (b, num_classes)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...ssmcore import Stack
from .grid import GridEncoder, patch

if TYPE_CHECKING:
    from ..labelled import SeriesBatch

__all__ = ["ChimeraClassifier", "SequenceClassifier"]


class ChimeraClassifier(nn.Module):
    """Grid of patches, 2-D state-space blocks along both ways of time, mean over observed tokens, linear head.

    Args:
        n_variates: Number of variates.
        num_classes: Width of the logits.
        d_model: Width of a token.
        d_state: State size per channel and kind.
        n_layer: Number of blocks.
        patch_len: Steps in a patch.
        dropout: Dropout after each mixer and before the head.
        two_way: Scan time in both directions.
        mixer: Further options of `Chimera2D`.

    Raises:
        ValueError: if a size is below 1.

    Source: Behrouz, Santacatterina & Zabih (2024), section on classification.
    """

    def __init__(
        self,
        n_variates: int,
        num_classes: int,
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
        self.encoder = GridEncoder(
            n_variates,
            d_model=d_model,
            d_state=d_state,
            n_layer=n_layer,
            patch_len=patch_len,
            dropout=dropout,
            two_way=two_way,
            mixer=mixer,
        )
        self.norm, self.dropout = nn.LayerNorm(d_model), nn.Dropout(dropout)
        self.head = nn.Linear(d_model, num_classes)

    def forward(self, batch: SeriesBatch) -> Tensor:
        """Logits (b, num_classes)."""
        hidden = self.encoder(batch.x, batch.x_mask)  # (b, i, j, d)
        tokens = patch(batch.x_mask, self.encoder.patch_len).any(dim=-1)
        pooled = masked_mean(hidden, tokens, dim=2).mean(dim=1)
        return self.head(self.dropout(self.norm(pooled)))


class SequenceClassifier(nn.Module):
    """All variates of a patch are one token; sequence mixers, mean over the tokens of the series, linear head.

    Args:
        n_variates: Number of variates.
        num_classes: Width of the logits.
        d_model: Width of a token.
        n_layer: Number of blocks.
        patch_len: Steps in a patch.
        dropout: Dropout of the tokens and before the head.
        mixer: Name of a sequence mixer, see `omnissm.ssmcore.create_mixer`.
        mixer_options: Its options; those of a mixer's own default otherwise.

    Raises:
        ValueError: if the mixer is unknown.
    """

    def __init__(
        self,
        n_variates: int,
        num_classes: int,
        *,
        d_model: int = 64,
        n_layer: int = 2,
        patch_len: int = 1,
        dropout: float = 0.1,
        mixer: str = "bidirectional",
        mixer_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if mixer_options is None and mixer == "bidirectional":
            mixer_options = {"mixer": "mamba", "mixer_options": {"d_state": 8, "expand": 1}}
        self.n_variates, self.patch_len = n_variates, patch_len
        self.embed = nn.Linear(2 * n_variates * patch_len, d_model)
        self.stack = Stack(d_model, [mixer] * n_layer, mixer_options=mixer_options)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(d_model, num_classes)

    def forward(self, batch: SeriesBatch) -> Tensor:
        """Logits (b, num_classes)."""
        if batch.x.shape[1] != self.n_variates:
            raise ValueError(f"the model was built for {self.n_variates} variates, the data has {batch.x.shape[1]}")
        x = torch.cat([torch.where(batch.x_mask, batch.x, 0.0), batch.x_mask.to(batch.x.dtype)], dim=1)
        tokens = patch(batch.steps[:, None], self.patch_len)[:, 0].any(dim=-1)  # (b, j)
        hidden = self.embed(patch(x, self.patch_len).transpose(1, 2).flatten(2))
        hidden = self.stack(self.dropout(hidden), mask=tokens)
        return self.head(self.dropout(masked_mean(hidden, tokens, dim=1)))


def masked_mean(x: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Mean over `dim` of the entries of x (..., d) whose mask (...) is True; 0 where there is none."""
    total = torch.where(mask[..., None], x, 0.0).sum(dim)
    return total / mask.sum(dim).clamp(min=1)[..., None]
