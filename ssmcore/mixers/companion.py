"""Companion: a time-invariant state-space model per channel whose state matrix is a companion matrix.

    h_t = A h_{t-1} + B u_t,   y_t = C h_t + D u_t,   A = S + a e_n^T    (S shifts down by one, e_n is a unit vector)
    z = gelu(y);   output = out_proj(z)

The last column `a` holds the coefficients of an autoregression: one of order p <= n is represented exactly. It is
divided by the sum of its absolute values. All column sums of absolute values are then 1: states stay bounded.
Zhang, Saab, Poli, Dao, Goel & Ré (2023), "Effectively Modeling Time Series with Simple Discrete State Spaces".
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import fft_conv
from ..init import no_weight_decay
from .common import (
    Layout,
    MixerState,
    MixingMatrix,
    Mode,
    check_input,
    check_state,
    lay_out,
    linear_flops,
    mixer_state,
    recurrence_dtype,
    require_state,
    total_flops,
    wide,
)
from .s4 import _last_sequence

_EXPORT_BITS = 24  # of the length that an exported program takes


@mixer_state
class CompanionState(MixerState):
    """State of `Companion`.

    Attributes:
        ssm: (b, d, n), float32.
    """

    ssm: Tensor

    recurrent: ClassVar[tuple[str, ...]] = ("ssm",)


class Companion(nn.Module):
    """Causal sequence mixer (b, l, d) -> (b, l, d) with companion matrices.

    Args:
        d_model: Width d.
        d_state: States n per channel, the longest autoregression.
        dropout: Dropout before the output map.
        device: Where to create the parameters.
        dtype: Floating dtype of the output map; the parameters of the recurrence are at least float32.

    Raises:
        ValueError: if a size is out of range.
    """

    causal: ClassVar[bool] = True
    linear_in_x: ClassVar[bool] = True
    # Rounding of the FFT reaches earlier outputs; gradients "from the future" are this small, relative to the others.
    future_rounding: ClassVar[float] = 1e-5
    varlen: ClassVar[bool] = True
    state_type: ClassVar[type[MixerState]] = CompanionState

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("d_model", d_model), ("d_state", d_state)):
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        self.d_model, self.d_state = d_model, d_state
        real: dict[str, Any] = {"device": device, "dtype": recurrence_dtype(dtype)}
        self.a = nn.Parameter(torch.randn(d_model, d_state, **real))
        self.B = nn.Parameter(torch.randn(d_model, d_state, **real))
        self.C = nn.Parameter(torch.randn(d_model, d_state, **real))
        self.D = nn.Parameter(torch.randn(d_model, **real))
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(d_model, d_model, device=device, dtype=dtype)
        no_weight_decay(*(self.get_parameter(name) for name in self.no_decay_names()))

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("a", "B", "D")

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """A (d, n, n), B (d, n) and C (d, n) as the recurrence uses them: `a` and B have 1-norm 1."""
        return companion_matrix(unit_norm(wide(self.a))), unit_norm(wide(self.B)), wide(self.C)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Mix whole sequences.

        Args:
            x: (b, l, d).
            mask: True at real tokens, (b, l); contiguous in each row.
            seq_idx: Numbers of packed sequences, (b, l), not decreasing.

        Returns:
            (b, l, d), zero at padding.
        """
        check_input(x, self.d_model)
        layout = lay_out(x, mask, seq_idx)
        return layout.restore(self._out(self._convolve(layout.zero_padding(layout.align(x)), layout)))

    def prefill(
        self,
        x: Tensor,
        state: CompanionState | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, CompanionState]:
        """Like `forward`, going on from a state.

        Args:
            x: (b, l, d).
            state: Of the positions before; None: none.
            mask: True at real tokens, (b, l).
            seq_idx: Numbers of packed sequences, (b, l); the state belongs to the first.
            reset: True where the state is dropped first, (b, l).

        Returns:
            (b, l, d), and the state after the last real token.
        """
        check_input(x, self.d_model)
        layout = lay_out(x, mask, seq_idx, reset)
        u, length = layout.zero_padding(layout.align(x)), x.shape[1]
        y = self._convolve(u, layout)
        A, B, C = self.system()
        start = layout.restart(self._state(x, state).ssm)
        if state is not None:
            y = y + _from_state(start, A, C, layout, length).to(y.dtype)
        with torch.autocast(x.device.type, enabled=False):
            tail = apply_powers(A, B.expand(length, *B.shape), torch.arange(length, device=x.device)).flip(0)
            absorbed = torch.einsum("bld,ldn->bdn", wide(_last_sequence(wide(u), layout)).to(A.dtype), tail)
        count = torch.full((len(x),), length, device=x.device) if layout.count is None else layout.count
        kept = apply_powers(A, start.to(A.dtype), count)
        if layout.index is not None and length:
            same = layout.index[:, -1] == layout.index[:, 0]
            kept = torch.where(same[:, None, None], kept, torch.zeros_like(kept))
        return layout.restore(self._out(y)), CompanionState((kept + absorbed).to(start.dtype))

    def step(self, x: Tensor, state: CompanionState) -> tuple[Tensor, CompanionState]:
        """One position.

        Args:
            x: (b, d).
            state: Of the positions before.

        Returns:
            (b, d), and the state after it.
        """
        check_input(x, self.d_model, "b")
        require_state(state, CompanionState)
        a, B, C = unit_norm(wide(self.a)), unit_norm(wide(self.B)), wide(self.C)
        h, u = self._state(x, state).ssm, wide(x)
        # A h without the matrix: the last entry times a, and all entries one place down.
        h = F.pad(h[..., :-1], (1, 0)) + a * h[..., -1:] + B * u[..., None]
        y = (C * h).sum(-1) + wide(self.D) * u
        return self._out(y.to(x.dtype)), CompanionState(h)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> CompanionState:
        """State before the first position; `dtype` is that of the activations."""
        dtype = recurrence_dtype(dtype or self.out_proj.weight.dtype)
        shape = (batch, self.d_model, self.d_state)
        return CompanionState(torch.zeros(shape, device=device or self.D.device, dtype=dtype))

    def mixing_matrix(self, x: Tensor, *, state: CompanionState | None = None) -> MixingMatrix:
        """The Toeplitz matrix of every channel, (1, d, l, l), before activation and output map."""
        check_input(x, self.d_model)
        length = x.shape[1]
        lag = torch.arange(length, device=x.device)
        lag = lag[:, None] - lag
        matrix = torch.where(lag >= 0, self.kernel(length)[:, lag.clamp(min=0)], 0.0)
        matrix = matrix + torch.diag_embed(wide(self.D)[:, None].expand(-1, length))
        y, from_state = wide(self._convolve(x, Layout())), None
        if state is not None:
            A, _, C = self.system()
            from_state = _from_state(self._state(x, state).ssm, A, C, Layout(), length)[..., None]
            y = y + from_state[..., 0]
        return MixingMatrix(matrix[None], wide(x)[..., None], y[..., None], from_state)

    def flops(self, l: int, *, mode: Mode = "prefill") -> int:  # noqa: E741
        """Operations of one sequence of length l ("train", "prefill") or of one position ("decode").

        An FFT of n real numbers counts 2.5 n log2 n; powers of A are applied by repeated squaring.
        """
        d, n = self.d_model, self.d_state
        if mode == "decode":
            return linear_flops(self.out_proj) + d * (6 * n + 2)
        bits = max(l, 1).bit_length()
        parts = {
            "out_proj": l * linear_flops(self.out_proj),
            "fft": 15 * l * bits * d,
            "kernel": bits * d * (2 * n**3 + 2 * l * n**2),
        }
        return total_flops(parts, mode)

    def state_numel(self) -> int:
        """Real numbers in the state of one sequence."""
        return self.d_model * self.d_state

    def extra_repr(self) -> str:
        """Shown by repr()."""
        return f"{self.d_model}, d_state={self.d_state}"

    def kernel(self, length: int) -> Tensor:
        """Impulse response C A^t B, (d, length)."""
        A, B, C = self.system()
        states = apply_powers(A, B.expand(length, *B.shape), torch.arange(length, device=A.device))
        return (C * states).sum(-1).mT

    def _convolve(self, u: Tensor, layout: Layout) -> Tensor:
        symbolic = torch.compiler.is_compiling()  # with l - 1 entries in its state it would not export for l = 2
        length = u.shape[1] + 1 if symbolic else max(u.shape[1], 1)
        return fft_conv(u, self.kernel(length), wide(self.D), seq_idx=layout.index)[0]

    def _state(self, x: Tensor, state: CompanionState | None) -> CompanionState:
        if state is None:
            return self.init_state(x.shape[0], device=x.device, dtype=torch.promote_types(x.dtype, self.D.dtype))
        check_state(state, CompanionState, {"ssm": (x.shape[0], self.d_model, self.d_state)}, x.device)
        return state

    def _out(self, y: Tensor) -> Tensor:
        return self.out_proj(self.dropout(F.gelu(y)).to(self.out_proj.weight.dtype))


