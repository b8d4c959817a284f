"""Mamba: the selective state-space model S6, with n states and input-dependent steps for every channel.

    [x, z] = in_proj(u);    x = silu(conv(x));    [dt, B, C] = x_proj(x);    dt = softplus(dt_proj(dt))
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t;    y_t = C_t.h_t + D x_t;    out_proj(y * silu(z))

Gu & Dao (2023), "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", section 3. Parameter names are
those of the published code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import selective_scan, selective_step
from ..init import a_log_init, dt_bias_init, no_weight_decay
from .common import (
    ConvSSMState,
    Layout,
    MixingMatrix,
    Mode,
    check_input,
    check_mode,
    check_state,
    convolve,
    convolve_step,
    decay_matrix,
    depthwise_conv,
    lay_out,
    linear_flops,
    recurrence_dtype,
    softplus_steps,
    total_flops,
    wide,
)
from .effective import effective_matrix

if TYPE_CHECKING:
    from ..distributed import SequenceRanks

DtInit = Literal["random", "constant"]


class _Scan(NamedTuple):
    """Inputs of the recurrence, for rows (b, l, ...) or one position (b, ...)."""

    x: Tensor  # (b, l, c)
    dt: Tensor  # (b, l, c)
    A: Tensor  # (c, n)
    B: Tensor  # (b, l, n)
    C: Tensor  # (b, l, n)


class S6(nn.Module):
    """Parameters and pieces of Mamba and LBMamba; `Mamba` names the options."""

    causal: ClassVar[bool]
    linear_in_x: ClassVar[bool] = True
    varlen: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init: DtInit = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        use_bcdt_rms: bool = False,
        bcdt_eps: float = 1e-6,
        bias: bool = False,
        conv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        recurrence: dict[str, Any] = {"device": device, "dtype": recurrence_dtype(dtype)}
        self.d_model, self.d_state, self.d_inner = d_model, d_state, int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.use_bcdt_rms, self.bcdt_eps = use_bcdt_rms, bcdt_eps
        for name, size in (("d_inner", self.d_inner), ("d_state", d_state), ("dt_rank", self.dt_rank)):
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        if dt_init not in ("random", "constant"):
            raise ValueError(f"`dt_init` must be 'random' or 'constant', got {dt_init!r}.")

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)  # [x, z]
        self.conv1d = depthwise_conv(self.d_inner, d_conv, bias=conv_bias, **factory)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)  # [dt, B, C]
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=False, **factory)
        size = self.dt_rank**-0.5 * dt_scale
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, size)
        else:
            nn.init.uniform_(self.dt_proj.weight, -size, size)
        steps = dt_bias_init(self.d_inner, dt_min, dt_max, dt_floor=dt_init_floor, **recurrence)
        self.dt_proj.bias = nn.Parameter(steps)
        self.A_log = nn.Parameter(a_log_init(self.d_inner, d_state, **recurrence))
        self.D = nn.Parameter(torch.ones(self.d_inner, **recurrence))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        no_weight_decay(*(self.get_parameter(name) for name in self.no_decay_names()))

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return "A_log", "D", "dt_proj.bias"

    def flops(self, l: int, *, mode: Mode = "prefill") -> int:  # noqa: E741
        """Multiplications and additions for one sequence of length l, or for one step ("decode")."""
        return total_flops(self.flops_parts(l, mode=mode), mode)

    def flops_parts(self, l: int, *, mode: Mode = "prefill") -> dict[str, int]:  # noqa: E741
        """Those of the forward pass by part: "projections", "convolution" and "scan"."""
        check_mode(mode)
        positions = 1 if mode == "decode" else l
        return {
            "projections": positions * linear_flops(self.in_proj, self.x_proj, self.dt_proj, self.out_proj),
            "convolution": positions * 2 * self.conv1d.weight.numel(),
            "scan": positions * self._scan_flops(),
        }

    def extra_repr(self) -> str:
        """Shown by repr()."""
        return f"d_inner={self.d_inner}, d_state={self.d_state}, dt_rank={self.dt_rank}"

    def _scan_flops(self) -> int:
        return 7 * self.d_inner * self.d_state + 3 * self.d_inner

    def _scan_inputs(self, x: Tensor, layout: Layout | None = None) -> _Scan:
        """From the convolved signal, (..., c)."""
        parts = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt, B, C = (self._rms(part) for part in parts) if self.use_bcdt_rms else parts
        dt = softplus_steps(F.linear(dt, self.dt_proj.weight), self.dt_proj.bias, layout=layout)
        return _Scan(x, dt, -wide(self.A_log).exp(), B, C)

    def _rms(self, x: Tensor) -> Tensor:
        return F.rms_norm(wide(x), x.shape[-1:], eps=self.bcdt_eps).to(x.dtype)

    def _matrix(
        self,
        x: Tensor,
        state: ConvSSMState | None,
        window: int | None,
        effective: bool,
        channels: Sequence[int] | None,
    ) -> MixingMatrix:
        check_input(x, self.d_model)
        conv_in, z = self.in_proj(x).chunk(2, dim=-1)
        before = None if state is None else state.conv
        convolved, _ = convolve(conv_in, self.conv1d, before, Layout())
        scan = self._scan_inputs(convolved)
        initial = None if state is None else state.ssm
        y, _ = selective_scan(*scan, wide(self.D), initial_state=initial, window=window)

        chosen = torch.arange(self.d_inner, device=x.device)
        chosen = chosen if channels is None else chosen[list(channels)]
        dt = scan.dt[..., chosen]
        matrix = dt.new_zeros(x.shape[0], chosen.shape[0], x.shape[1], x.shape[1])
        from_state = None if initial is None else torch.zeros_like(dt)
        for n in range(self.d_state):  # one state at a time: all at once would take n times the memory
            log_decay = dt * scan.A[chosen, n]
            decay = decay_matrix(log_decay)
            if window is not None and window > 1:
                decay = decay + _local_decays(log_decay, window)
            B, C = wide(scan.B[..., n]), wide(scan.C[..., n])
            matrix = matrix + decay * C[:, None, :, None] * (dt * B[..., None]).mT[:, :, None]
            if initial is not None and from_state is not None:
                from_state = from_state + log_decay.cumsum(1).exp() * (initial[:, None, chosen, n] * C[..., None])
        matrix = matrix + torch.diag_embed(wide(self.D)[chosen, None].expand(-1, x.shape[1]))
        plain = MixingMatrix(
            matrix,
            wide(scan.x)[..., chosen, None],
            wide(y)[..., chosen, None],
            None if from_state is None else from_state[..., None],
        )
        if not effective:
            return plain
        gate = F.silu(wide(z)[..., chosen])
        before = None if before is None else before[:, chosen]
        return effective_matrix(plain, conv_in[..., chosen], gate, self.conv1d, chosen, before=before)


class Mamba(S6):
    """Causal mixer (b, l, d) -> (b, l, d), n states per channel; neither residual nor norm inside.

    Args:
        d_model: Width of the stream.
        d_state: States n per channel.
        d_conv: Width of the causal convolution, 1 to 8.
        expand: d_inner = expand * d_model.
        dt_rank: Rank of the map from input to steps; None: d_model / 16 rounded up.
        dt_min: Shortest initial step.
        dt_max: Longest initial step.
        dt_init: Initial weight of dt_proj: uniform ("random") or all the same ("constant").
        dt_scale: Factor of that weight's size, dt_rank^-1/2.
        dt_init_floor: Initial steps below are raised to it.
        use_bcdt_rms: Norm dt, B and C over their channels, without weights (Falcon-Mamba).
        bcdt_eps: Of these norms.
        bias: Of in_proj and out_proj.
        conv_bias: Of the convolution.
        device: Where to create the parameters.
        dtype: Their dtype; those of the recurrence are float32 at least.

    Raises:
        ValueError: if a size is out of range or an option unknown.
    """

    causal: ClassVar[bool] = True
    state_type: ClassVar[type[ConvSSMState]] = ConvSSMState
    ranks: SequenceRanks | None = None  # that share sequences with this process, see `set_context_parallel`

    def forward(self, x: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Mix whole sequences, (b, l, d) -> (b, l, d); see `prefill`."""
        return self.prefill(x, mask=mask, seq_idx=seq_idx)[0]

    def prefill(
        self,
        x: Tensor,
        state: ConvSSMState | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, ConvSSMState]:
        """Mix sequences that go on from a state.

        Args:
            x: (b, l, d).
            state: After the positions before; None at the start.
            mask: True at real tokens, (b, l) bool; contiguous in each row. Outputs at padding are 0.
            seq_idx: Which packed sequence a position belongs to, (b, l) integers; the state starts anew where it
                changes. `state` belongs to the first sequence of a row.
            reset: True where the state starts anew before the position is absorbed, (b, l) bool.

        Returns:
            (b, l, d), and the state after each row's last real token.

        Raises:
            ValueError: if a shape is wrong, a mask has holes or the state does not fit.
            TypeError: if a dtype is wrong or the state is of another kind.
        """
        check_input(x, self.d_model)
        if state is not None:
            self._check(state, x)
        layout = lay_out(x, mask, seq_idx, reset)
        conv_in, z = self.in_proj(layout.align(x)).chunk(2, dim=-1)
        before = None if state is None else state.conv
        if self.ranks is not None:
            self.ranks.require_plain(state, mask=mask, seq_idx=seq_idx, reset=reset)
            before = self.ranks.inputs_before(conv_in, self.conv1d.kernel_size[0] - 1, before)
        convolved, conv = convolve(conv_in, self.conv1d, before, layout)
        initial = None if state is None else layout.restart(state.ssm)
        scan = self._scan_inputs(convolved, layout)
        if self.ranks is not None:
            # The first scan is for its last state only: outputs from a state would need all states at once.
            _, end = selective_scan(*scan, initial_state=initial)
            start = self.ranks.carry(scan.dt.sum(1)[..., None] * scan.A, end)
            initial = start if initial is None else start + initial
        y, ssm = selective_scan(*scan, wide(self.D), z, initial, seq_idx=layout.index)
        return layout.restore(self.out_proj(y)), ConvSSMState(conv, ssm)

    def step(self, x: Tensor, state: ConvSSMState) -> tuple[Tensor, ConvSSMState]:
        """One position, (b, d) -> (b, d).

        Raises:
            ValueError: if a shape is wrong or the state does not fit.
            TypeError: if the state is of another kind.
        """
        check_input(x, self.d_model, "b")
        self._check(state, x)
        conv_in, z = self.in_proj(x).chunk(2, dim=-1)
        convolved, conv = convolve_step(conv_in, self.conv1d, state.conv)
        y, ssm = selective_step(*self._scan_inputs(convolved), state.ssm, D=wide(self.D), z=z)
        return self.out_proj(y), ConvSSMState(conv, ssm)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ConvSSMState:
        """The state before the first position, zero; `dtype` is that of the activations, by default the parameters'."""
        device, dtype = device or self.D.device, dtype or self.in_proj.weight.dtype
        shapes = self._state_shapes(batch)
        return ConvSSMState(
            torch.zeros(shapes["conv"], device=device, dtype=dtype),
            torch.zeros(shapes["ssm"], device=device, dtype=recurrence_dtype(dtype)),
        )

    def mixing_matrix(
        self,
        x: Tensor,
        *,
        state: ConvSSMState | None = None,
        effective: bool = False,
        channels: Sequence[int] | None = None,
    ) -> MixingMatrix:
        """The operator of the recurrence on these inputs, one matrix per channel, (b, c, l, l).

            M[t, s] = sum_n C_tn B_sn dt_s exp(A_n sum_{s<j<=t} dt_j) for s <= t,    + D on the diagonal

        Args:
            x: (b, l, d).
            state: To go on from.
            effective: Count gate and convolution in: the operator from the x slice of in_proj to the input of out_proj.
            channels: Which of the d_inner channels are wanted; None: all.

        Raises:
            ValueError: if a shape is wrong or the state does not fit.
            TypeError: if the state is of another kind.
        """
        if state is not None:
            self._check(state, x)
        return self._matrix(x, state, None, effective, channels)

    def state_numel(self) -> int:
        """Numbers in the state of one sequence."""
        return sum(math.prod(shape) for shape in self._state_shapes(1).values())

    def _state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return {
            "conv": (batch, self.d_inner, self.conv1d.kernel_size[0] - 1),
            "ssm": (batch, self.d_inner, self.d_state),
        }

    def _check(self, state: ConvSSMState, x: Tensor) -> None:
        check_state(state, self.state_type, self._state_shapes(x.shape[0]), x.device)


def _local_decays(log_decay: Tensor, window: int) -> Tensor:
    """exp(sum over t <= j < s of log_decay_j) for t < s of one segment of `window` positions, else 0: (b, c, l, l)."""
    decays = decay_matrix(log_decay.flip(1)).flip(2, 3)
    segment = torch.arange(log_decay.shape[1], device=log_decay.device) // window
    return torch.where(segment[:, None] == segment, decays, 0).triu(1)
