"""S4D: a diagonal, time-invariant state-space model per channel, then a gated linear map across channels.

    h' = A h + B u,   y = 2 Re C h + D u          n / 2 complex states per channel, one of each conjugate pair
    zoh:       A_ = e^{dt A},                       B_ = (A_ - 1) / A B
    bilinear:  A_ = (1 + dt A/2) / (1 - dt A/2),    B_ = dt / (1 - dt A/2) B
    K_t = 2 Re sum_n C_n A_n^t B_n;   z = gelu(K * u + D u);   output = glu(out_proj(z))

Gu, Gupta, Goel & Ré (2022), "On the Parameterization and Initialization of Diagonal State Space Models". Sequences are
convolved by FFT, steps run the recurrence.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import fft_conv
from ..hippo import normal_form
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
    require_causal,
    require_state,
    total_flops,
    wide,
)

S4DInit = Literal["lin", "inv", "inv2", "quad", "legs", "real", "rand"]
Discretization = Literal["zoh", "bilinear"]


@mixer_state
class S4DState(MixerState):
    """State of `S4D`.

    Attributes:
        ssm: Complex states as pairs of real numbers, (b, d, n / 2, 2), float32.
    """

    ssm: Tensor

    recurrent: ClassVar[tuple[str, ...]] = ("ssm",)


class S4D(nn.Module):
    """Sequence mixer with constant diagonal dynamics, causal or two-sided.

    Args:
        d_model: Width d.
        d_state: States n per channel, even; n / 2 complex ones are kept.
        n_ssm: How many sets of A and B the channels share; must divide d_model. None: one per channel.
        init: Frequencies: "lin", "inv", "inv2", "quad", "legs", "real" (none) or "rand".
        discretization: "zoh" or "bilinear".
        bidirectional: Add a second kernel that looks ahead; there is no state then.
        length: Cut the kernels after so many positions; only two-sided, since a recurrence has no cut. None: no cut.
        rate: Factor of all steps: a model trained at one sampling rate runs at another, 0.5 for twice as many samples.
        dt_min: Shortest initial step.
        dt_max: Longest initial step.
        dropout: Dropout between activation and output map.
        device: Where to create the parameters.
        dtype: Floating dtype of the output map; the parameters of the recurrence are at least float32.

    Raises:
        ValueError: if an option has an unknown value or a size is out of range.
    """

    linear_in_x: ClassVar[bool] = True
    varlen: ClassVar[bool] = True
    state_type: ClassVar[type[MixerState]] = S4DState

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        n_ssm: int | None = None,
        init: S4DInit = "lin",
        discretization: Discretization = "zoh",
        bidirectional: bool = False,
        length: int | None = None,
        rate: float = 1.0,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        groups = n_ssm or d_model
        if d_model < 1 or d_model % groups:
            raise ValueError(f"`n_ssm` must divide d_model={d_model}, got {groups}.")
        if d_state < 2 or d_state % 2:
            raise ValueError(f"`d_state` must be even and at least 2 (conjugate pairs), got {d_state}.")
        if discretization not in get_args(Discretization):
            raise ValueError(f"`discretization` must be 'zoh' or 'bilinear', got {discretization!r}.")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"Steps need 0 < dt_min <= dt_max, got dt_min={dt_min}, dt_max={dt_max}.")
        if rate <= 0:
            raise ValueError(f"`rate` must be positive, got {rate}.")
        if length is not None and (length < 1 or not bidirectional):
            raise ValueError(
                f"`length` must be at least 1 and needs bidirectional=True, got length={length}, "
                f"bidirectional={bidirectional}; the state of a causal model forgets by its decay alone."
            )
        self.d_model, self.d_state, self.length, self.rate = d_model, d_state, length, rate
        self.causal = not bidirectional
        self.discretization = discretization
        half = d_state // 2
        real: dict[str, Any] = {"device": device, "dtype": recurrence_dtype(dtype)}
        A, B = _initial(init, d_state)
        dt = torch.empty(d_model, 1, **real).uniform_(math.log(dt_min), math.log(dt_max))
        self.inv_dt = nn.Parameter(dt)  # log dt
        self.A_real = nn.Parameter((-A.real).log().to(**real).repeat(groups, 1))  # A = -exp(A_real) + i A_imag
        self.A_imag = nn.Parameter(A.imag.to(**real).repeat(groups, 1))
        self.B = nn.Parameter(torch.view_as_real(B).to(**real).repeat(1, groups, 1, 1))
        # Complex normal numbers of variance 1; the second kernel of a two-sided mixer looks ahead.
        self.C = nn.Parameter(torch.randn(2 if bidirectional else 1, d_model, half, 2, **real) * math.sqrt(0.5))
        self.D = nn.Parameter(torch.randn(d_model, **real))
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(d_model, 2 * d_model, device=device, dtype=dtype)
        no_weight_decay(*(self.get_parameter(name) for name in self.lr_names()))

    def lr_names(self) -> tuple[str, ...]:
        """Parameters with their own learning rate and no weight decay."""
        return ("inv_dt", "A_real", "A_imag", "B")

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return (*self.lr_names(), "D")

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
        u = layout.zero_padding(layout.align(x))
        return layout.restore(self._out(self._convolve(u, layout)))

    def prefill(
        self,
        x: Tensor,
        state: S4DState | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, S4DState]:
        """Like `forward`, going on from a state.

        Args:
            x: (b, l, d).
            state: Of the positions before; None: none.
            mask: True at real tokens, (b, l).
            seq_idx: Numbers of packed sequences, (b, l); the state belongs to the first.
            reset: True where the state is dropped first, (b, l).

        Returns:
            (b, l, d), and the state after the last real token.

        Raises:
            TypeError: if the mixer is two-sided or the state of another kind.
        """
        require_causal(self)
        check_input(x, self.d_model)
        layout = lay_out(x, mask, seq_idx, reset)
        u = layout.zero_padding(layout.align(x))
        y = self._convolve(u, layout)
        h = torch.view_as_complex(self._state(x, state).ssm)
        log_A, B, C = self._discrete()
        start = layout.restart(h)
        if state is not None:
            y = y + self._from_state(start, log_A, C, layout, x.shape[1]).to(y.dtype)
        h = _absorb(_last_sequence(wide(u), layout), log_A, x.shape[1]) * B
        count = x.shape[1] if layout.count is None else layout.count[:, None, None]
        kept = start * (log_A * count).exp().to(start.dtype)
        if layout.index is not None and x.shape[1]:
            same = layout.index[:, -1] == layout.index[:, 0]
            kept = torch.where(same[:, None, None], kept, torch.zeros_like(kept))
        return layout.restore(self._out(y)), S4DState(torch.view_as_real(kept + h))

    def step(self, x: Tensor, state: S4DState) -> tuple[Tensor, S4DState]:
        """One position, (b, d).

        Raises:
            ValueError: if a shape is wrong or the state does not fit.
            TypeError: if the mixer is two-sided or the state of another kind.
        """
        require_causal(self)
        check_input(x, self.d_model, "b")
        require_state(state, S4DState)
        log_A, B, C = self._discrete()
        u = wide(x)
        h = torch.view_as_complex(self._state(x, state).ssm) * log_A.exp().to(B.dtype) + B * u[..., None]
        y = 2 * (C[0] * h).real.sum(-1) + wide(self.D) * u
        return self._out(y.to(x.dtype)), S4DState(torch.view_as_real(h))

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> S4DState:
        """State before the first position; `dtype` is that of the activations."""
        require_causal(self)
        shape = (batch, self.d_model, self.d_state // 2, 2)
        dtype = recurrence_dtype(dtype or self.out_proj.weight.dtype)
        return S4DState(torch.zeros(shape, device=device or self.D.device, dtype=dtype))

    def mixing_matrix(self, x: Tensor, *, state: S4DState | None = None) -> MixingMatrix:
        """The Toeplitz matrix of every channel, (1, d, l, l), before activation and output map."""
        check_input(x, self.d_model)
        length = x.shape[1]
        behind, ahead = self._kernels(length)
        lag = torch.arange(length, device=x.device)
        lag = lag[:, None] - lag
        matrix = torch.where(lag >= 0, behind[:, lag.clamp(min=0)], 0.0)
        if ahead is not None:
            matrix = matrix + torch.where(lag < 0, ahead[:, (-lag - 1).clamp(min=0)], 0.0)
        matrix = matrix + torch.diag_embed(wide(self.D)[:, None].expand(-1, length))
        y, from_state = wide(self._convolve(x, Layout())), None
        if state is not None:
            require_causal(self)
            log_A, _, C = self._discrete()
            h = torch.view_as_complex(self._state(x, state).ssm)
            from_state = self._from_state(h, log_A, C, Layout(), length)[..., None]
            y = y + from_state[..., 0]
        return MixingMatrix(matrix[None], wide(x)[..., None], y[..., None], from_state)

    def flops(self, l: int, *, mode: Mode = "prefill") -> int:  # noqa: E741
        """Operations of one sequence of length l ("train", "prefill") or of one position ("decode").

        An FFT of n real numbers counts 2.5 n log2 n.
        """
        d, half = self.d_model, self.d_state // 2
        if mode == "decode":
            return linear_flops(self.out_proj) + d * (14 * half + 2)
        sides = 1 if self.causal else 2
        transforms = (2 + sides) * 5 * l * math.ceil(math.log2(max(2 * l, 1))) * d
        parts = {"out_proj": l * linear_flops(self.out_proj), "fft": transforms, "kernel": sides * 4 * half * l * d}
        return total_flops(parts | {"products": 8 * l * d}, mode)

    def state_numel(self) -> int:
        """Real numbers in the state of one sequence."""
        return self.d_model * self.d_state if self.causal else 0

    def _state(self, x: Tensor, state: S4DState | None) -> S4DState:
        if state is None:
            return self.init_state(x.shape[0], device=x.device, dtype=torch.promote_types(x.dtype, self.D.dtype))
        shape = (x.shape[0], self.d_model, self.d_state // 2, 2)
        check_state(state, S4DState, {"ssm": shape}, x.device)
        return state

    def _discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """log A_ (d, n/2) in double precision, B_ (d, n/2) and C (channels, d, n/2) in that of the parameters."""
        narrow = torch.complex128 if wide(self.D).dtype == torch.float64 else torch.complex64
        # Powers up to the sequence length multiply the error of the phase, so the exponents are double.
        double = torch.float32 if self.D.device.type == "mps" else torch.float64
        repeats = self.d_model // self.A_real.shape[0]
        A = torch.complex(-self.A_real.to(double).exp(), self.A_imag.to(double)).repeat(repeats, 1)
        B = torch.view_as_complex(self.B[0].to(double)).repeat(repeats, 1)
        dt = self.inv_dt.to(double).exp() * self.rate
        log_A, B = discretize(dt, A, B, self.discretization)
        return log_A, B.to(narrow), torch.view_as_complex(wide(self.C)).to(narrow)

    def _kernels(self, length: int) -> tuple[Tensor, Tensor | None]:
        """Impulse responses (d, l) to the past and, two-sided, to the future."""
        log_A, B, C = self._discrete()
        kernels = _powers(C * B, log_A, length)
        if self.length is not None:  # on the matrix as in the convolution
            kernels = torch.where(torch.arange(length, device=kernels.device) < self.length, kernels, 0.0)
        return kernels[0], None if self.causal else kernels[1]

    def _convolve(self, u: Tensor, layout: Layout) -> Tensor:
        if self.length is not None:
            length = self.length
        elif torch.compiler.is_compiling():
            length = u.shape[1] + 1  # with l - 1 entries in its state the convolution would not export for l = 2
        else:
            length = max(u.shape[1], 1)
        behind, ahead = self._kernels(length)
        return fft_conv(u, behind, wide(self.D), kernel_ahead=ahead, seq_idx=layout.index)[0]

    def _from_state(self, h: Tensor, log_A: Tensor, C: Tensor, layout: Layout, length: int) -> Tensor:
        """What the state (b, d, n/2) adds to the outputs of the rows' first sequences, (b, l, d)."""
        y = _powers(C[0] * h * log_A.exp().to(h.dtype), log_A, length).mT
        if layout.index is None or not length:
            return y
        return torch.where((layout.index == layout.index[:, :1])[..., None], y, torch.zeros_like(y))

    def _out(self, y: Tensor) -> Tensor:
        return F.glu(self.out_proj(self.dropout(F.gelu(y))), dim=-1)


