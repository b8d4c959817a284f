"""Chimera2D: selective two-dimensional state-space model over a grid of variates (i) and time steps (j).

    r -> z_trend, z_seasonal, g = linear(r);    z = silu(causal_conv_j(z))
    y = out_proj((SSM2D_trend(z_trend) + SSM2D_seasonal(z_seasonal)) * silu(g))

where SSM2D is `selective_scan2d` run in both directions along the variates, and the heads differ in the range of their
time steps. Behrouz, Santacatterina & Zabih (2024), "Chimera", the model section.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import causal_conv1d, linear_scan, selective_scan2d
from ..init import dt_bias_init

Head = Literal["trend", "seasonal"]
Coupling = Literal["full", "none", "time_to_variate", "variate_to_time"]
SeasonalInput = Literal["parallel", "residual", "moving_average"]

MOVING_AVERAGE = 25  # tokens


class Chimera2D(nn.Module):
    """Grid mixer (b, i, j, d_model) -> the same shape, causal in j; the residual and the norm belong to the caller.

    Args:
        d_model: Width.
        d_state: States per channel of each of the two kinds.
        d_conv: Width of the causal depthwise convolution along j, 1 to 8; 0 turns it off.
        heads: "trend" (time steps start in `dt_trend`), "seasonal" (`dt_seasonal`), or both.
        coupling: How the state along time and the state along variates feed each other: "full", "none",
            "time_to_variate" or "variate_to_time".
        bidirectional: Scan the variates in both directions, each with its own parameters.
        gate: Multiply by silu of a third branch.
        selective: Let steps, input and output maps depend on the input; False learns constants.
        mix_variates: False removes the state along variates: each variate is scanned alone by a 1-D model.
        seasonal_input: What the seasonal head reads: "parallel" its own projection, "residual" that minus the output of
            the trend head, "moving_average" that minus its causal mean over 25 tokens, which the trend head reads.
        dropout: Dropout on the output.
        dt_rank: Rank of the input-dependent part of the steps; None is max(1, d_model // 16).
        dt_trend: Range in which the time steps of the trend head start, log-uniform.
        dt_seasonal: The same of the seasonal head.
        dt_variate: Range in which the steps along variates start.
        kappa: Largest coupling relative to the decay, in [0, 1); below 1 all states stay bounded.
        input_discretization: "euler" or "zoh", see `selective_scan2d`.
        device, dtype: Of the parameters; those of the recurrence are always float32.

    Raises:
        ValueError: for an unknown option.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 8,
        d_conv: int = 3,
        heads: Sequence[Head] = ("trend", "seasonal"),
        coupling: Coupling = "full",
        bidirectional: bool = True,
        gate: bool = True,
        selective: bool = True,
        mix_variates: bool = True,
        seasonal_input: SeasonalInput = "parallel",
        dropout: float = 0.0,
        dt_rank: int | None = None,
        dt_trend: tuple[float, float] = (1e-3, 1e-1),
        dt_seasonal: tuple[float, float] = (1e-1, 1.0),
        dt_variate: tuple[float, float] = (1e-1, 1.0),
        kappa: float = 0.9,
        input_discretization: Literal["euler", "zoh"] = "euler",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check("coupling", coupling, get_args(Coupling))
        _check("seasonal_input", seasonal_input, get_args(SeasonalInput))
        _check("input_discretization", input_discretization, ("euler", "zoh"))
        for head in heads:
            _check("heads", head, get_args(Head))
        if not heads or len(set(heads)) != len(heads):
            raise ValueError(f"heads must name 'trend', 'seasonal' or both once, got {list(heads)}.")
        if seasonal_input != "parallel" and tuple(heads) != ("trend", "seasonal"):
            raise ValueError(
                f"seasonal_input={seasonal_input!r} needs heads=('trend', 'seasonal'), got {tuple(heads)}."
            )
        if not 0 <= d_conv <= 8:
            raise ValueError(f"d_conv must lie in 0 (off) to 8, got {d_conv}.")
        if not 0 <= kappa < 1:
            raise ValueError(f"kappa must lie in [0, 1) for bounded states, got {kappa}.")
        self.d_model, self.d_state, self.heads = d_model, d_state, tuple(heads)
        self.coupling, self.kappa, self.input_discretization = coupling, kappa, input_discretization
        self.selective, self.mix_variates, self.seasonal_input = selective, mix_variates, seasonal_input
        self.n_directions = 2 if bidirectional and mix_variates else 1
        self.dt_rank = dt_rank or max(1, d_model // 16)
        n_heads, groups = len(heads), len(heads) * self.n_directions
        axes = 2 if mix_variates else 1  # steps and maps along time, and along variates
        factory = {"device": device, "dtype": dtype}
        exact = {"device": device, "dtype": torch.float32}

        self.gate = gate
        self.in_proj = nn.Linear(d_model, (n_heads + gate) * d_model, bias=False, **factory)
        if d_conv:
            bound = d_conv**-0.5
            self.conv_weight = nn.Parameter(torch.empty(n_heads * d_model, d_conv, **factory).uniform_(-bound, bound))
            self.conv_bias = nn.Parameter(torch.zeros(n_heads * d_model, **factory))
        else:
            self.conv_weight = self.conv_bias = None
        self.maps = 2 * axes * d_state  # B and C per axis
        if selective:
            width, bound = self.maps + axes * self.dt_rank, d_model**-0.5
            self.x_proj = nn.Parameter(torch.empty(groups, d_model, width, **factory).uniform_(-bound, bound))
            bound = 0.1 * self.dt_rank**-0.5
            self.dt_proj = nn.Parameter(
                torch.empty(groups, axes, self.dt_rank, d_model, **factory).uniform_(-bound, bound)
            )
        else:
            self.BC = nn.Parameter(torch.randn(groups, self.maps, **factory) * d_state**-0.5)
        ranges = {"trend": dt_trend, "seasonal": dt_seasonal}
        starts = [dt_bias_init(d_model, *ranges[head], **exact) for head in heads for _ in range(self.n_directions)]
        self.dt1_bias = nn.Parameter(torch.stack(starts))
        rates = torch.arange(1, d_state + 1, **exact).log().expand(groups, d_model, d_state)
        self.A1_log = nn.Parameter(rates.clone())
        if mix_variates:
            self.dt2_bias = nn.Parameter(
                torch.stack([dt_bias_init(d_model, *dt_variate, **exact) for _ in range(groups)])
            )
            self.A4_log = nn.Parameter(rates.clone())
            self.theta2 = nn.Parameter(0.1 * torch.randn(groups, d_model, d_state, **exact))
            self.theta3 = nn.Parameter(0.1 * torch.randn(groups, d_model, d_state, **exact))
        self.D = nn.Parameter(torch.ones(groups, d_model, **exact))
        self.out_proj = nn.Linear(d_model, d_model, bias=False, **factory)
        self.dropout = nn.Dropout(dropout)

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        names = ("A1_log", "A4_log", "theta2", "theta3", "dt1_bias", "dt2_bias", "D", "conv_bias")
        return tuple(name for name in names if getattr(self, name, None) is not None)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, time_gap: Tensor | None = None) -> Tensor:
        """Mix over time and variates.

        Args:
            x: Tokens, (b, i, j, d_model); i variates, j time steps.
            mask: (b, i, j) bool; where False nothing enters the states, which go on decaying.
            time_gap: Time since the token before in units of the base step, positive, (b, j); 1 everywhere if None.

        Returns:
            (b, i, j, d_model).
        """
        branches = list(self.in_proj(x).chunk(len(self.heads) + self.gate, dim=-1))
        gate = branches.pop() if self.gate else None
        if self.seasonal_input == "moving_average":
            mean = _moving_average(branches[0])
            branches = [mean, branches[1] - _moving_average(branches[1])]
        z = torch.stack(branches)  # (heads, b, i, j, d)
        if mask is not None:
            z = torch.where(mask[..., None], z, 0.0)
        if self.conv_weight is not None:
            z = self._convolve(z)
            if mask is not None:
                z = torch.where(mask[..., None], z, 0.0)
        if self.seasonal_input == "residual":
            trend = self._scan(z[:1], slice(0, self.n_directions), time_gap)
            rest = z[1:] - trend if mask is None else torch.where(mask[..., None], z[1:] - trend, 0.0)
            y = trend + self._scan(rest, slice(self.n_directions, None), time_gap)
        else:
            y = self._scan(z, slice(None), time_gap)
        y = y.sum(dim=0)
        if gate is not None:
            y = y * F.silu(gate)
        return self.dropout(self.out_proj(y.to(x.dtype)))

    def dt_ranges(self) -> dict[str, Tensor]:
        """Time steps of each head without their input-dependent part, (directions * d_model,), detached."""
        steps = F.softplus(self.dt1_bias.detach()).unflatten(0, (len(self.heads), self.n_directions))
        return {head: part.flatten() for head, part in zip(self.heads, steps)}

    def _convolve(self, z: Tensor) -> Tensor:
        heads, batch, variates, steps, width = z.shape
        rows = z.permute(1, 2, 3, 0, 4).reshape(batch * variates, steps, heads * width)
        rows, _ = causal_conv1d(rows, self.conv_weight, self.conv_bias, activation="silu")
        return rows.view(batch, variates, steps, heads, width).permute(3, 0, 1, 2, 4)

    def _scan(self, z: Tensor, groups: slice, time_gap: Tensor | None) -> Tensor:
        """Scan the heads of `groups`, all directions in one call, and add the directions: (heads, b, i, j, d)."""
        heads, batch, variates, steps, width = z.shape
        stacked = torch.stack([z, z.flip(2)], dim=1) if self.n_directions == 2 else z[:, None]
        stacked = stacked.reshape(-1, batch * variates * steps, width)  # (g, cells, d)
        maps, dts = self._parameters(stacked, groups)
        cells = (-1, variates, steps)
        x, dts = stacked.view(*cells, width), [dt.reshape(*cells, width) for dt in dts]
        B_C = [part.reshape(*cells, self.d_state) for part in maps.split(self.d_state, dim=-1)]
        if self.mix_variates:
            B1, B2, C1, C2 = B_C
            y = selective_scan2d(
                x, dts[0], dts[1], self.A1_log[groups], self.A4_log[groups], self.theta2[groups], self.theta3[groups],
                B1, B2, C1, C2, self.D[groups],
                kappa=self.kappa, coupling=self.coupling, input_discretization=self.input_discretization,
                time_gap=time_gap,
            )  # fmt: skip
        else:
            y = self._scan_time(x, dts[0], *B_C, groups, time_gap)
        y = y.view(heads, self.n_directions, batch, variates, steps, width)
        return y[:, 0] + y[:, 1].flip(2) if self.n_directions == 2 else y[:, 0]

    def _parameters(self, x: Tensor, groups: slice) -> tuple[Tensor, list[Tensor]]:
        """Maps (g, cells, maps) and steps, one (g, cells, d) per axis."""
        biases = [self.dt1_bias] + ([self.dt2_bias] if self.mix_variates else [])
        if not self.selective:
            maps = self.BC[groups, None].expand(-1, x.shape[1], -1)
            return maps, [F.softplus(bias[groups, None]).expand(-1, x.shape[1], -1) for bias in biases]
        maps, low = torch.bmm(x, self.x_proj[groups]).split([self.maps, len(biases) * self.dt_rank], dim=-1)
        raw = [torch.bmm(part, self.dt_proj[groups, k]) for k, part in enumerate(low.split(self.dt_rank, dim=-1))]
        return maps, [F.softplus(step.float() + bias[groups, None]) for step, bias in zip(raw, biases)]

    def _scan_time(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, groups: slice, time_gap: Tensor | None) -> Tensor:
        """Each variate alone: h_j = exp(-dt alpha) h_{j-1} + dt B x, y = C h + D x, with d_state states per channel."""
        rows, variates, steps, width = x.shape
        alpha = self.A1_log[groups].exp().repeat_interleave(rows // self.A1_log[groups].shape[0], 0)  # (rows, d, n)
        x, dt, B, C = (part.flatten(0, 1).to(alpha.dtype) for part in (x, dt, B, C))
        alpha = alpha.repeat_interleave(variates, 0)[:, None]
        stretched = dt
        if time_gap is not None:
            gap = time_gap.repeat(rows // time_gap.shape[0], 1).repeat_interleave(variates, 0)
            stretched = dt * gap[..., None]
        if self.input_discretization == "zoh":
            gain = -torch.expm1(-dt[..., None] * alpha) / alpha
        else:
            gain = dt[..., None]
        a = torch.exp(-stretched[..., None] * alpha)
        b = gain * B[:, :, None] * x[..., None]
        h, _ = linear_scan(a.flatten(2), b.expand_as(a).flatten(2))
        y = (h.view_as(a) * C[:, :, None]).sum(-1)
        skip = self.D[groups].repeat_interleave(x.shape[0] // self.D[groups].shape[0], 0)[:, None]
        return (y + skip * x).view(rows, variates, steps, width)


def _moving_average(x: Tensor) -> Tensor:
    """Causal mean over the newest tokens, fewer at the start: (b, i, j, d)."""
    total = F.pad(x.cumsum(dim=2), (0, 0, 1, 0))
    steps = torch.arange(1, x.shape[2] + 1, device=x.device)
    start = (steps - MOVING_AVERAGE).clamp(min=0)
    return (total[:, :, 1:] - total[:, :, start]) / (steps - start)[:, None]


def _check(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; expected one of {', '.join(choices)}.")