class Shift(Companion):
    """Causal sequence mixer whose state is the last n inputs, read by learned taps: the companion form with a = 0.

        y_t = sum_{i < n} C_i u_{t-i} + D u_t;    z = gelu(y);    output = out_proj(z)

    Args:
        d_model: Width d.
        d_state: Taps n per channel.
        dropout: Dropout before the output map.
        device: Where to create the parameters.
        dtype: Floating dtype of the output map; the parameters of the recurrence are at least float32.

    Raises:
        ValueError: if a size is out of range.

    Source: Fu, Dao et al. (2023), "Hungry Hungry Hippos", section 3.1, where it remembers keys.
    """

    a: Tensor  # type: ignore[assignment]
    B: Tensor  # type: ignore[assignment]

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, d_state=d_state, dropout=dropout, device=device, dtype=dtype)
        fixed = torch.zeros_like(self.C.detach())
        del self.a, self.B
        self.register_buffer("a", fixed, persistent=False)
        self.register_buffer("B", torch.cat([torch.ones_like(fixed[:, :1]), fixed[:, 1:]], dim=1), persistent=False)
        with torch.no_grad():
            self.C.div_(d_state**0.5)  # outputs as large as inputs

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("D",)


def unit_norm(v: Tensor) -> Tensor:
    """v (..., n) divided by the sum of its absolute values."""
    return v / v.abs().sum(-1, keepdim=True).clamp(min=1e-12)


