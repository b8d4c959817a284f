"""Chimera: selective 2-D state-space model over a grid of variates (i) and time (j).

    z_t, z_s, g = in_proj(x);    z <- silu(causal depthwise convolution of z along j)
    y_h = scan2d(z_h) + flip(scan2d(flip(z_h)))      for the trend and the seasonal head h, flipped along i
    output = out_proj((y_t + y_s) * silu(g))

The heads differ in the range of their time steps: small steps keep a long memory, large ones forget fast.
Behrouz, Santacatterina & Zabih (2024), "Chimera: Effectively Modeling Multivariate Time Series with 2-Dimensional State
Space Models". Equations of the scan: docs/ops/scan2d.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import Backend, causal_conv1d, linear_scan, selective_scan2d
from ..init import a_log_init, dt_bias_init, no_weight_decay
from .chimera2d_forms import companion_response, convolve_grid, scan_rotating

Coupling = Literal["full", "none", "time_to_variate", "variate_to_time", "pooled"]
Structure = Literal["diagonal", "companion"]
SeasonalInput = Literal["parallel", "residual", "moving_average"]
HEADS = ("trend", "seasonal")
FORMS = ("companion", "companion2", "share", "theta3")


class Chimera2D(nn.Module):
    """Grid mixer (b, i, j, d) -> (b, i, j, d), causal in j; neither residual nor norm inside.

    Every switch below takes one idea of the model out. Unknown values are refused.

    Args:
        d_model: Width d of the stream and of every head.
        d_state: States n per channel and kind.
        d_conv: Width of the causal convolution along j; 0 leaves it out (the SiLU stays).
        heads: "trend", "seasonal" or both.
        coupling: How the state along time (h1) and the state along variates (h2) feed each other: "full", "none",
            "time_to_variate" (h1 into h2 only) or "variate_to_time". "pooled" has one state per variate instead, fed by
            the mean of all variates' states: the order of the variates then means nothing (`bidirectional` and
            `variate_dt` neither), and depth does not grow with their number.
        bidirectional: Scan the variates in both directions, each with its own parameters. Time is never reversed.
        gate: Multiply the output by silu(g).
        selective: Input, output and step parameters depend on the input; False: constants (steps per channel), with
            which regular times are a convolution, the fastest form on a CPU.
        structure: "diagonal", or "companion": companion matrices along time, which hold an autoregression of `d_state`
            tokens exactly; constants only, without `time_gap`.
        rotation: Periods in tokens at which states of the seasonal head turn, so that they oscillate; none: real decay.
            Not with "pooled" or "companion".
        mix_variates: False takes h2 away, so that every variate is on its own; `coupling`, `bidirectional` and
            `variate_dt` then mean nothing.
        seasonal_input: What the seasonal head sees: its own projection ("parallel"), that minus the output of the trend
            head ("residual"), or that minus its moving average ("moving_average"; the trend head then sees the moving
            average of its own projection).
        moving_average: Width of that average in tokens; it looks back only.
        dt_rank: Rank of the map from input to steps; None: max(1, d_model // 16).
        trend_dt: Range of the initial steps along time of the trend head.
        seasonal_dt: The same for the seasonal head.
        variate_dt: Range of the initial steps along variates, both heads.
        kappa: Largest coupling relative to the decay; below 1 every cell is a contraction.
        input_discretization: "euler" or "zoh", see `omnissm.kernels.selective_scan2d`.
        dropout: Dropout of the output.
        backend: Backend of the scan.
        device: Where to create the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        TypeError: if a switch is neither True nor False.
        ValueError: if an option has an unknown value or a size is out of range; the message names the choices.
    """

    causal: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 8,
        d_conv: int = 3,
        heads: Sequence[str] = HEADS,
        coupling: Coupling = "full",
        bidirectional: bool = True,
        gate: bool = True,
        selective: bool = True,
        structure: Structure = "diagonal",
        rotation: Sequence[float] = (),
        mix_variates: bool = True,
        seasonal_input: SeasonalInput = "parallel",
        moving_average: int = 25,
        dt_rank: int | None = None,
        trend_dt: Sequence[float] = (1e-3, 1e-1),
        seasonal_dt: Sequence[float] = (1e-1, 1.0),
        variate_dt: Sequence[float] = (1e-1, 1.0),
        kappa: float = 0.9,
        input_discretization: Literal["euler", "zoh"] = "euler",
        dropout: float = 0.0,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_choice("coupling", coupling, get_args(Coupling))
        _check_choice("structure", structure, get_args(Structure))
        _check_choice("seasonal_input", seasonal_input, get_args(SeasonalInput))
        _check_choice("input_discretization", input_discretization, ("euler", "zoh"))
        switches = {"bidirectional": bidirectional, "gate": gate, "selective": selective, "mix_variates": mix_variates}
        for name, value in switches.items():
            if not isinstance(value, bool):  # a word like "false" would count as true
                raise TypeError(f"`{name}` must be True or False, got {value!r}; write options as '{{{name}: false}}'.")
        heads = tuple(heads)
        if not heads or len(set(heads)) < len(heads) or not set(heads) <= set(HEADS):
            raise ValueError(f"`heads` must name one or both of {', '.join(map(repr, HEADS))}, got {heads!r}.")
        if seasonal_input != "parallel" and set(heads) != set(HEADS):
            raise ValueError(f"seasonal_input={seasonal_input!r} needs both heads, got heads={heads!r}.")
        companion = structure == "companion"
        if companion and (selective or coupling == "pooled" or not mix_variates):
            raise ValueError(
                "structure='companion' is constant and ordered; pass selective=False, mix_variates=True and a coupling "
                f"other than 'pooled', got selective={selective}, mix_variates={mix_variates}, coupling={coupling!r}."
            )
        if rotation and (companion or "seasonal" not in heads or (coupling == "pooled" and mix_variates)):
            raise ValueError(
                "`rotation` turns the diagonal seasonal head; not with 'companion', 'pooled' or without it."
            )
        if any(not period >= 2 for period in rotation):
            raise ValueError(f"`rotation` holds periods of at least 2 tokens, got {tuple(rotation)}.")
        sizes = {"d_model": d_model, "d_state": d_state, "moving_average": moving_average, "dt_rank": dt_rank or 1}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        if not 0 <= d_conv <= 8:
            raise ValueError(f"`d_conv` must lie in 0 (no convolution) to 8, got {d_conv}.")
        if not 0 <= kappa <= 1:
            raise ValueError(f"`kappa` must lie in [0, 1] for bounded states, got {kappa}.")
        ranges = {"trend": trend_dt, "seasonal": seasonal_dt, "variate": variate_dt}
        for name, bounds in ranges.items():
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
                raise ValueError(
                    f"`{name}_dt` must be (shortest, longest) step, 0 < shortest <= longest, got {bounds}."
                )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.heads, self.gate = d_model, d_state, d_conv, heads, gate
        self.selective, self.mix_variates, self.seasonal_input = selective, mix_variates, seasonal_input
        self.structure, self.rotation = structure, tuple(rotation)
        self.moving_average, self.kappa = moving_average, kappa
        self.input_discretization, self.backend = input_discretization, backend
        self.coupling: Coupling = coupling if mix_variates else "none"
        self.dt_rank = dt_rank or max(1, d_model // 16)
        ordered = mix_variates and coupling != "pooled"
        self.directions = 2 if bidirectional and ordered else 1
        self.kinds = 2 if ordered else 1  # of states
        groups = len(heads) * self.directions  # one scan each, heads outermost

        self.in_proj = nn.Linear(d_model, (len(heads) + gate) * d_model, bias=False, **factory)
        if d_conv:
            self.conv_weight = _uniform(d_conv**-0.5, len(heads) * d_model, d_conv, **factory)
            self.conv_bias = _uniform(d_conv**-0.5, len(heads) * d_model, **factory)
        if companion:
            self.companion = nn.Parameter(torch.randn(groups, d_model, d_state, **factory))
            if coupling in ("full", "variate_to_time"):
                self.companion2 = nn.Parameter(torch.randn(groups, d_model, d_state, **factory))
                self.share = nn.Parameter(torch.zeros(groups, d_model, 1, **factory))
        else:
            dt1 = [dt_bias_init((self.directions, d_model), *ranges[head], **factory) for head in heads]
            self.dt1_bias = nn.Parameter(torch.cat(dt1))
            self.A1_log = nn.Parameter(a_log_init(groups, d_model, d_state, **factory))
        if ordered:
            self.dt2_bias = nn.Parameter(dt_bias_init((groups, d_model), *ranges["variate"], **factory))
            self.A4_log = nn.Parameter(a_log_init(groups, d_model, d_state, **factory))
        if self.rotation:
            turning = slice(heads.index("seasonal") * self.directions, (heads.index("seasonal") + 1) * self.directions)
            steps = F.softplus(self.dt1_bias.detach()[turning])[..., None]
            periods = torch.tensor([self.rotation[k % len(rotation)] for k in range(d_state)], device=device)
            self.speed = nn.Parameter((2 * math.pi / periods / steps).to(self.dt1_bias.dtype))
            self.phase = nn.Parameter(math.pi * (2 * torch.rand(self.speed.shape, **factory) - 1))
        if self.coupling in ("full", "variate_to_time", "pooled") and not companion:
            self.theta2 = nn.Parameter(0.1 * torch.randn(groups, d_model, d_state, **factory))
        if self.coupling in ("full", "time_to_variate"):
            self.theta3 = nn.Parameter(0.1 * torch.randn(groups, d_model, d_state, **factory))
        if selective:
            # From each scan's input to steps (through a bottleneck), B and C of each kind.
            self.x_proj = _uniform(d_model**-0.5, groups, d_model, self.kinds * (self.dt_rank + 2 * d_state), **factory)
            self.dt_proj = _uniform(0.1 * self.dt_rank**-0.5, self.kinds, groups, self.dt_rank, d_model, **factory)
        else:
            width = (d_model, d_state) if companion else (d_state,)
            start = torch.randn if companion else torch.ones
            self.B_const = nn.Parameter(start(self.kinds, groups, *width, **factory))
            self.C_const = nn.Parameter(torch.randn(self.kinds, groups, *width, **factory))
        self.D = nn.Parameter(torch.ones(groups, d_model, **factory))
        self.out_proj = nn.Linear(d_model, d_model, bias=False, **factory)
        self.dropout = nn.Dropout(dropout)
        no_weight_decay(*(self.get_parameter(name) for name in self.no_decay_names()))

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        names: tuple[str, ...] = ("A1_log", "A4_log", "theta2", "theta3", "dt1_bias", "dt2_bias", "B_const", "C_const")
        names += ("conv_bias", "D", "companion", "companion2", "share", "speed", "phase")
        return tuple(name for name in names if name in self._parameters)

    def dt_ranges(self) -> dict[str, Tensor]:
        """Learned steps along time of each head, all directions and channels, before the input moves them.

        Companion matrices have none.
        """
        if self.structure == "companion":
            return {}
        steps = F.softplus(self.dt1_bias.detach().float()).unflatten(0, (len(self.heads), self.directions))
        return {head: steps[index].flatten() for index, head in enumerate(self.heads)}

    def forward(self, x: Tensor, *, mask: Tensor | None = None, time_gap: Tensor | None = None) -> Tensor:
        """Mix a grid.

        Args:
            x: Tokens, (b, i, j, d), finite everywhere.
            mask: Which tokens hold an observation, (b, i, j) bool. The others enter no state, which evolves freely over
                them; their outputs are read from the states as everywhere.
            time_gap: Time since the token before in units of the base step, (b, j), positive; None: 1.

        Returns:
            (b, i, j, d) in the dtype of `x`, or that of autocast.

        Raises:
            ValueError: if a shape is wrong, or companion matrices shall step over gaps.
        """
        if self.structure == "companion" and time_gap is not None:
            raise ValueError("companion matrices step from token to token; leave out `time_gap`, or use 'diagonal'.")
        if x.dim() != 4 or x.shape[-1] != self.d_model:
            raise ValueError(f"`x` must be (b, i, j, {self.d_model}), got shape {tuple(x.shape)}.")
        if mask is not None and mask.shape != x.shape[:3]:
            raise ValueError(f"`mask` must be {tuple(x.shape[:3])} (b, i, j of `x`), got shape {tuple(mask.shape)}.")
        z = self.in_proj(x)
        width = len(self.heads) * self.d_model
        z, gate = z[..., :width], z[..., width:]
        if mask is not None:
            z = torch.where(mask[..., None], z, torch.zeros_like(z))
        if self.seasonal_input == "moving_average":
            z = self._decomposed(z, mask)
        z = self._convolved(z).unflatten(-1, (len(self.heads), self.d_model)).movedim(-2, 0)  # (head, b, i, j, d)
        if self.seasonal_input == "residual":
            trend, seasonal = self.heads.index("trend"), self.heads.index("seasonal")
            y = self._scan(z[trend : trend + 1], trend, mask, time_gap)
            y = y + self._scan(z[seasonal : seasonal + 1] - y, seasonal, mask, time_gap)
        elif self.rotation and len(self.heads) == 2:  # one head turns
            y = torch.cat([self._scan(z[k : k + 1], k, mask, time_gap) for k in (0, 1)])
        else:
            y = self._scan(z, 0, mask, time_gap)
        y = y.sum(0)
        if self.gate:
            y = y * F.silu(gate)
        return self.dropout(self.out_proj(y))

    def _decomposed(self, z: Tensor, mask: Tensor | None) -> Tensor:
        """The moving average of observed tokens along j for the trend head, what is left for the seasonal one."""
        observed = torch.ones_like(z[..., :1]) if mask is None else mask[..., None].to(z.dtype)
        total, count = (self._moving_sum(t.float()) for t in (z, observed))
        average = (total / count.clamp(min=1)).to(z.dtype)
        parts = zip(self.heads, z.split(self.d_model, -1), average.split(self.d_model, -1))
        return observed * torch.cat([mean if head == "trend" else own - mean for head, own, mean in parts], dim=-1)

    def _moving_sum(self, t: Tensor) -> Tensor:
        past = F.pad(t.cumsum(2), (0, 0, self.moving_average, 0))
        return past[:, :, self.moving_average :] - past[:, :, : t.shape[2]]

    def _convolved(self, z: Tensor) -> Tensor:
        """Depthwise causal convolution along j, then SiLU."""
        if not self.d_conv:
            return F.silu(z)
        y, _ = causal_conv1d(z.flatten(0, 1), self.conv_weight, self.conv_bias, activation="silu")
        return y.unflatten(0, z.shape[:2])

    def _scan(self, z: Tensor, first: int, mask: Tensor | None, time_gap: Tensor | None) -> Tensor:
        """Scan the inputs z (head, b, i, j, d) of the heads first, first + 1, ... in all directions, in one call."""
        heads, batch = z.shape[:2]
        groups = slice(first * self.directions, (first + heads) * self.directions)
        turning = bool(self.rotation) and self.heads[first] == "seasonal"
        if not self.selective and time_gap is None and self.coupling != "pooled":
            return self._convolved_grid(z, groups, mask, turning)
        z = self._with_directions(z, 2).flatten(0, 1)  # (g, b, i, j, d)
        u = z
        if mask is not None:
            observed = self._with_directions(mask.expand(heads, *mask.shape), 2).flatten(0, 1)
            u = torch.where(observed[..., None], z, torch.zeros_like(z))
        if self.coupling == "pooled":
            return self._pooled_scan(z, u, groups, mask, time_gap)
        y = self._recurrence(u.flatten(0, 1), self._coefficients(z, groups), groups, time_gap, turning)
        y = y.unflatten(0, (heads, self.directions, batch))
        return y[:, 0] if self.directions == 1 else y[:, 0] + y[:, 1].flip(2)

    def _convolved_grid(self, z: Tensor, groups: slice, mask: Tensor | None, turning: bool) -> Tensor:
        """The recurrence with constant parameters on inputs z (head, b, i, j, d), as a convolution."""
        heads, _, rows, columns, d = z.shape
        u = z if mask is None else torch.where(mask[..., None], z, torch.zeros_like(z))
        if self.structure == "companion":
            response = self._companion_response(groups, (rows, columns))
        else:
            count, wide = groups.stop - groups.start, torch.promote_types(self.D.dtype, torch.float32)
            impulse = F.pad(
                torch.ones(count, 1, 1, d, device=z.device, dtype=wide), (0, 0, 0, columns - 1, 0, rows - 1)
            )
            response = self._recurrence(impulse, self._coefficients(impulse[:, None], groups), groups, None, turning)
        response = response.unflatten(0, (heads, self.directions))  # (head, direction, i, j, d)
        kernel = F.pad(response[:, 0], (0, 0, 0, 0, rows - 1, 0))
        if self.directions == 2:
            kernel = kernel + F.pad(response[:, 1].flip(1), (0, 0, 0, 0, 0, rows - 1))
        return convolve_grid(u, kernel).to(z.dtype)

    def _companion_response(self, groups: slice, grid: tuple[int, int]) -> Tensor:
        """(g, i, j, d), with the skip in the first cell."""
        a4 = torch.exp(-F.softplus(self.dt2_bias[groups].float())[..., None] * self.A4_log[groups].float().exp())
        given = {name: t[groups].float() for name, t in self._parameters.items() if t is not None and name in FORMS}
        coupled = "companion2" in given
        response = companion_response(
            given["companion"],
            given.get("companion2"),
            torch.sigmoid(given["share"]) if coupled else a4,
            self.kappa * torch.tanh(given["theta3"]) * (1 - a4) if "theta3" in given else None,
            a4,
            (self.B_const[0, groups].float(), self.B_const[1, groups].float()),
            (self.C_const[0, groups].float(), self.C_const[1, groups].float()),
            grid,
            self.backend,
        )
        skip = F.pad(self.D[groups, None, None].float(), (0, 0, 0, grid[1] - 1, 0, grid[0] - 1))
        return response + skip

    def _recurrence(
        self,
        u: Tensor,
        coefficients: list[tuple[Tensor, Tensor, Tensor]],
        groups: slice,
        time_gap: Tensor | None,
        turning: bool,
    ) -> Tensor:
        """Scan u (g b, i, j, d) with the coefficients (dt, B, C) of both kinds of states."""
        (dt1, B1, C1), (dt2, B2, C2) = coefficients
        A1_log = self.A1_log[groups]
        none = torch.zeros_like(A1_log)
        if turning:
            return self._turned(u, coefficients, groups, time_gap)
        assert self.coupling != "pooled"  # which has a scan of its own
        return selective_scan2d(
            u,
            dt1,
            dt2,
            A1_log,
            self.A4_log[groups] if self.mix_variates else none,
            self.theta2[groups] if "theta2" in self._parameters else none,
            self.theta3[groups] if "theta3" in self._parameters else none,
            B1,
            B2,
            C1,
            C2,
            self.D[groups],
            kappa=self.kappa,
            coupling=self.coupling,
            input_discretization=self.input_discretization,
            time_gap=time_gap,
            backend=self.backend,
        )

    def _turned(
        self, u: Tensor, coefficients: list[tuple[Tensor, Tensor, Tensor]], groups: slice, time_gap: Tensor | None
    ) -> Tensor:
        """The seasonal head with rotation, u (g b, i, j, d)."""
        (dt1, B1, C1), (dt2, B2, C2) = coefficients
        repeats = len(u) // (groups.stop - groups.start)

        def spread(t: Tensor) -> Tensor:
            return t.float().repeat_interleave(repeats, dim=0)[:, None, None]

        def coupled(name: str) -> Tensor | None:
            return (
                self.kappa * torch.tanh(spread(self.get_parameter(name)[groups])) if name in self._parameters else None
            )

        rate = spread(self.A1_log[groups].exp())
        c2 = coupled("theta2")
        with torch.autocast(u.device.type, enabled=False):
            y = scan_rotating(
                u.float(),
                dt1,
                dt2,
                rate,
                spread(self.speed),
                spread(self.phase),
                spread(self.A4_log[groups].exp()) if self.mix_variates else torch.ones_like(rate),
                torch.zeros_like(rate) if c2 is None else c2,
                coupled("theta3"),
                (B1.float(), B2.float(), C1.float(), C2.float()),
                held=self.input_discretization == "zoh",
                time_gap=None if time_gap is None else time_gap.repeat(len(u) // len(time_gap), 1),
                backend=self.backend,
            )
        return (y + spread(self.D[groups]) * u).to(u.dtype)

    def _pooled_scan(self, z: Tensor, u: Tensor, groups: slice, mask: Tensor | None, time_gap: Tensor | None) -> Tensor:
        """h_ij = p_j h_i,j-1 + q_j mean_i h_i,j-1 + b_ij with the same p and q for all variates, (g, b, i, j, d).

        Mean and deviation from it are recurrences of their own: m_j = (p + q)_j m_j-1 + mean_i b_ij with the mean, and
        e_ij = p_j e_i,j-1 + b_ij - mean_i b_ij. |p| + |q| < 1, so neither grows. Jeong & Suk (2026),
        "Permutation-Equivariant 2D State Space Models".
        """
        grid = z.shape[:4]
        if mask is None:
            mean = z.mean(2, keepdim=True)
        else:  # steps depend on observed variates only
            seen = mask[None, ..., None].to(z.dtype)
            mean = (seen * z).sum(2, keepdim=True) / seen.sum(2, keepdim=True).clamp(min=1)
        dt = self._coefficients(mean, groups)[0][0].unflatten(0, grid[:2])[..., None]  # (g, b, 1, j, d, 1)
        B, C = (t.unflatten(0, grid[:2])[..., None, :] for t in self._coefficients(z, groups)[0][1:])
        alpha = self.A1_log[groups, None, None, None].exp().to(dt.dtype)
        elapsed = dt if time_gap is None else dt * time_gap[None, :, None, :, None, None].to(dt.dtype)
        p = torch.exp(-elapsed * alpha)
        q = -self.kappa * torch.tanh(self.theta2[groups, None, None, None]) * torch.expm1(-elapsed * alpha)
        gain = dt if self.input_discretization == "euler" else -torch.expm1(-dt * alpha) / alpha
        b = gain * B * u[..., None]  # (g, b, i, j, d, n)
        pooled = b.mean(2, keepdim=True)
        m, e = (
            linear_scan(*(t.expand_as(like).flatten(0, 2).flatten(2) for t in (decay, like)), backend=self.backend)[0]
            .unflatten(2, b.shape[-2:])
            .unflatten(0, like.shape[:3])
            for decay, like in ((p + q, pooled), (p, b - pooled))
        )
        y = ((m + e) * C).sum(-1) + self.D[groups, None, None, None] * u
        return y.to(z.dtype)

    def _with_directions(self, t: Tensor, dim: int) -> Tensor:
        """(head, ...) -> (head, direction, ...); the second direction has dimension `dim` of `t` reversed."""
        return t[:, None] if self.directions == 1 else torch.stack([t, t.flip(dim)], dim=1)

    def _coefficients(self, z: Tensor, groups: slice) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(dt, B, C) of both kinds of states, each (g b, i, j, ...), from z (g, b, i, j, d)."""
        grid = z.shape[:4]
        found = []
        biases = (self.dt1_bias, self.dt2_bias) if self.kinds == 2 else (self.dt1_bias,)
        if self.selective:
            projected = torch.bmm(z.flatten(1, 3), self.x_proj[groups])
            parts = projected.split(self.kinds * [self.dt_rank, self.d_state, self.d_state], dim=-1)
        for kind, parameter in enumerate(biases):
            bias = parameter[groups, None].to(torch.promote_types(parameter.dtype, torch.float32))
            if self.selective:
                low, B, C = parts[3 * kind : 3 * kind + 3]
                dt = F.softplus(torch.bmm(low, self.dt_proj[kind, groups]) + bias)
            else:
                count = math.prod(grid[1:])
                dt = F.softplus(bias).expand(-1, count, -1)
                B, C = (t[kind, groups, None].expand(-1, count, -1) for t in (self.B_const, self.C_const))
            found.append((dt, B, C))
        if self.kinds == 1:  # the second state neither takes anything in nor is read
            dt, B, C = (torch.zeros_like(t) for t in found[0])
            found.append((dt, B, C))
        return [tuple(t.unflatten(1, grid[1:]).flatten(0, 1) for t in kind) for kind in found]  # type: ignore[misc]


def _uniform(bound: float, *shape: int, **factory: Any) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, **factory).uniform_(-bound, bound))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
