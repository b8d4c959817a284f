"""Chimera forecaster: patches of every variate become a grid of tokens that a 2-D state-space model mixes over time and
over variates at once.

Behrouz, Santacatterina & Zabih (2024), "Chimera: Effectively Modeling Multivariate Time Series with 2-Dimensional State
Space Models". The mixer is `omnissm.ssmcore.mixers.Chimera2D`.

| name | d_model | d_state | n_layer | parameters, 7 variates, 96 to 96 |
| --- | --- | --- | --- | --- |
| chimera_tiny | 32 | 4 | 1 | 48,032 |
| chimera_small | 64 | 8 | 2 | 152,608 |
| chimera_base | 128 | 16 | 3 | 602,720 |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ssmcore import Chimera2D, Stack
from .closed_loop import ClosedLoopGrid
from .layers import Output, instance_statistics

if TYPE_CHECKING:
    from ..windows import WindowBatch

__all__ = ["ChimeraForecaster", "chimera_base", "chimera_small", "chimera_tiny"]


class ChimeraForecaster(nn.Module):
    """Instance normalisation, patch embedding, pre-norm residual Chimera2D blocks, and a linear head.

    Args:
        lookback: Steps seen.
        horizon: Steps forecast.
        n_variates: Number of variates.
        d_model: Width of a token.
        d_state: State size per channel and kind.
        n_layer: Number of blocks.
        patch_len: Steps in a patch; 1 with `stride` 1 is the model without patches.
        stride: Steps between the starts of neighbouring patches.
        dropout: Dropout after each mixer.
        head_dropout: Dropout before the head.
        instance_norm: Normalise each window and variate by its own observed mean and standard deviation and undo it on
            the forecast; missing inputs then become 0. False relies on the scaler of the data alone, which is better
            where the level itself tells the future.
        variate_embedding: Add a learned vector per variate. Without it the weights see no difference between variates.
            None adds it unless the coupling is "pooled", which is there to treat all variates alike.
        linear_skip: Number of newest steps from which one linear map over all variates is added to the forecast; it
            starts at zero. 0 turns it off.
        mask_input: Give the patch embedding the mask of observed steps besides the values.
        quantiles: Ascending levels in (0, 1); None forecasts a point.
        distribution: "normal", "student_t" or "negative_binomial" (for counts), whose parameters are forecast instead.
        n_past: Past-only covariates; they join the grid as further rows without a forecast.
        n_future: Covariates known in advance; their patches are added to the tokens, their values in the horizon act
            linearly on each variate.
        n_static: Static features of each variate, added to its tokens.
        head: "direct", one linear map from all tokens of a variate to its horizon; or "closed_loop", a last
            state-space layer that predicts its own next token and rolls on from there, to any horizon. It is also
            trained to predict the next patch and its own next input inside the lookback.
        loop_weights: Of these two losses, beside 1 for the horizon.
        seasons: Periods in steps, at which states of the seasonal head turn so that they oscillate.
        shuffle_variates: In training, let the blocks see the variates in another order each time, so that the forecast
            depends less on it.
        mixer: Further options of `Chimera2D`, such as coupling, heads, mix_variates, structure or d_conv.

    Raises:
        ValueError: if the lookback is shorter than a patch, sizes are below 1, or options do not go together.
    """

    def __init__(
        self,
        lookback: int,
        horizon: int,
        n_variates: int,
        *,
        d_model: int = 64,
        d_state: int = 8,
        n_layer: int = 2,
        patch_len: int = 16,
        stride: int = 8,
        dropout: float = 0.1,
        head_dropout: float = 0.1,
        instance_norm: bool = True,
        variate_embedding: bool | None = None,
        linear_skip: int = 0,
        mask_input: bool = False,
        quantiles: Sequence[float] | None = None,
        distribution: str | None = None,
        n_past: int = 0,
        n_future: int = 0,
        n_static: int = 0,
        head: Literal["direct", "closed_loop"] = "direct",
        loop_weights: Sequence[float] = (1.0, 1.0),
        seasons: Sequence[float] = (),
        shuffle_variates: bool = False,
        mixer: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        sizes = {"horizon": horizon, "n_variates": n_variates, "n_layer": n_layer, "patch_len": patch_len}
        for name, size in (sizes | {"stride": stride}).items():
            if size < 1:
                raise ValueError(f"expected {name} of at least 1, got {size}")
        if lookback < patch_len:
            raise ValueError(
                f"a patch of patch_len={patch_len} steps is longer than the lookback of {lookback}; lower patch_len"
            )
        if not 0 <= linear_skip <= lookback:
            raise ValueError(f"expected linear_skip from 0 to {lookback} (the lookback), got {linear_skip}")
        if head not in ("direct", "closed_loop"):
            raise ValueError(f'expected head "direct" or "closed_loop", got {head!r}')
        if any(not season >= 2 * stride for season in seasons):
            raise ValueError(
                f"a season of {min(seasons):g} steps is shorter than two tokens of stride {stride}; lower stride"
            )
        self.closed_loop, self.shuffle_variates = head == "closed_loop", shuffle_variates
        self.lookback, self.horizon, self.n_variates, self.n_past = lookback, horizon, n_variates, n_past
        self.patch_len, self.stride, self.linear_skip = patch_len, stride, linear_skip
        self.instance_norm, self.mask_input = instance_norm, mask_input
        self.output = Output(quantiles, distribution, instance_norm=instance_norm)
        if self.closed_loop:
            self._check_loop(lookback, patch_len, stride, linear_skip)
        self.padding = 0 if self.closed_loop else stride  # with which the last patch repeats the last value
        self.n_tokens = (lookback - patch_len) // stride + (1 if self.closed_loop else 2)
        rows = n_variates + n_past
        if variate_embedding is None:
            variate_embedding = (mixer or {}).get("coupling") != "pooled"
        self.embed = nn.Linear(patch_len * (2 if mask_input else 1), d_model)
        self.position = nn.Parameter(0.02 * torch.randn(self.n_tokens, d_model))
        self.variate = nn.Parameter(0.5 * torch.randn(rows, 1, d_model)) if variate_embedding else None
        self.static = nn.Linear(n_static, d_model, bias=False) if n_static else None
        self.known_past = nn.Linear(n_future * patch_len, d_model, bias=False) if n_future else None
        self.known_future = nn.Linear(n_future, n_variates, bias=False) if n_future else None
        options = {"d_state": d_state, "dropout": dropout} | (mixer or {})
        if seasons:
            options["rotation"] = [season / stride for season in seasons]
        self.stack = Stack(d_model, ["chimera2d"] * n_layer, mixer_options=options)
        self.head_dropout = nn.Dropout(head_dropout)
        if self.closed_loop:
            mixing = {key: options[key] for key in ("bidirectional", "mix_variates", "kappa") if key in options}
            self.loop = ClosedLoopGrid(d_model, d_state, **mixing)
            self.loop_weights = tuple(loop_weights)
            self.skipped = min(d_state, self.n_tokens // 2)  # tokens before which a prediction knows too little
            self.head = nn.Linear(d_model, stride * self.output.numbers)
        else:
            self.head = nn.Linear(self.n_tokens * d_model, horizon * self.output.numbers)
        self.skip = nn.Linear(n_variates * linear_skip, n_variates * horizon, bias=False) if linear_skip else None
        for linear in (self.known_future, self.skip):
            if linear is not None:
                nn.init.zeros_(linear.weight)

    def _check_loop(self, lookback: int, patch_len: int, stride: int, linear_skip: int) -> None:
        if (lookback - patch_len) % stride:
            raise ValueError(
                f"a closed loop needs patches that end with the lookback; {lookback} - {patch_len} steps are no "
                f"multiple of the stride {stride}"
            )
        if linear_skip or (self.output.distribution and self.output.distribution.counts):
            raise ValueError(
                "a closed loop has no linear_skip, and feeds values back, which are no counts; leave them out"
            )

    def forward(self, batch: WindowBatch) -> Tensor:
        """Forecast in the units of `batch.x`: (b, i, horizon), with quantiles or a distribution (b, i, horizon, q)."""
        return self._forecast(batch, self.horizon)[0]

    def forward_train(self, batch: WindowBatch) -> tuple[Tensor, Tensor | float]:
        """The forecast of `forward`, and scalar losses of a closed loop inside the lookback, in normalised units."""
        return self._forecast(batch, self.horizon)

    def forward_ahead(self, batch: WindowBatch, horizon: int) -> Tensor:
        """A forecast of any length by a closed loop, (b, i, horizon[, q]).

        Raises:
            ValueError: with another head.
        """
        if not self.closed_loop:
            raise ValueError("a direct head has one horizon; train with head='closed_loop'")
        return self._forecast(batch, horizon)[0]

    def _forecast(self, batch: WindowBatch, horizon: int) -> tuple[Tensor, Tensor | float]:
        x, mask = batch.x, batch.x_mask
        if self.n_past:
            past = self._required(batch.past, "past", self.n_past)
            x = torch.cat([x, past], dim=1)
            mask = torch.cat([mask, torch.ones_like(past, dtype=torch.bool)], dim=1)
        statistics = instance_statistics(x, mask) if self.instance_norm else None
        if statistics is not None:
            x = statistics.normalize(x, mask)
        hidden = self._tokens(x, mask, batch)
        token_mask = self._patches(mask).any(dim=-1)
        token_gap = None if batch.time_gap is None else self._token_gap(batch.time_gap)
        hidden = self._mixed(hidden, token_mask, token_gap)
        extra: Tensor | float = 0.0
        if self.closed_loop:
            y, extra = self._rolled(hidden, x, mask, token_mask, token_gap, horizon)
        else:
            hidden = hidden[:, : self.n_variates].flatten(2)
            y = self.head(self.head_dropout(hidden)).unflatten(-1, (self.horizon, -1))  # (b, i, horizon, q or 1)
        linear = self._linear_part(x, batch, horizon)
        if linear is not None:  # on the location, or on the lowest quantile, from which the others are counted
            y = torch.cat([y[..., :1] + linear[..., None], y[..., 1:]], dim=-1)
        if statistics is not None:
            statistics = type(statistics)(*(part[:, : self.n_variates] for part in statistics))
        return self.output(y, statistics), extra

    def _mixed(self, hidden: Tensor, mask: Tensor, gap: Tensor | None) -> Tensor:
        """The blocks, over variates in their order or, in training if asked for, in a random one."""
        if not (self.shuffle_variates and self.training):
            return self.stack(hidden, mask=mask, time_gap=gap)
        order = torch.randperm(hidden.shape[1], device=hidden.device)
        return self.stack(hidden[:, order], mask=mask[:, order], time_gap=gap)[:, order.argsort()]

    def _rolled(
        self, hidden: Tensor, x: Tensor, mask: Tensor, token_mask: Tensor, gap: Tensor | None, horizon: int
    ) -> tuple[Tensor, Tensor]:
        """Numbers of the head (b, i, horizon, q or 1) from a rollout, and the losses inside the lookback."""
        last = self.n_tokens - 1
        count = -(-horizon // self.stride)  # the first piece is read at the last token of the lookback
        outputs, ahead = self.loop(self.head_dropout(hidden), count - 1, mask=token_mask, time_gap=gap)
        pieces = self.head(outputs).unflatten(-1, (self.stride, -1))  # (b, rows, tokens, stride, q)
        y = pieces[:, : self.n_variates, last:].flatten(2, 3)[:, :, :horizon]
        following, seen = (t[..., self.patch_len :].unfold(-1, self.stride, self.stride) for t in (x, mask))
        span = slice(min(self.skipped, max(0, last - 1)), last)
        seen = seen[:, :, span]
        value = torch.where(seen, pieces[:, :, span, :, 0] - following[:, :, span], 0.0).square().sum()
        own = ahead[:, :, span] - hidden[:, :, 1:][:, :, span].detach()
        own = own.square().mean() if own.numel() else own.sum()
        return y, self.loop_weights[0] * value / seen.sum().clamp(min=1) + self.loop_weights[1] * own

    def _patches(self, x: Tensor) -> Tensor:
        """(b, i, lookback) -> (b, i, j, patch_len); the last value is repeated for the final patch."""
        return torch.cat([x, x[..., -1:].expand(*x.shape[:-1], self.padding)], dim=-1).unfold(
            -1, self.patch_len, self.stride
        )

    def _tokens(self, x: Tensor, mask: Tensor, batch: WindowBatch) -> Tensor:
        """Embed patches and covariates: (b, i, j, d)."""
        patches = self._patches(x)
        if self.mask_input:
            patches = torch.cat([patches, self._patches(mask).to(x.dtype)], dim=-1)
        hidden = self.embed(patches) + self.position
        if self.variate is not None:
            hidden = hidden + self.variate
        if self.static is not None:
            static = self.static(self._required(batch.static, "static", self.static.in_features, dim=-1))
            hidden = hidden + F.pad(static, (0, 0, 0, self.n_past))[:, :, None]
        if self.known_past is not None:
            count = self.known_past.in_features // self.patch_len
            known = self._patches(self._required(batch.future, "future", count)[..., : self.lookback])
            hidden = hidden + self.known_past(known.transpose(1, 2).flatten(2))[:, None]
        return hidden

    def _linear_part(self, x: Tensor, batch: WindowBatch, horizon: int) -> Tensor | None:
        """What acts linearly on the forecast: (b, i, horizon), None without such a part."""
        y = None
        if self.skip is not None:
            y = self.skip(x[:, : self.n_variates, -self.linear_skip :].flatten(1)).unflatten(-1, (self.n_variates, -1))
        if self.known_future is not None:
            future = self._required(batch.future, "future", self.known_future.in_features)
            known = self.known_future(future[..., self.lookback : self.lookback + horizon].transpose(1, 2)).transpose(
                1, 2
            )
            y = known if y is None else y + known
        return y

    def _token_gap(self, gap: Tensor) -> Tensor:
        """Steps since the preceding entry (b, lookback) -> strides since the preceding token (b, j)."""
        times = F.pad(gap, (0, self.padding), value=1.0).cumsum(dim=-1)
        ends = times[:, self.patch_len - 1 :: self.stride]
        return F.pad((ends[:, 1:] - ends[:, :-1]) / self.stride, (1, 0), value=1.0)

    @staticmethod
    def _required(part: Tensor | None, name: str, count: int, dim: int = 1) -> Tensor:
        if part is None or part.shape[dim] != count:
            found = "none" if part is None else str(part.shape[dim])
            raise ValueError(f"the model was built for {count} {name} covariates, the data has {found}")
        return part

    def dt_ranges(self) -> dict[str, Tensor]:
        """Learned steps along time of every head, all layers and directions together, before the input moves them."""
        ranges: dict[str, list[Tensor]] = {}
        for mixer in (part for part in self.stack.modules() if isinstance(part, Chimera2D)):
            for name, dt in mixer.dt_ranges().items():
                ranges.setdefault(name, []).append(dt)
        return {name: torch.cat(parts) for name, parts in ranges.items()}


def chimera_tiny(lookback: int, horizon: int, n_variates: int, **overrides: Any) -> ChimeraForecaster:
    """32 wide, 4 states, 1 layer."""
    return ChimeraForecaster(lookback, horizon, n_variates, **({"d_model": 32, "d_state": 4, "n_layer": 1} | overrides))


def chimera_small(lookback: int, horizon: int, n_variates: int, **overrides: Any) -> ChimeraForecaster:
    """64 wide, 8 states, 2 layers."""
    return ChimeraForecaster(lookback, horizon, n_variates, **({"d_model": 64, "d_state": 8, "n_layer": 2} | overrides))


def chimera_base(lookback: int, horizon: int, n_variates: int, **overrides: Any) -> ChimeraForecaster:
    """128 wide, 16 states, 3 layers."""
    return ChimeraForecaster(
        lookback, horizon, n_variates, **({"d_model": 128, "d_state": 16, "n_layer": 3} | overrides)
    )