def companion_matrix(a: Tensor) -> Tensor:
    """Ones below the diagonal, and `a` added to the last column: (..., n) -> (..., n, n)."""
    n = a.shape[-1]
    shift = torch.diag(torch.ones(n - 1, dtype=a.dtype, device=a.device), -1)
    return shift + F.pad(a[..., None], (n - 1, 0))


def apply_powers(A: Tensor, v: Tensor, count: Tensor) -> Tensor:
    """A^count v by repeated squaring.

    Args:
        A: (d, n, n).
        v: (k, d, n).
        count: Exponents, (k,) integers of at least 0.

    Returns:
        (k, d, n).
    """
    with torch.autocast(A.device.type, enabled=False):
        symbolic = torch.compiler.is_compiling()
        bits = _EXPORT_BITS if symbolic else int(count.max()).bit_length() if count.numel() else 0
        for bit in range(bits):
            odd = (count[:, None, None] >> bit) % 2 == 1
            v = torch.where(odd, torch.einsum("dij,kdj->kdi", A, v), v)
            if bit + 1 < bits:
                A = A @ A
        return v


def _from_state(h: Tensor, A: Tensor, C: Tensor, layout: Layout, length: int) -> Tensor:
    """What the state (b, d, n) adds to the outputs of the rows' first sequences, (b, l, d): C A^{t+1} h."""
    count = torch.arange(1, length + 1, device=A.device)
    readouts = apply_powers(A.mT, C.expand(length, *C.shape), count)
    with torch.autocast(A.device.type, enabled=False):
        y = torch.einsum("ldn,bdn->bld", readouts, h.to(A.dtype))
    if layout.index is None or not length:
        return y
    return torch.where((layout.index == layout.index[:, :1])[..., None], y, torch.zeros_like(y))