def discretize(dt: Tensor, A: Tensor, B: Tensor, rule: Discretization = "zoh") -> tuple[Tensor, Tensor]:
    """One step of h' = A h + B u with diagonal A.

    Args:
        dt: Step, broadcast against `A`.
        A: Eigenvalues with negative real part, complex.
        B: Input map, complex.
        rule: "zoh" (exact for an input that is constant in each step) or "bilinear".

    Returns:
        The logarithm of the factor of h, and the factor of u.

    Source: Gu, Gupta, Goel & Ré (2022), equation (3).
    """
    z = dt * A
    if rule == "zoh":
        return z, B * (z.exp() - 1) / A
    return (1 + z / 2).log() - (1 - z / 2).log(), B * dt / (1 - z / 2)


def _initial(init: str, d_state: int) -> tuple[Tensor, Tensor]:
    """A and B of one channel, (n / 2,) complex128."""
    n = torch.arange(d_state // 2, dtype=torch.float64)
    real, B = torch.full_like(n, -0.5), torch.ones(d_state // 2, dtype=torch.complex128)
    match init:
        case "lin":
            imag = math.pi * n
        case "inv":
            imag = d_state / math.pi * (d_state / (2 * n + 1) - 1)
        case "inv2":
            imag = d_state / math.pi * (d_state / (n + 1) - 1)
        case "quad":
            imag = (1 + 2 * n) ** 2 / math.pi
        case "real":
            real, imag = -(n + 1), torch.zeros_like(n)
        case "rand":
            imag = torch.randn_like(n).exp()
        case "legs":
            form = normal_form("legs", d_state)
            imag, B = form.Lambda.imag, torch.complex(form.B.real, form.B.imag.clamp(-2, 2))
        case _:
            raise ValueError(f"`init` must be one of {', '.join(map(repr, get_args(S4DInit)))}, got {init!r}.")
    return torch.complex(real, imag), B


def _block(length: int) -> int:
    """Positions per block: powers within and between blocks are tabled apart, about sqrt(l) of each."""
    return 1 << (length.bit_length() + 1) // 2


def _powers(coefficients: Tensor, log_A: Tensor, length: int) -> Tensor:
    """2 Re sum_n coefficients_n A_n^t for t < l: (..., d, n) -> (..., d, l)."""
    with torch.autocast(log_A.device.type, enabled=False):
        if torch.compiler.is_compiling():  # one table, since blocks would tie the code to some lengths
            table = (log_A[..., None] * torch.arange(length, device=log_A.device)).exp().to(coefficients.dtype)
            return 2 * (coefficients[..., None, :] @ table).real[..., 0, :]
        block = _block(length)
        places = torch.arange(block, device=log_A.device)
        blocks = torch.arange(-(-length // block), device=log_A.device) * block
        inner = (log_A[..., None] * places).exp().to(coefficients.dtype)  # (d, n, block)
        outer = coefficients[..., None] * (log_A[..., None] * blocks).exp().to(coefficients.dtype)  # (..., d, n, count)
        left = torch.cat([outer.real, -outer.imag], dim=-2)
        right = torch.cat([inner.real, inner.imag], dim=-2)
        return 2 * (left.mT @ right).flatten(-2)[..., :length]


def _absorb(u: Tensor, log_A: Tensor, length: int) -> Tensor:
    """sum_t A^{l-1-t} u_t: (b, l, d) real -> (b, d, n) complex."""
    with torch.autocast(log_A.device.type, enabled=False):
        block = length if torch.compiler.is_compiling() else _block(length)
        places = torch.arange(block, device=log_A.device)
        inner = (log_A[..., None] * (block - 1 - places)).exp()  # (d, n, block)
        right = torch.cat([inner.real, inner.imag], dim=1).to(u.dtype)
        if torch.compiler.is_compiling():
            return torch.complex(*torch.einsum("bqd,dnq->bdn", u, right).chunk(2, dim=-1))
        count = -(-length // block)
        u = F.pad(u, (0, 0, count * block - length, 0)).unflatten(1, (count, block))  # (b, count, block, d)
        sums = torch.complex(*torch.einsum("bcqd,dnq->bcdn", u, right).chunk(2, dim=-1))
        blocks = (count - 1 - torch.arange(count, device=log_A.device)) * block
        outer = (log_A * blocks[:, None, None]).exp().to(sums.dtype)  # (count, d, n)
        return (sums * outer).sum(1)


def _last_sequence(u: Tensor, layout: Layout) -> Tensor:
    """Inputs of each row's last sequence, moved to the end of the row, zeros elsewhere."""
    if layout.index is not None and u.shape[1]:
        u = torch.where((layout.index == layout.index[:, -1:])[..., None], u, torch.zeros_like(u))
    if layout.count is None:
        return u
    source = torch.arange(u.shape[1], device=u.device) - (u.shape[1] - layout.count[:, None])
    moved = u.gather(1, source.clamp(min=0)[..., None].expand_as(u))
    return torch.where((source >= 0)[..., None], moved, torch.zeros_like(u))
