"""A grid state-space model that continues its own input: what it reads next is what it predicts next.

    h1[i,j] = a1 h1[i,j-1] + a2 h2[i,j-1] + dt1 B1 u[i,j]      h2[i,j] = a3 h1[i-1,j] + a4 h2[i-1,j] + dt2 B2 u[i,j]
    output y[i,j] = C1 h1 + C2 h2 + D u,      next input u[i,j+1] = K1 h1[i,j] + K2 h2[i,j]

Behind the lookback the predicted inputs are fed back, so a horizon of any length is a rollout of states. One that is
longer than every input of the lookback is shortened to the longest of them: no rollout runs away. Closing the
loop: Zhang et al. (2023), "Effectively Modeling Time Series with Simple Discrete State Spaces"; the recurrence: Behrouz
et al. (2024), "Chimera". Steps and maps depend on the input, also on a predicted one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import linear_scan
from ...ssmcore.init import a_log_init, dt_bias_init, no_weight_decay

__all__ = ["ClosedLoopGrid"]


class ClosedLoopGrid(nn.Module):
    """Continue a grid (b, i, j, d) of variates i along time j.

    Args:
        d_model: Width d.
        d_state: States n per channel and kind.
        bidirectional: Scan the variates both ways; the predicted input is the sum of both readouts and feeds both.
        mix_variates: False takes the state along variates away.
        kappa: Largest coupling relative to the decay; below 1 the states are bounded for bounded inputs.
    """

    def __init__(
        self, d_model: int, d_state: int, *, bidirectional: bool = True, mix_variates: bool = True, kappa: float = 0.9
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.kappa, self.mix_variates = d_model, d_state, kappa, mix_variates
        self.directions = 2 if bidirectional and mix_variates else 1
        self.kinds = 2 if mix_variates else 1
        self.dt_rank = max(1, d_model // 16)
        groups = self.directions
        self.dt_bias = nn.Parameter(
            torch.stack([dt_bias_init((groups, d_model), 1e-3 if k == 0 else 1e-1, 1.0) for k in range(self.kinds)])
        )
        self.A_log = nn.Parameter(torch.stack([a_log_init(groups, d_model, d_state) for _ in range(self.kinds)]))
        if mix_variates:
            self.theta = nn.Parameter(0.1 * torch.randn(2, groups, d_model, d_state))
        width = self.kinds * (self.dt_rank + 2 * d_state)
        self.x_proj = nn.Parameter(torch.empty(groups, d_model, width).uniform_(-(d_model**-0.5), d_model**-0.5))
        bound = 0.1 * self.dt_rank**-0.5
        self.dt_proj = nn.Parameter(torch.empty(self.kinds, groups, self.dt_rank, d_model).uniform_(-bound, bound))
        self.K = nn.Parameter(0.01 * torch.randn(self.kinds, groups, d_model, d_state))
        self.D = nn.Parameter(torch.ones(groups, d_model))
        no_weight_decay(*(self.get_parameter(name) for name in self.no_decay_names()))

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return tuple(name for name in ("dt_bias", "A_log", "theta", "D") if name in self._parameters)

    def forward(
        self, u: Tensor, count: int, *, mask: Tensor | None = None, time_gap: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read a grid and continue it; in float32, whatever the input is.

        Args:
            u: Inputs, (b, i, j, d).
            count: Columns to continue by.
            mask: Which tokens enter the state, (b, i, j).
            time_gap: Time since the token before, (b, j).

        Returns:
            Outputs (b, i, j + count, d), and the predictions of the input one column ahead, (b, i, j + count, d): what
            stands at column j was made for j + 1.
        """
        with torch.autocast(u.device.type, enabled=False):
            return self._run(u.float(), count, mask, time_gap)

    def _run(self, u: Tensor, count: int, mask: Tensor | None, time_gap: Tensor | None) -> tuple[Tensor, Tensor]:
        if mask is not None:
            u = torch.where(mask[..., None], u, 0.0)
        longest = u.detach().square().mean(-1, keepdim=True).amax(dim=(1, 2)).sqrt()  # of each row of the batch, (b, 1)
        state = [u.new_zeros(self.directions, *u.shape[:2], self.d_model, self.d_state) for _ in range(self.kinds)]
        outputs: list[Tensor] = []
        ahead: list[Tensor] = []
        last = u.shape[2]
        for j in range(last + count):
            entering = u[:, :, j] if j < last else ahead[-1]
            gap = None if time_gap is None or j >= last else time_gap[None, :, j, None, None, None]
            y, following, state = self._column(entering, state, gap)
            if j + 1 >= last:  # what is fed back
                size = following.square().mean(-1, keepdim=True).clamp(min=1e-12).sqrt()
                following = following * (longest[:, None] / size).clamp(max=1.0)
            outputs.append(y)
            ahead.append(following)
        return torch.stack(outputs, dim=2), torch.stack(ahead, dim=2)

    def _column(self, u: Tensor, state: list[Tensor], gap: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Output and predicted next input (b, i, d) of one column of inputs, and the states (g, b, i, d, n) after."""
        both = u[None] if self.directions == 1 else torch.stack([u, u.flip(1)])
        projected = torch.einsum("gbid,gde->gbie", both, self.x_proj)
        parts = projected.split(self.kinds * [self.dt_rank, self.d_state, self.d_state], dim=-1)
        new: list[Tensor] = []
        y, following = self.D[:, None, None] * both, torch.zeros_like(both)
        for kind in range(self.kinds):
            low, B, C = parts[3 * kind : 3 * kind + 3]
            dt = F.softplus(torch.einsum("gbir,grd->gbid", low, self.dt_proj[kind]) + self.dt_bias[kind][:, None, None])
            dt = dt[..., None]
            elapsed = dt if gap is None or kind else dt * gap
            rate = self.A_log[kind].exp()[:, None, None]
            decay, left = torch.exp(-elapsed * rate), -torch.expm1(-elapsed * rate)
            entering = dt * B[..., None, :] * both[..., None]
            if kind == 0:
                h = decay * state[0] + entering
                if self.mix_variates:
                    h = h + self.kappa * torch.tanh(self.theta[0])[:, None, None] * left * state[1]
            else:
                above = F.pad(new[0][:, :, :-1], (0, 0, 0, 0, 1, 0))
                entering = entering + self.kappa * torch.tanh(self.theta[1])[:, None, None] * left * above
                flat = (t.flatten(0, 1).flatten(2) for t in (decay, entering))
                h = linear_scan(*flat)[0].unflatten(2, decay.shape[3:]).unflatten(0, decay.shape[:2])
            new.append(h)
            y = y + (h * C[..., None, :]).sum(-1)
            following = following + (h * self.K[kind][:, None, None]).sum(-1)
        return self._joined(y), self._joined(following), new

    def _joined(self, t: Tensor) -> Tensor:
        return t[0] if self.directions == 1 else t[0] + t[1].flip(1)
