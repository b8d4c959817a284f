"""Transformers to compare with: attention over variates, and attention over the patches of each variate.

Liu et al. (2023), "iTransformer: Inverted Transformers Are Effective for Time Series Forecasting"; Nie et al. (2022),
"A Time Series is Worth 64 Words" (PatchTST; here with layer norms for its batch norms). Layers are PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .layers import check_quantiles, instance_statistics, noncrossing

if TYPE_CHECKING:
    from ..windows import WindowBatch

__all__ = ["ITransformer", "PatchTST"]


class _Attentive(nn.Module):
    """Instance normalisation, tokens (rows, tokens, d_model), encoder, and a linear head."""

    def __init__(
        self,
        horizon: int,
        head_inputs: int,
        d_model: int,
        d_ff: int | None,
        n_heads: int,
        n_layer: int,
        dropout: float,
        quantiles: Sequence[float] | None,
        instance_norm: bool,
    ) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"expected d_model to be a multiple of n_heads, got {d_model} and {n_heads}")
        self.horizon, self.instance_norm = horizon, instance_norm
        self.n_quantiles = len(check_quantiles(quantiles))
        layer = nn.TransformerEncoderLayer(
            d_model, n_heads, d_ff or d_model, dropout, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, n_layer, nn.LayerNorm(d_model), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(head_inputs, horizon * max(1, self.n_quantiles))

    def forward(self, batch: WindowBatch) -> Tensor:
        """Forecast in the units of `batch.x`: (b, i, horizon), or (b, i, horizon, q) with quantiles."""
        x = batch.x
        statistics = instance_statistics(x, batch.x_mask) if self.instance_norm else None
        if statistics is not None:
            x = statistics.normalize(x, batch.x_mask)
        y = self.head(self.features(x)).unflatten(-1, (self.horizon, -1))
        y = noncrossing(y) if self.n_quantiles else y[..., 0]
        return y if statistics is None else statistics.denormalize(y)

    def features(self, x: Tensor) -> Tensor:
        """(b, i, lookback) -> (b, i, inputs of the head)."""
        raise NotImplementedError


class ITransformer(_Attentive):
    """Every variate's whole lookback is one token; attention mixes the variates.

    Args:
        lookback: Steps seen.
        horizon: Steps forecast.
        n_variates: Not used by the weights: any number of variates goes through.
        d_model: Width of a token.
        d_ff: Inner width of the feed-forward part; d_model when None.
        n_heads: Heads of the attention.
        n_layer: Number of layers.
        dropout: After embedding, attention and feed-forward part.
        quantiles: Ascending levels in (0, 1); None forecasts a point.
        instance_norm: Normalise each window and variate, and undo it on the forecast.
    """

    def __init__(
        self,
        lookback: int,
        horizon: int,
        n_variates: int,
        *,
        d_model: int = 256,
        d_ff: int | None = None,
        n_heads: int = 8,
        n_layer: int = 2,
        dropout: float = 0.1,
        quantiles: Sequence[float] | None = None,
        instance_norm: bool = True,
    ) -> None:
        super().__init__(horizon, d_model, d_model, d_ff, n_heads, n_layer, dropout, quantiles, instance_norm)
        self.embed = nn.Linear(lookback, d_model)

    def features(self, x: Tensor) -> Tensor:
        """(b, i, lookback) -> (b, i, d_model)."""
        return self.encoder(self.dropout(self.embed(x)))


class PatchTST(_Attentive):
    """Attention over the patches of each variate by itself.

    Args:
        lookback: Steps seen.
        horizon: Steps forecast.
        n_variates: Not used by the weights: any number of variates goes through.
        d_model: Width of a token.
        d_ff: Inner width of the feed-forward part; twice d_model when None.
        n_heads: Heads of the attention.
        n_layer: Number of layers.
        patch_len: Steps in a patch.
        stride: Steps between the starts of neighbouring patches; the last value is repeated so often at the end.
        dropout: After embedding, attention and feed-forward part.
        quantiles: Ascending levels in (0, 1); None forecasts a point.
        instance_norm: Normalise each window and variate, and undo it on the forecast.

    Raises:
        ValueError: if the lookback is shorter than a patch.
    """

    def __init__(
        self,
        lookback: int,
        horizon: int,
        n_variates: int,
        *,
        d_model: int = 128,
        d_ff: int | None = None,
        n_heads: int = 4,
        n_layer: int = 2,
        patch_len: int = 16,
        stride: int = 8,
        dropout: float = 0.2,
        quantiles: Sequence[float] | None = None,
        instance_norm: bool = True,
    ) -> None:
        if lookback < patch_len:
            raise ValueError(
                f"a patch of patch_len={patch_len} steps is longer than the lookback of {lookback}; lower patch_len"
            )
        tokens = (lookback - patch_len) // stride + 2
        d_ff = d_ff or 2 * d_model
        super().__init__(horizon, tokens * d_model, d_model, d_ff, n_heads, n_layer, dropout, quantiles, instance_norm)
        self.patch_len, self.stride = patch_len, stride
        self.embed = nn.Linear(patch_len, d_model)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, d_model))

    def features(self, x: Tensor) -> Tensor:
        """(b, i, lookback) -> (b, i, tokens * d_model)."""
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], self.stride)], dim=-1)
        hidden = self.dropout(self.embed(x.unfold(-1, self.patch_len, self.stride)) + self.position)
        return self.encoder(hidden.flatten(0, 1)).flatten(1).unflatten(0, x.shape[:2])
