"""H3: a product of queries with a state-space memory of keys times values, the keys shifted in time first.

    k'_t = sum_{i<n} shift_C_i k_{t-i} + shift_D k_t                        per channel
    s = K * (k'_i v_j) + D k'_i v_j,    K of a diagonal model, per head     for all channels i, j of a head
    y_j = sum_i q_i s_ij;    output = out_proj(y)

Fu, Dao, Saab, Thomas, Rudra & Ré (2022), "Hungry Hungry Hippos: Towards Language Modeling with State Space Models".
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...kernels import fft_conv
from ..init import no_weight_decay
from .common import (
    Layout,
    MixerState,
    MixingMatrix,
    Mode,
    check_heads,
    check_input,
    check_state,
    lay_out,
    linear_flops,
    mixer_state,
    recurrence_dtype,
    total_flops,
    wide,
)
from .s4 import S4DInit, _absorb, _initial, _last_sequence, _powers, discretize


@mixer_state
class H3State(MixerState):
    """State of `H3`.

    Attributes:
        shift: The n - 1 keys before the next position, oldest first, (b, d, n - 1).
        ssm: Complex states of all products of a head as pairs of real numbers, (b, h * e * e, n / 2, 2), float32.
    """

    shift: Tensor
    ssm: Tensor

    recurrent: ClassVar[tuple[str, ...]] = ("ssm",)


class H3(nn.Module):
    """Causal sequence mixer (b, l, d) -> (b, l, d).

    Args:
        d_model: Width d.
        d_state: Taps n of the shift, and states of the diagonal model, even.
        headdim: Channels e of a head; a head keeps e * e products.
        init: Frequencies of the diagonal model, as for `S4D`.
        dt_min: Shortest initial step.
        dt_max: Longest initial step.
        device: Where to create the parameters.
        dtype: Floating dtype of the projections; the parameters of the recurrence are at least float32.

    Raises:
        ValueError: if an option has an unknown value or sizes do not fit together.
    """

    causal: ClassVar[bool] = True
    linear_in_x: ClassVar[bool] = True
    varlen: ClassVar[bool] = True
    state_type: ClassVar[type[MixerState]] = H3State

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        headdim: int = 1,
        init: S4DInit = "lin",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_state < 2 or d_state % 2:
            raise ValueError(f"`d_state` must be even and at least 2 (conjugate pairs), got {d_state}.")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"Steps need 0 < dt_min <= dt_max, got dt_min={dt_min}, dt_max={dt_max}.")
        self.d_model, self.d_state, self.headdim = d_model, d_state, headdim
        self.nheads = heads = check_heads(d_model, headdim, 1, d_state)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        real: dict[str, Any] = {"device": device, "dtype": recurrence_dtype(dtype)}
        A, B = _initial(init, d_state)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_model, **factory) for _ in range(3))
        self.shift_C = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(d_model, d_state, **real), a=math.sqrt(5)))
        self.shift_D = nn.Parameter(torch.randn(d_model, **real))
        dt = torch.empty(heads, 1, **real).uniform_(math.log(dt_min), math.log(dt_max))
        self.inv_dt = nn.Parameter(dt)  # log dt
        self.A_real = nn.Parameter((-A.real).log().to(**real).repeat(heads, 1))  # A = -exp(A_real) + i A_imag
        self.A_imag = nn.Parameter(A.imag.to(**real).repeat(heads, 1))
        self.B = nn.Parameter(torch.view_as_real(B).to(**real).repeat(heads, 1, 1))
        self.C = nn.Parameter(torch.randn(heads, d_state // 2, 2, **real) * math.sqrt(0.5))
        self.D = nn.Parameter(torch.randn(heads, **real))
        self.out_proj = nn.Linear(d_model, d_model, **factory)
        no_weight_decay(*(self.get_parameter(name) for name in self.lr_names()))

    def lr_names(self) -> tuple[str, ...]:
        """Parameters with their own learning rate and no weight decay."""
        return ("inv_dt", "A_real", "A_imag", "B")

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return (*self.lr_names(), "D", "shift_D")

    def forward(self, x: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Mix whole sequences, see `prefill`."""
        return self.prefill(x, mask=mask, seq_idx=seq_idx)[0]

    def prefill(
        self,
        x: Tensor,
        state: H3State | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, H3State]:
        """Mix whole sequences, going on from a state.

        Args:
            x: (b, l, d).
            state: Of the positions before; None: none.
            mask: True at real tokens, (b, l); contiguous in each row.
            seq_idx: Numbers of packed sequences, (b, l); the state belongs to the first.
            reset: True where the state is dropped first, (b, l).

        Returns:
            (b, l, d), zero at padding, and the state after the last real token.

        Raises:
            ValueError: if a shape is wrong or a mask has holes.
            TypeError: if the state is of another kind.
        """
        check_input(x, self.d_model)
        layout = lay_out(x, mask, seq_idx, reset)
        projected = self._project(layout.align(x), layout)
        y, state = self._mix(*projected, state, layout)
        return layout.restore(self._out(y)), state

    def step(self, x: Tensor, state: H3State) -> tuple[Tensor, H3State]:
        """One position, (b, d).

        Raises:
            ValueError: if a shape is wrong or the state does not fit.
            TypeError: if the state is of another kind.
        """
        check_input(x, self.d_model, "b")
        check_state(state, H3State, self._shapes(x.shape[0]), x.device)
        q, k, v = (part[:, 0] for part in self._project(x[:, None], Layout()))
        window = torch.cat([state.shift.to(k.dtype), k[..., None]], dim=-1)
        shifted = (wide(window).flip(-1) * wide(self.shift_C)).sum(-1) + wide(self.shift_D) * wide(k)
        kv = self._products(shifted, wide(v))
        log_A, B, C = self._discrete()
        h = torch.view_as_complex(state.ssm) * log_A.exp().to(B.dtype) + B * kv[..., None]
        s = 2 * (C * h).real.sum(-1) + self._skip() * kv
        y = self._read(wide(q), s)
        return self._out(y.to(q.dtype)), H3State(window[..., 1:], torch.view_as_real(h))

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> H3State:
        """State before the first position; `dtype` is that of the activations."""
        device, dtype = device or self.D.device, dtype or self.out_proj.weight.dtype
        shapes = self._shapes(batch)
        return H3State(
            torch.zeros(shapes["shift"], device=device, dtype=dtype),
            torch.zeros(shapes["ssm"], device=device, dtype=recurrence_dtype(dtype)),
        )

    def mixing_matrix(self, x: Tensor, *, state: H3State | None = None) -> MixingMatrix:
        """q_t.k'_s K_{t-s} for s <= t, plus q_t.k'_t D on the diagonal: per head, (b, h, l, l), on values."""
        check_input(x, self.d_model)
        length = x.shape[1]
        q, k, v = self._project(x, Layout())
        start = self._start(x, k, state)
        shifted = wide(self._shift(k, start.shift, Layout())[0])
        log_A, B, C = self._discrete()
        each = self.headdim**2
        kernel = _powers(C * B, log_A, length)[::each]
        lag = torch.arange(length, device=x.device)
        lag = lag[:, None] - lag
        toeplitz = torch.where(lag >= 0, kernel[:, lag.clamp(min=0)], 0.0)
        toeplitz = toeplitz + torch.diag_embed(wide(self.D)[:, None].expand(-1, length))
        queries, keys = (self._heads(wide(part)).movedim(1, 2) for part in (q, shifted))
        y, _ = self._mix(q, k, v, state, Layout())
        from_state = None
        if state is not None:
            h = torch.view_as_complex(state.ssm)
            from_state = self._read(wide(q), _powers(C * h * log_A.exp().to(h.dtype), log_A, length).mT)
        return MixingMatrix((queries @ keys.mT) * toeplitz, self._heads(wide(v)), wide(y), from_state)

    def flops(self, l: int, *, mode: Mode = "prefill") -> int:  # noqa: E741
        """Operations of one sequence of length l ("train", "prefill") or of one position ("decode").

        An FFT of n real numbers counts 2.5 n log2 n.
        """
        d, n, products = self.d_model, self.d_state, self.d_model * self.headdim
        projections = linear_flops(self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        if mode == "decode":
            return projections + 2 * n * d + products * (7 * n + 5)
        logs = math.ceil(math.log2(max(2 * l, 2)))
        parts = {"projections": l * projections, "fft": 15 * l * logs * (d + products), "products": 11 * l * products}
        return total_flops(parts | {"kernel": 2 * n * l * self.nheads}, mode)

    def state_numel(self) -> int:
        """Numbers in the state of one sequence."""
        return self.d_model * (self.d_state - 1) + self.d_model * self.headdim * self.d_state

    def _shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        products = self.nheads * self.headdim**2
        return {"shift": (batch, self.d_model, self.d_state - 1), "ssm": (batch, products, self.d_state // 2, 2)}

    def _start(self, x: Tensor, k: Tensor, state: H3State | None) -> H3State:
        if state is None:
            made = self.init_state(x.shape[0], device=x.device, dtype=k.dtype)
            return H3State(made.shift, made.ssm.to(torch.promote_types(made.ssm.dtype, self.D.dtype)))
        check_state(state, H3State, self._shapes(x.shape[0]), x.device)
        return state

    def _project(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (b, l, d); nothing enters at padding."""
        return self.q_proj(x), layout.zero_padding(self.k_proj(x)), layout.zero_padding(self.v_proj(x))

    def _discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """log A_, B_ and C of every product, (h * e * e, n / 2)."""
        double = torch.float32 if self.D.device.type == "mps" else torch.float64
        narrow = torch.complex128 if wide(self.D).dtype == torch.float64 else torch.complex64
        A = torch.complex(-self.A_real.to(double).exp(), self.A_imag.to(double))
        dt = self.inv_dt.to(double).exp()
        log_A, B = discretize(dt, A, torch.view_as_complex(self.B.to(double)))
        parts = log_A, B.to(narrow), torch.view_as_complex(wide(self.C))
        each = self.headdim**2
        log_A, B, C = (part.repeat_interleave(each, dim=0) for part in parts)
        return log_A, B, C

    def _skip(self) -> Tensor:
        return wide(self.D).repeat_interleave(self.headdim**2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.nheads, self.headdim))

    def _products(self, k: Tensor, v: Tensor) -> Tensor:
        """k_i v_j of every head, (..., h * e * e)."""
        return (self._heads(k)[..., None] * self._heads(v)[..., None, :]).flatten(-3)

    def _read(self, q: Tensor, s: Tensor) -> Tensor:
        """sum_i q_i s_ij: (..., d) and (..., h * e * e) -> (..., h, e)."""
        s = s.unflatten(-1, (self.nheads, self.headdim, self.headdim))
        return (self._heads(q)[..., None] * s).sum(-2)

    def _shift(self, k: Tensor, state: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Shifted keys, and the last n - 1 keys of each row's last sequence."""
        state = state.to(k.dtype)
        y, last = fft_conv(k, wide(self.shift_C), wide(self.shift_D), state, seq_idx=layout.index)
        if layout.count is None:
            return y, last
        window = layout.count[:, None] + torch.arange(state.shape[2], device=k.device)
        found = torch.cat([state.mT, k], dim=1).gather(1, window[..., None].expand(-1, -1, k.shape[2]))
        if layout.index is not None:
            index = torch.cat([layout.index[:, :1].expand(-1, state.shape[2]), layout.index], dim=1).gather(1, window)
            same = index == layout.index[:, -1:]
            found = torch.where(same[..., None], found, torch.zeros_like(found))
        return y, found.mT

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, state: H3State | None, layout: Layout) -> tuple[Tensor, H3State]:
        """Outputs before the last projection (b, l, h, e) in the dtype of q, and the last state."""
        start = self._start(q, k, state)
        length = q.shape[1]
        shifted, keys = self._shift(k, layout.restart(start.shift), layout)
        kv = self._products(layout.zero_padding(wide(shifted)), wide(v))
        log_A, B, C = self._discrete()
        kernel = _powers(C * B, log_A, length + 1 if torch.compiler.is_compiling() else max(length, 1))
        s, _ = fft_conv(kv, kernel, self._skip(), seq_idx=layout.index)
        before = layout.restart(torch.view_as_complex(start.ssm))
        if state is not None:
            response = _powers(C * before * log_A.exp().to(before.dtype), log_A, length).mT
            if layout.index is not None:
                first = (layout.index == layout.index[:, :1])[..., None]
                response = torch.where(first, response, torch.zeros_like(response))
            s = s + response
        count = length if layout.count is None else layout.count[:, None, None]
        kept = before * (log_A * count).exp().to(before.dtype)
        if layout.index is not None:
            same = layout.index[:, -1] == layout.index[:, 0]
            kept = torch.where(same[:, None, None], kept, torch.zeros_like(kept))
        h = kept + _absorb(_last_sequence(kv, layout), log_A, length) * B
        return self._read(wide(q), s).to(q.dtype), H3State(keys, torch.view_as_real(h))

    def _out(self, y: Tensor) -> Tensor:
        """The published layout in front of the last projection has the channel of a head outside."""
        return self.out_proj(y.mT.flatten(-2))
