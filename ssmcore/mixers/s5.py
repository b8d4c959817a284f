"""S5: one time-invariant state-space model with many inputs and outputs, run as a parallel scan.

    h_t = exp(dt Lambda) h_{t-1} + (exp(dt Lambda) - 1) / Lambda B u_t,    y_t = 2 Re C h_t + D u_t
    g = gelu(y);    output = g * sigmoid(out_proj(g))

Smith, Warrington & Linderman (2022), "Simplified State Space Layers for Sequence Modeling". Resets inside the scan: Lu
et al. (2023), "Structured State Space Models for In-Context Reinforcement Learning".
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import linear_scan
from ..hippo import normal_form
from ..init import no_weight_decay
from .common import (
    Layout,
    MixerState,
    MixingMatrix,
    Mode,
    check_input,
    check_state,
    linear_flops,
    mixer_state,
    recurrence_dtype,
    require_causal,
    total_flops,
    wide,
)
from .rows import RowMixer
from .s4 import Discretization, discretize

S5Init = Literal["lecun", "complex_normal"]


@mixer_state
class S5State(MixerState):
    """State of `S5`.

    Attributes:
        ssm: Complex states as pairs of real numbers, (b, n / 2, 2), float32.
    """

    ssm: Tensor

    recurrent: ClassVar[tuple[str, ...]] = ("ssm",)


class S5(RowMixer):
    """Sequence mixer with constant diagonal dynamics that all channels share, causal or two-sided.

    Args:
        d_model: Width d.
        d_state: States n of the whole layer, even; n / 2 complex ones are kept.
        blocks: Number of equal HiPPO matrices on the diagonal of the initial A; 2 * blocks must divide d_state.
        C_init: "lecun" in the HiPPO basis or "complex_normal" in the eigenbasis.
        discretization: "zoh" or "bilinear".
        clip_eigs: Keep real parts of eigenvalues below -1e-4. Without it a state dict with unstable ones is refused.
        bidirectional: Add a second scan from the end; there is no state then.
        rate: Factor of all steps: a model trained at one sampling rate runs at another, 0.5 for twice as many samples.
        dt_min: Shortest initial step.
        dt_max: Longest initial step.
        device: Where to create the parameters.
        dtype: Floating dtype of the gate; the parameters of the recurrence are at least float32.

    Raises:
        ValueError: if an option has an unknown value or a size is out of range.
    """

    linear_in_x: ClassVar[bool] = True
    state_type: ClassVar[type[MixerState]] = S5State

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        blocks: int = 1,
        C_init: S5Init = "lecun",
        discretization: Discretization = "zoh",
        clip_eigs: bool = True,
        bidirectional: bool = False,
        rate: float = 1.0,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1 or d_state < 2 or blocks < 1 or d_state % (2 * blocks):
            raise ValueError(
                f"`d_state` must be a multiple of 2 * blocks={2 * blocks} (conjugate pairs), got {d_state}."
            )
        for name, value, known in (
            ("C_init", C_init, get_args(S5Init)),
            ("discretization", discretization, get_args(Discretization)),
        ):
            if value not in known:
                raise ValueError(f"`{name}` must be {' or '.join(map(repr, known))}, got {value!r}.")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"Steps need 0 < dt_min <= dt_max, got dt_min={dt_min}, dt_max={dt_max}.")
        if rate <= 0:
            raise ValueError(f"`rate` must be positive, got {rate}.")
        self.d_model, self.d_state, self.rate, self.clip_eigs = d_model, d_state, rate, clip_eigs
        self.causal, self.discretization = not bidirectional, discretization
        real: dict[str, Any] = {"device": device, "dtype": recurrence_dtype(dtype)}
        form = normal_form("legs", d_state // blocks)
        V = torch.block_diag(*[form.V] * blocks)  # (n, n / 2), orthonormal columns
        Lambda = form.Lambda.repeat(blocks)
        B = V.mH @ (torch.randn(d_state, d_model, dtype=torch.float64) / math.sqrt(d_model)).to(V.dtype)
        sides = 2 if bidirectional else 1
        if C_init == "lecun":
            C = torch.randn(sides, d_model, d_state, 2, dtype=torch.float64) / math.sqrt(d_state)
            C = torch.view_as_real(torch.view_as_complex(C) @ V)
        else:
            C = torch.randn(sides, d_model, d_state // 2, 2, dtype=torch.float64) * math.sqrt(0.5)
        self.Lambda_re = nn.Parameter(Lambda.real.to(**real))
        self.Lambda_im = nn.Parameter(Lambda.imag.to(**real))
        self.B = nn.Parameter(torch.view_as_real(B).to(**real))  # (n / 2, d, 2)
        self.C = nn.Parameter(C.to(**real))  # (1 or 2, d, n / 2, 2)
        self.D = nn.Parameter(torch.randn(d_model, **real))
        self.log_step = nn.Parameter(torch.empty(d_state // 2, **real).uniform_(math.log(dt_min), math.log(dt_max)))
        self.out_proj = nn.Linear(d_model, d_model, device=device, dtype=dtype)
        no_weight_decay(*(self.get_parameter(name) for name in self.lr_names()))
        self.register_load_state_dict_pre_hook(_refuse_unstable)

    def lr_names(self) -> tuple[str, ...]:
        """Parameters with their own learning rate and no weight decay."""
        return ("Lambda_re", "Lambda_im", "B", "log_step")

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return (*self.lr_names(), "D")

    def step(self, x: Tensor, state: S5State) -> tuple[Tensor, S5State]:
        """One position, (b, d).

        Raises:
            ValueError: if a shape is wrong or the state does not fit.
            TypeError: if the mixer is two-sided or the state of another kind.
        """
        require_causal(self)
        check_input(x, self.d_model, "b")
        check_state(state, S5State, self._shapes(x.shape[0]), x.device)
        log_A, B, C = self._discrete()
        h = torch.view_as_complex(state.ssm)
        h = h * log_A.exp().to(h.dtype) + _project_in(wide(x), B)
        y = _project_out(h, C[0]) + wide(self.D) * wide(x)
        return self._out(y.to(x.dtype)), S5State(torch.view_as_real(h))

    def mixing_matrix(self, x: Tensor, *, state: S5State | None = None) -> MixingMatrix:
        """The operator before activation and gate, (1, 1, l, d, l, d): every channel reads all channels."""
        check_input(x, self.d_model)
        length = x.shape[1]
        log_A, B, C = self._discrete()
        lag = torch.arange(length, device=x.device)
        powers = (log_A * lag[:, None]).exp().to(B.dtype)  # (l, n / 2)
        kernels = 2 * torch.einsum("sin,ln,nj->slij", C, powers, B).real
        kernels[0, 0] += torch.diag(wide(self.D))
        lag = lag[:, None] - lag
        matrix = torch.where((lag >= 0)[..., None, None], kernels[0][lag.clamp(min=0)], 0.0)
        if not self.causal:
            matrix = matrix + torch.where((lag <= 0)[..., None, None], kernels[1][-lag.clamp(max=0)], 0.0)
        start, from_state = None, None
        if state is not None:
            require_causal(self)
            check_state(state, S5State, self._shapes(x.shape[0]), x.device)
            start = torch.view_as_complex(state.ssm)
            responses = (log_A * torch.arange(1, length + 1, device=x.device)[:, None]).exp().to(start.dtype)
            from_state = _project_out(start[:, None] * responses, C[0])[..., None, None]
        y, _ = self._scan(x, start, Layout())
        matrix = matrix.movedim(2, 1)[None, None]  # (1, 1, t, i, s, j)
        return MixingMatrix(matrix, wide(x)[..., None, None], y[..., None, None], from_state)

    def flops(self, l: int, *, mode: Mode = "prefill") -> int:  # noqa: E741
        """Operations of one sequence of length l ("train", "prefill") or of one position ("decode")."""
        sides, half = 1 if self.causal else 2, self.d_state // 2
        positions = 1 if mode == "decode" else l
        maps = 4 * half * self.d_model * (1 + sides)
        parts = {"gate": linear_flops(self.out_proj), "maps": maps + 2 * self.d_model, "scan": 8 * half * sides}
        return positions * total_flops(parts, mode)

    def _shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return {"ssm": (batch, self.d_state // 2, 2)}

    def _mix(self, x: Tensor, state: S5State | None, layout: Layout) -> tuple[Tensor, S5State]:
        start = None if state is None else layout.restart(torch.view_as_complex(state.ssm))
        y, last = self._scan(x, start, layout)
        return self._out(y.to(x.dtype)), S5State(torch.view_as_real(last))

    def _discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """log A_ (n/2), B_ (n/2, d) and C (sides, d, n/2), complex."""
        real = wide(self.Lambda_re)
        A = torch.complex(real.clamp(max=-1e-4) if self.clip_eigs else real, wide(self.Lambda_im))[:, None]
        dt = wide(self.log_step).exp()[:, None] * self.rate
        log_A, B = discretize(dt, A, torch.view_as_complex(wide(self.B)), self.discretization)
        return log_A[:, 0], B, torch.view_as_complex(wide(self.C))

    def _scan(self, u: Tensor, start: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
        """Outputs before the activation (b, l, d), in at least float32, and the last state (b, n/2)."""
        log_A, B, C = self._discrete()
        u = wide(u)
        inputs = _project_in(u, B)
        a = log_A.exp().to(inputs.dtype)
        if layout.mask is not None:  # padding lets the state pass
            a = torch.where(layout.mask[..., None], a, torch.ones_like(a))
        h, last = linear_scan(a, inputs, start, seq_idx=layout.index)
        y = _project_out(h, C[0]) + wide(self.D) * u
        if not self.causal:
            y = y + _project_out(linear_scan(a, inputs, reverse=True, seq_idx=layout.index)[0], C[1])
        return y, last

    def _out(self, y: Tensor) -> Tensor:
        g = F.gelu(y)
        gate = self.out_proj(g).sigmoid()
        return g.to(gate.dtype) * gate


def _project_in(u: Tensor, B: Tensor) -> Tensor:
    """B u for real u: (..., d) -> (..., n) complex."""
    with torch.autocast(u.device.type, enabled=False):
        return torch.complex(*(u @ torch.cat([B.real, B.imag]).mT.to(u.dtype)).chunk(2, dim=-1))


def _project_out(h: Tensor, C: Tensor) -> Tensor:
    """2 Re C h: (..., n) complex -> (..., d) real."""
    with torch.autocast(h.device.type, enabled=False):
        parts = torch.cat([h.real, h.imag], dim=-1)
        return parts @ (2 * torch.cat([C.real, -C.imag], dim=-1)).mT.to(parts.dtype)


def _refuse_unstable(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Name eigenvalues in a state dict that would let the state grow without bound."""
    real = state_dict.get(f"{prefix}Lambda_re")
    if real is None or module.clip_eigs:
        return
    growing = (real >= 0).nonzero().flatten().tolist()
    if growing:
        raise ValueError(
            f"`{prefix}Lambda_re` has {len(growing)} unstable eigenvalues (real part >= 0), the first at {growing[0]}: "
            f"{float(real[growing[0]]):.3g}; expected negative ones, or build the mixer with clip_eigs=True."
        )
