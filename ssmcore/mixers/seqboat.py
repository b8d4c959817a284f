"""SeqBoat: a moving average everywhere, and attention among the tokens that a gate activates.

    m = silu(EMA(x));    [u, hx] = W m;    active where softmax(u / T) favours the second option, with probability p
    [z, r, v] = silu(W' m) of active tokens;    q, k = two affine copies of z
    a_ij = relu(q_i.k_j / w + bias_{i-j})^2   over active tokens at most w active ones away   (or softmax)
    output = hx + p W_h(r sum_j a_ij v_j)                                                       (hx alone elsewhere)

Ren, Liu, Wang, Xu, Zhu & Zhai (2023), "Sparse Modular Activation for Efficient Sequence Modeling"; the moving average
is that of Ma et al. (2023), Mega. Its block norms, adds the stream and takes a SiLU of the sum; here blocks do the
first two, and there is no SiLU on the stream.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, NoReturn, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import linear_scan
from ..init import no_weight_decay
from .common import (
    Layout,
    MixerState,
    Mode,
    check_input,
    linear_flops,
    mixer_state,
    recurrence_dtype,
    require_causal,
    total_flops,
    wide,
)
from .rows import RowMixer

AttentionActivation = Literal["relu2", "softmax"]


@mixer_state
class SeqBoatState(MixerState):
    """State of `SeqBoat`.

    Attributes:
        ssm: Moving averages, (b, d * n_ema), float32.
        k: Keys of the last `window` active tokens, the latest last, (b, window, qk_dim).
        v: Their values, (b, window, d_hidden).
        count: How many of them there are, (b,) int64.
    """

    ssm: Tensor
    k: Tensor
    v: Tensor
    count: Tensor

    recurrent: ClassVar[tuple[str, ...]] = ("ssm",)
    integral: ClassVar[tuple[str, ...]] = ("count",)


class SeqBoat(RowMixer):
    """Sequence mixer that attends among few tokens, causal or two-sided.

    Time and memory of a call are quadratic in the number of its active tokens (compiled code: of all).

    Args:
        d_model: Width d.
        n_ema: Moving averages per channel.
        qk_dim: Channels of queries and keys.
        d_hidden: Channels of values; None: 2 d_model.
        window: Active tokens seen before a token (two-sided: and behind it).
        activation: "relu2" or "softmax".
        bidirectional: Look ahead too, with moving averages of their own; there is no state then.
        temperature: Initial temperature of the gate over sqrt(d_model).
        device: Where to create the parameters.
        dtype: Their dtype; those of the moving average are float32 at least.

    Raises:
        ValueError: if a size is out of range or the activation unknown.
    """

    linear_in_x: ClassVar[bool] = False
    state_type: ClassVar[type[MixerState]] = SeqBoatState

    def __init__(
        self,
        d_model: int,
        *,
        n_ema: int = 16,
        qk_dim: int = 64,
        d_hidden: int | None = None,
        window: int = 128,
        activation: AttentionActivation = "relu2",
        bidirectional: bool = False,
        temperature: float = 0.3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = 2 * d_model if d_hidden is None else d_hidden
        for name, size in (("n_ema", n_ema), ("qk_dim", qk_dim), ("d_hidden", hidden), ("window", window)):
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        if activation not in get_args(AttentionActivation) or temperature <= 0:
            raise ValueError(
                "`activation` must be 'relu2' or 'softmax' and `temperature` positive, "
                f"got {activation!r} and {temperature}."
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        real: dict[str, Any] = {"device": device, "dtype": recurrence_dtype(dtype)}
        self.d_model, self.n_ema, self.qk_dim, self.d_hidden = d_model, n_ema, qk_dim, hidden
        self.window, self.activation, self.causal = window, activation, not bidirectional
        shape = (2 if bidirectional else 1, d_model, n_ema)
        self.delta = nn.Parameter(0.2 * torch.randn(shape, **real))
        self.alpha = nn.Parameter(0.2 * torch.randn(shape, **real))
        signs = 1.0 - 2.0 * (torch.arange(n_ema, **real) % 2)
        self.beta = nn.Parameter(signs + 0.02 * torch.randn(shape, **real))
        self.gamma = nn.Parameter(torch.randn(shape, **real))
        self.omega = nn.Parameter(torch.randn(d_model, **real))
        self.hx_proj = nn.Linear(d_model, 2 + d_model, **factory)  # [u, hx]
        self.mx_proj = nn.Linear(d_model, qk_dim + 2 * hidden, **factory)  # [z, r, v]
        self.qk_scale = nn.Parameter(0.02 * torch.randn(2, qk_dim, **factory))
        self.qk_bias = nn.Parameter(torch.zeros(2, qk_dim, **factory))
        distances = window + 1 if self.causal else 2 * window + 1
        self.distance_bias = nn.Parameter(0.02 * torch.randn(distances, **factory))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature * math.sqrt(d_model)), **real))
        self.h_proj = nn.Linear(hidden, d_model, **factory)
        with torch.no_grad():
            for layer in (self.hx_proj, self.mx_proj, self.h_proj):
                layer.weight.normal_(std=0.02)
                layer.bias.zero_()
        no_weight_decay(*(self.get_parameter(name) for name in self.no_decay_names()))

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        ema = ("delta", "alpha", "beta", "gamma", "omega")
        return (*ema, "qk_scale", "qk_bias", "distance_bias", "log_temperature")

    def mixing_matrix(self, x: Tensor, *, state: SeqBoatState | None = None) -> NoReturn:
        """Not of this mixer.

        Raises:
            NotImplementedError: always; `omnissm.ssmcore.analysis.token_jacobian` serves nonlinear mixers.
        """
        raise NotImplementedError(
            "SeqBoat is not linear and has no mixing matrix; see ssmcore.analysis.token_jacobian."
        )

    def active(self, x: Tensor) -> Tensor:
        """Which tokens of x (b, l, d) attend and are attended to, (b, l) bool."""
        check_input(x, self.d_model)
        return self._gate(F.silu(self._average(x, None, Layout())[0]))[1]

    def flops(self, l: int, *, mode: Mode = "prefill") -> int:  # noqa: E741
        """Operations of one sequence of length l, or of one position ("decode"), as if all tokens were active."""
        ema = (1 if self.causal else 2) * 5 * self.d_model * self.n_ema
        position = linear_flops(self.hx_proj, self.mx_proj, self.h_proj) + ema
        pair = 2 * (self.qk_dim + self.d_hidden)
        if mode == "decode":
            require_causal(self)
            return position + pair * (self.window + 1)
        return total_flops({"positions": l * position, "attention": pair * l * l}, mode)

    def extra_repr(self) -> str:
        """Shown by repr()."""
        return f"n_ema={self.n_ema}, window={self.window}, activation={self.activation!r}, causal={self.causal}"

    def _weight(self) -> Tensor:
        return self.mx_proj.weight

    def _shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        held = {"k": (batch, self.window, self.qk_dim), "v": (batch, self.window, self.d_hidden), "count": (batch,)}
        return {"ssm": (batch, self.d_model * self.n_ema), **held}

    def _average(self, x: Tensor, start: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
        """Moving averages of aligned rows (b, l, d), and those after the last real token, (b, d n)."""
        delta, alpha = wide(self.delta).sigmoid(), wide(self.alpha).sigmoid()
        decay, gain = 1 - delta * alpha, delta * wide(self.beta)
        read = wide(self.gamma) / math.sqrt(self.n_ema)
        u = wide(x)
        y, last = wide(self.omega) * u, u.new_zeros(0)
        for side in range(decay.shape[0]):
            a = decay[side].flatten().to(u.dtype).expand(*u.shape[:2], -1)
            b = (gain[side] * u[..., None]).flatten(2)
            if layout.mask is not None:  # padding lets the averages pass
                a = torch.where(layout.mask[..., None], a, torch.ones_like(a))
                b = torch.where(layout.mask[..., None], b, torch.zeros_like(b))
            h, end = linear_scan(a, b, start, seq_idx=layout.index, reverse=side == 1)
            last = end if side == 0 else last
            if side == 1:  # the position itself belongs to the side of the past
                h = h - b
            y = y + (h.unflatten(2, (self.d_model, self.n_ema)) * read[side]).sum(-1)
        return y.to(x.dtype), last

    def _gate(self, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hx (b, l, d), who is active (b, l), and with which probability."""
        u, hx = self.hx_proj(m).split([2, self.d_model], dim=-1)
        share = (wide(u) / wide(self.log_temperature).exp()).softmax(-1)
        return hx, share[..., 1] > share[..., 0], share[..., 1]

    def _mix(self, x: Tensor, state: SeqBoatState | None, layout: Layout) -> tuple[Tensor, SeqBoatState | None]:
        start = None if state is None else layout.restart(state.ssm)
        average, ssm = self._average(x, start, layout)
        m = F.silu(average)
        hx, active, share = self._gate(m)
        active = active if layout.mask is None else active & layout.mask
        length = x.shape[1]
        if not torch.compiler.is_compiling() and not length:
            return hx, state
        room = length  # columns for the active tokens of a row
        if not torch.compiler.is_compiling():
            room = max(int(active.sum(1).max()), 1) if active.numel() else 1
        order = (~active).int().argsort(dim=1, stable=True)[:, :room]
        z, r, v = F.silu(self.mx_proj(m.gather(1, order[..., None].expand(-1, -1, self.d_model)))).split(
            [self.qk_dim, self.d_hidden, self.d_hidden], dim=-1
        )
        qk = z[:, :, None] * self.qk_scale.to(z.dtype) + self.qk_bias.to(z.dtype)
        q, k = qk.unbind(2)
        real = active.gather(1, order)
        index = None if layout.index is None else layout.index.gather(1, order)
        found = self._attend(q, k, v, real, index, state, layout)
        h = self.h_proj(found.to(r.dtype) * r)
        place = (active.cumsum(1) - 1).clamp(min=0)
        h = h.gather(1, place[..., None].expand(-1, -1, self.d_model))
        y = hx + torch.where(active, share, torch.zeros_like(share))[..., None].to(hx.dtype) * h
        if state is None:
            return y, None
        return y, self._after(state, ssm, k, v, real, index, layout)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        real: Tensor,
        index: Tensor | None,
        state: SeqBoatState | None,
        layout: Layout,
    ) -> Tensor:
        """Values that active tokens read, (b, a, d_hidden), of those of this call and those held."""
        place = torch.arange(k.shape[1], device=k.device)
        distance = place[:, None] - place  # how many active tokens the key is before the query
        seen = (distance.abs() <= self.window) & real[:, None]
        if self.causal:
            seen = seen & (distance >= 0)
        if index is not None:
            seen = seen & (index[..., None] == index[:, None])
        if state is not None:
            slot = torch.arange(self.window, device=k.device)
            before = place[:, None] + self.window - slot
            held = slot >= self.window - layout.restart(state.count)[:, None]
            old = (before <= self.window) & held[:, None]
            if index is not None and layout.index is not None:
                old = old & (index == layout.index[:, :1])[..., None]
            seen, distance = torch.cat([old, seen], dim=-1), torch.cat([before, distance], dim=-1)
            k = torch.cat([state.k.to(k.dtype), k], dim=1)
            v = torch.cat([state.v.to(v.dtype), v], dim=1)
        offset = 0 if self.causal else self.window
        bias = wide(self.distance_bias)[(distance + offset).clamp(0, self.distance_bias.shape[0] - 1)]
        with torch.autocast(k.device.type, enabled=False):
            pairs = wide(q) @ wide(k).mT
            if self.activation == "softmax":
                logits = pairs * self.qk_dim**-0.5 + bias
                weights = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1)
            else:
                span = self.window if self.causal else 2 * self.window
                weights = (pairs / span + bias).relu().square() * seen
            return weights @ wide(v)

    def _after(
        self,
        state: SeqBoatState,
        ssm: Tensor,
        k: Tensor,
        v: Tensor,
        real: Tensor,
        index: Tensor | None,
        layout: Layout,
    ) -> SeqBoatState:
        """The state with the last active tokens of each row's last sequence."""
        old = layout.restart(state.count)
        if index is not None and layout.index is not None:
            last = layout.index[:, -1:]
            old = torch.where(last[:, 0] == layout.index[:, 0], old, torch.zeros_like(old))
            fresh = (real & (index == last)).sum(1)
        else:
            fresh = real.sum(1)
        count = (old + fresh).clamp(max=self.window)
        # Of [held, new] the window that ends with the last active token.
        slot = torch.arange(self.window, device=k.device)
        source = slot + real.sum(1)[:, None]
        kept = (slot >= self.window - count[:, None])[..., None]

        def moved(held: Tensor, new: Tensor) -> Tensor:
            both = torch.cat([held.to(new.dtype), new], dim=1)
            both = both.gather(1, source[..., None].expand(-1, -1, new.shape[2]))
            return torch.where(kept, both, torch.zeros_like(both))

        return SeqBoatState(ssm, moved(state.k, k), moved(state.v, v), count)
