"""Mamba-2, state-space duality with one scalar decay per head, and its discrete form without steps.

    [z, x, B, C, dt] = in_proj(u);    [x, B, C] = silu(conv([x, B, C]));    dt = softplus(dt + dt_bias)
    H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t^T;    y_t = H_t C_t + D x_t
    out_proj(norm(y * silu(z)))

Dao & Gu (2024), "Transformers are SSMs", sections 6 and 7. Discrete form: Bick, Li, Xing, Kolter & Gu (2024),
"Transformers to SSMs". Parameter names are those of the published code.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import TokenTree, conv_tree, ssd, ssd_rates, ssd_step, ssd_tree
from ..init import dt_bias_init, no_weight_decay
from .common import (
    ConvSSMState,
    GatedRMSNorm,
    Layout,
    MixingMatrix,
    Mode,
    check_dt_limit,
    check_heads,
    check_input,
    check_state,
    convolve,
    convolve_step,
    decay_matrix,
    decay_since_start,
    depthwise_conv,
    lay_out,
    read_states,
    recurrence_dtype,
    softplus_steps,
    ssd_flops_parts,
    total_flops,
    wide,
)
from .drafts import SSDDraft
from .effective import effective_matrix

if TYPE_CHECKING:
    from ..distributed import SequenceRanks

# silu(1.278464542761) = 1: a gate that is open.
_OPEN_GATE = 1.278464542761


class _Scan(NamedTuple):
    """Inputs of the recurrence, for rows (b, l, ...) or one position (b, ...)."""

    x: Tensor  # (b, l, h, p)
    B: Tensor  # (b, l, g, n)
    C: Tensor  # (b, l, g, n)
    log_decay: Tensor  # (b, l, h)
    weight: Tensor | None  # of the input, (b, l, h); None: ones


class _Projected(NamedTuple):
    """What in_proj gives."""

    plain: Tensor | None  # gated branch outside the recurrence
    z: Tensor  # gate before the SiLU, (b, l, d_ssm)
    conv_in: Tensor  # [x, B, C], (b, l, d_ssm + 2 g n)
    dt: Tensor  # (b, l, h)


class _SSDMixer(nn.Module, ABC):
    """Convolution, `ssd` and everything that follows from it; subclasses say what goes in and what comes out."""

    causal: ClassVar[bool] = True
    linear_in_x: ClassVar[bool] = True
    varlen: ClassVar[bool] = True
    state_type: ClassVar[type[ConvSSMState]] = ConvSSMState
    ranks: SequenceRanks | None = None  # that share sequences with this process, see `set_context_parallel`

    conv_activation: ClassVar[Literal["silu"] | None] = "silu"
    d_model: int
    d_state: int
    d_ssm: int
    nheads: int
    headdim: int
    ngroups: int
    chunk_size: int | None
    in_proj: nn.Linear
    conv1d: nn.Conv1d
    D: nn.Parameter
    out_proj: nn.Linear

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        names = ("dt_bias", "A_log", "D", "init_states", "z_bias")
        return tuple(name for name in names if name in self._parameters)

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
        projected = self._project(layout.align(x))
        before = None if state is None else state.conv
        if self.ranks is not None:
            self.ranks.require_plain(state, mask=mask, seq_idx=seq_idx, reset=reset)
            before = self.ranks.inputs_before(projected.conv_in, self.conv1d.kernel_size[0] - 1, before)
        xBC, conv = convolve(projected.conv_in, self.conv1d, before, layout, self.conv_activation)
        scan = self._scan_inputs(xBC, projected.dt, layout)
        first = None if state is None else state.ssm
        y, ssm = self._scan(scan, first, layout) if self.ranks is None else self._scan_segment(scan, first, self.ranks)
        return layout.restore(self._output(projected, y)), ConvSSMState(conv, ssm)

    def step(self, x: Tensor, state: ConvSSMState) -> tuple[Tensor, ConvSSMState]:
        """One position, (b, d) -> (b, d).

        Raises:
            ValueError: if a shape is wrong or the state does not fit.
            TypeError: if the state is of another kind.
        """
        check_input(x, self.d_model, "b")
        self._check(state, x)
        projected = self._project(x)
        xBC, conv = convolve_step(projected.conv_in, self.conv1d, state.conv, self.conv_activation)
        scan = self._scan_inputs(xBC, projected.dt)
        skip = self._head_skip()
        y, ssm = ssd_step(scan.x, scan.log_decay, scan.B, scan.C, state.ssm, weight=scan.weight, D=skip)
        return self._output(projected, self._channel_skip(y, scan.x).flatten(1)), ConvSSMState(conv, ssm)

    def verify(self, x: Tensor, state: ConvSSMState, tree: TokenTree) -> tuple[Tensor, SSDDraft]:
        """Mix a tree of positions, each after the path that leads to it, (b, l, d) -> (b, l, d).

        Args:
            x: (b, l, d), one position per node.
            state: Before the tree.
            tree: From `omnissm.kernels.token_tree`.

        Returns:
            (b, l, d), and what `accept(node)` needs to give the state after a path.

        Raises:
            ValueError: if a shape is wrong or the state does not fit.
            TypeError: if the state is of another kind.
        """
        check_input(x, self.d_model)
        self._check(state, x)
        projected = self._project(x)
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        xBC = conv_tree(projected.conv_in, weight, bias, tree, state.conv.to(x.dtype), activation=self.conv_activation)
        scan = self._scan_inputs(xBC, projected.dt)
        skip = self._head_skip()
        y = ssd_tree(scan.x, scan.log_decay, scan.B, scan.C, tree, state.ssm, weight=scan.weight, D=skip)
        draft = SSDDraft(tree, state, projected.conv_in, scan.x, scan.log_decay, scan.B, scan.weight)
        return self._output(projected, self._channel_skip(y, scan.x).flatten(2)), draft

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ConvSSMState:
        """The state before the first position; `dtype` is that of the activations, by default the parameters'."""
        device, dtype = device or self.D.device, dtype or self.in_proj.weight.dtype
        shapes = self._state_shapes(batch)
        ssm = torch.zeros(shapes["ssm"], device=device, dtype=recurrence_dtype(dtype))
        if (learned := self._learned()) is not None:
            ssm = ssm + learned.to(ssm)
        return ConvSSMState(torch.zeros(shapes["conv"], device=device, dtype=dtype), ssm)

    def mixing_matrix(
        self,
        x: Tensor,
        *,
        state: ConvSSMState | None = None,
        effective: bool = False,
        channels: Sequence[int] | None = None,
    ) -> MixingMatrix:
        """The operator of the recurrence on these inputs, one matrix per head (per channel where D is).

            M[t, s] = C_t.B_s exp(sum_{s<j<=t} log_decay_j) weight_s for s <= t,    + D on the diagonal

        Args:
            x: (b, l, d).
            state: To go on from.
            effective: Count gate and convolution in: the operator from the x slice of in_proj to the gated signal, one
                matrix per channel. The norm is left out.
            channels: Which of the d_ssm channels an effective matrix is wanted for; None: all.

        Raises:
            ValueError: if a shape is wrong or the state does not fit.
            TypeError: if the state is of another kind.
        """
        check_input(x, self.d_model)
        if state is not None:
            self._check(state, x)
        projected = self._project(x)
        before = None if state is None else state.conv
        xBC, _ = convolve(projected.conv_in, self.conv1d, before, Layout(), self.conv_activation)
        scan = self._scan_inputs(xBC, projected.dt)
        y, _ = self._scan(scan, None if state is None else state.ssm, Layout())
        with torch.autocast(x.device.type, enabled=False):
            matrix = wide(scan.C).movedim(1, 2) @ wide(scan.B).permute(0, 2, 3, 1)
        matrix = matrix.repeat_interleave(self.nheads // self.ngroups, dim=1) * decay_matrix(scan.log_decay)
        if scan.weight is not None:
            matrix = matrix * scan.weight.movedim(1, 2)[..., None, :]
        start = self._learned() if state is None else state.ssm
        from_state = None
        if start is not None:
            from_state = read_states(scan.C, start) * scan.log_decay.cumsum(1).exp()[..., None]
        skip = torch.eye(x.shape[1], dtype=matrix.dtype, device=x.device)
        inputs, outputs, D = wide(scan.x), wide(y).unflatten(-1, (self.nheads, -1)), wide(self.D)[:, None, None]
        if not effective and self.D.shape[0] == self.nheads:
            return MixingMatrix(matrix + D * skip, inputs, outputs, from_state)
        chosen = torch.arange(self.d_ssm, device=x.device)
        chosen = chosen if channels is None else chosen[list(channels)]
        D = D if self.D.shape[0] == self.d_ssm else D.repeat_interleave(self.headdim, dim=0)
        plain = MixingMatrix(
            matrix[:, chosen // self.headdim] + D[chosen] * skip,
            inputs.flatten(2)[..., chosen, None],
            outputs.flatten(2)[..., chosen, None],
            None if from_state is None else from_state.flatten(2)[..., chosen, None],
        )
        if not effective:
            return plain
        return effective_matrix(
            plain,
            projected.conv_in[..., chosen],
            F.silu(wide(self._gate(projected.z))[..., chosen]),
            self.conv1d,
            chosen,
            before=None if before is None else before[:, chosen],
            activation=self.conv_activation,
        )

    def flops(self, l: int, *, mode: Mode = "prefill") -> int:  # noqa: E741
        """Multiplications and additions for one sequence of length l, or for one step ("decode")."""
        return total_flops(self.flops_parts(l, mode=mode), mode)

    def flops_parts(self, l: int, *, mode: Mode = "prefill") -> dict[str, int]:  # noqa: E741
        """Those of the forward pass by part: "projections", "convolution" and "scan"."""
        return ssd_flops_parts(
            (self.in_proj, self.out_proj),
            self.conv1d,
            d_ssm=self.d_ssm,
            d_state=self.d_state,
            nheads=self.nheads,
            ngroups=self.ngroups,
            chunk_size=self.chunk_size,
            length=l,
            mode=mode,
        )

    def state_numel(self) -> int:
        """Numbers in the state of one sequence."""
        return sum(math.prod(shape) for shape in self._state_shapes(1).values())

    def extra_repr(self) -> str:
        """Shown by repr()."""
        return f"d_state={self.d_state}, headdim={self.headdim}, ngroups={self.ngroups}"

    @abstractmethod
    def _project(self, x: Tensor) -> _Projected:
        """Apply in_proj to (..., d)."""

    @abstractmethod
    def _scan_inputs(self, xBC: Tensor, dt: Tensor, layout: Layout | None = None) -> _Scan:
        """What enters the recurrence, nothing at padding."""

    @abstractmethod
    def _output(self, projected: _Projected, y: Tensor) -> Tensor:
        """Gate, norm and out_proj."""

    def _gate(self, z: Tensor) -> Tensor:
        return z

    def _learned(self) -> Tensor | None:
        """The learned initial state, (h, p, n)."""
        return self._parameters.get("init_states")

    def _state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return {
            "conv": (batch, self.conv1d.in_channels, self.conv1d.kernel_size[0] - 1),
            "ssm": (batch, self.nheads, self.headdim, self.d_state),
        }

    def _check(self, state: ConvSSMState, x: Tensor) -> None:
        check_state(state, self.state_type, self._state_shapes(x.shape[0]), x.device)

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[x, B, C] apart: (..., h, p) and twice (..., g, n)."""
        x, B, C = xBC.split([self.d_ssm, *2 * [self.ngroups * self.d_state]], dim=-1)
        B, C = (t.unflatten(-1, (self.ngroups, self.d_state)) for t in (B, C))
        return x.unflatten(-1, (self.nheads, self.headdim)), B, C

    def _head_skip(self) -> Tensor | None:
        """D where it is per head."""
        return wide(self.D) if self.D.shape[0] == self.nheads else None

    def _channel_skip(self, y: Tensor, x: Tensor) -> Tensor:
        """Add D x where D is per channel; (..., h, p)."""
        if self.D.shape[0] == self.nheads:
            return y
        return (wide(y) + wide(self.D).unflatten(0, (self.nheads, -1)) * wide(x)).to(y.dtype)

    def _scan(self, scan: _Scan, state: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
        """Outputs (b, l, d_ssm) and the state after the last position, (b, h, p, n)."""
        learned = self._learned()
        if state is None and learned is not None:
            state = learned.expand(scan.x.shape[0], -1, -1, -1)
        y, ssm = ssd(
            scan.x,
            scan.log_decay,
            scan.B,
            scan.C,
            None if state is None else layout.restart(state, learned),
            weight=scan.weight,
            D=self._head_skip(),
            seq_idx=layout.index,
            chunk_size=self.chunk_size,
        )
        if learned is not None and layout.index is not None and scan.x.shape[1]:
            # The operator starts the later sequences of a row from zero; all is linear in what they start from.
            later = (layout.index != layout.index[:, :1])[..., None]
            decay = torch.where(later, decay_since_start(scan.log_decay, layout.index), 0)
            y = (wide(y) + read_states(scan.C, learned) * decay[..., None]).to(y.dtype)
            ssm = ssm + decay[:, -1, :, None, None] * learned
        return self._channel_skip(y, scan.x).flatten(2), ssm

    def _scan_segment(self, scan: _Scan, state: Tensor | None, ranks: SequenceRanks) -> tuple[Tensor, Tensor]:
        """`_scan` of one segment; what the ranks before leave in the state is added to the outputs afterwards."""
        if ranks.rank and (learned := self._learned()) is not None:
            # Only the first segment begins with it; the others have a gradient of zero, which DDP waits for.
            state = (0 * learned).expand(scan.x.shape[0], -1, -1, -1)
        y, ssm = self._scan(scan, state, Layout())
        log_decay = scan.log_decay.cumsum(1)
        start = ranks.carry(scan.log_decay.sum(1), ssm)
        from_before = (read_states(scan.C, start) * log_decay[..., None].exp()).flatten(2)
        return (wide(y) + from_before).to(y.dtype), ssm + log_decay[:, -1, :, None, None].exp() * start


class Mamba2(_SSDMixer):
    """Causal mixer (b, l, d) -> (b, l, d), one matrix state (p, n) per head; neither residual nor norm inside.

    Args:
        d_model: Width of the stream.
        d_state: States n per channel.
        d_conv: Width of the convolution, 1 to 8.
        expand: d_inner = expand * d_model.
        headdim: Channels p of a head.
        ngroups: Groups of heads that share B and C.
        d_ssm: Channels that go through the recurrence; the rest of d_inner is gated only. None: all.
        A_init_range: The decay rates are drawn uniformly from it.
        dt_min: Shortest initial step.
        dt_max: Longest initial step.
        dt_init_floor: Initial steps below are raised to it.
        dt_limit: Smallest and largest step, applied after the softplus everywhere.
        D_has_hdim: A skip per channel instead of per head.
        rmsnorm: Norm before the output; False leaves the gate alone.
        norm_before_gate: Norm first and gate then. Part of a checkpoint's format.
        norm_eps: Of the norm.
        bias: Of the two projections.
        conv_bias: Of the convolution.
        conv_init: Draw the convolution's weight from [-conv_init, conv_init]; None is torch's default.
        learnable_init_states: Learn the state before the first position of every sequence (zero at first).
        mup_vector: Constant factors of z, x, B, C and dt after in_proj (Falcon-H1); the seven constants are no
            parameters and belong to the configuration of a checkpoint.
        in_multiplier: Constant factor of the input.
        out_multiplier: Constant factor of the output.
        chunk_size: Positions per chunk of the scan; None lets the operator choose. Does not change results.
        device: Where to create the parameters.
        dtype: Their dtype; those of the recurrence are float32 at least.

    Raises:
        ValueError: if sizes do not fit together or a range is empty.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        d_ssm: int | None = None,
        A_init_range: Sequence[float] = (1.0, 16.0),
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: Sequence[float] = (0.0, math.inf),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        norm_eps: float = 1e-5,
        bias: bool = False,
        conv_bias: bool = True,
        conv_init: float | None = None,
        learnable_init_states: bool = False,
        mup_vector: Sequence[float] | None = None,
        in_multiplier: float = 1.0,
        out_multiplier: float = 1.0,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        recurrence: dict[str, Any] = {"device": device, "dtype": recurrence_dtype(dtype)}
        self.d_model, self.d_state, self.headdim, self.ngroups = d_model, d_state, headdim, ngroups
        self.d_inner = int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        if not 0 < self.d_ssm <= self.d_inner:
            raise ValueError(f"`d_ssm` must lie in 1 to d_inner={self.d_inner}, got {self.d_ssm}.")
        self.nheads = check_heads(self.d_ssm, headdim, ngroups, d_state)
        if not 0 < A_init_range[0] <= A_init_range[1]:
            raise ValueError(f"`A_init_range` must be (lowest, highest) rate, both above 0, got {A_init_range}.")
        if mup_vector is not None and (len(mup_vector) != 5 or self.d_ssm != self.d_inner):
            raise ValueError(
                f"`mup_vector` must hold 5 factors (z, x, B, C, dt) and needs d_ssm = d_inner; "
                f"got {len(mup_vector)} factors, d_ssm={self.d_ssm} and d_inner={self.d_inner}."
            )
        self.dt_limit = check_dt_limit(dt_limit)
        self.in_multiplier, self.out_multiplier = in_multiplier, out_multiplier
        self.mup_vector = None if mup_vector is None else tuple(float(factor) for factor in mup_vector)
        self.chunk_size = chunk_size
        outside = self.d_inner - self.d_ssm
        self.splits = [outside, outside, self.d_ssm, self.d_ssm + 2 * ngroups * d_state, self.nheads]

        self.in_proj = nn.Linear(d_model, sum(self.splits), bias=bias, **factory)  # [gate, value], z, [x, B, C], dt
        self.conv1d = depthwise_conv(self.splits[3], d_conv, bias=conv_bias, init=conv_init, **factory)
        self.dt_bias = nn.Parameter(dt_bias_init(self.nheads, dt_min, dt_max, dt_floor=dt_init_floor, **recurrence))
        self.A_log = nn.Parameter(torch.empty(self.nheads, **recurrence).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, **recurrence))
        norm: dict[str, Any] = {"eps": norm_eps, "norm_before_gate": norm_before_gate, **factory}
        self.norm = GatedRMSNorm(self.d_ssm, group_size=self.d_ssm // ngroups, **norm) if rmsnorm else None
        if learnable_init_states:
            self.init_states = nn.Parameter(torch.zeros(self.nheads, headdim, d_state, **recurrence))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        no_weight_decay(*(self.get_parameter(name) for name in self.no_decay_names()))

    def _project(self, x: Tensor) -> _Projected:
        gate, value, z, xBC, dt = self.in_proj(_scaled(x, self.in_multiplier)).split(self.splits, dim=-1)
        if self.mup_vector is not None:
            z, dt = z * self.mup_vector[0], dt * self.mup_vector[4]
            parts = xBC.split([self.d_ssm, *2 * [self.ngroups * self.d_state]], dim=-1)
            xBC = torch.cat([part * factor for part, factor in zip(parts, self.mup_vector[1:4])], dim=-1)
        return _Projected(F.silu(gate) * value if self.splits[0] else None, z, xBC, dt)

    def _scan_inputs(self, xBC: Tensor, dt: Tensor, layout: Layout | None = None) -> _Scan:
        dt, log_decay = ssd_rates(dt, self.dt_bias, self.A_log, limit=self.dt_limit)
        if layout is not None:
            dt, log_decay = layout.zero_padding(dt), layout.zero_padding(log_decay)
        return _Scan(*self._heads(xBC), log_decay, dt)

    def _output(self, projected: _Projected, y: Tensor) -> Tensor:
        y = y * F.silu(projected.z) if self.norm is None else self.norm(y, projected.z)
        y = y if projected.plain is None else torch.cat([projected.plain.to(y.dtype), y], dim=-1)
        return _scaled(self.out_proj(y), self.out_multiplier)


class DiscreteMamba2(_SSDMixer):
    """Mamba-2 without steps: a learned decay, the input unweighted, no norm; can take over an attention layer.

        [x, B, C, z, a] = in_proj(u);    [x, B, C] = conv([x, B, C])
        H_t = exp(-softplus(a_t)) H_{t-1} + x_t B_t^T;    y_t = H_t C_t + D x_t;    out_proj(y * silu(z + z_bias))

    Args:
        d_model: Width of the stream.
        d_state: States n per channel; the key width of the attention it replaces.
        d_conv: Width of the convolution, 1 to 8; no activation follows it.
        expand: d_inner = expand * d_model.
        nheads: Heads h; the values of the attention.
        ngroups: Groups of heads that share B and C; its queries and keys. None: one per head.
        bias: Of the two projections.
        conv_bias: Of the convolution.
        chunk_size: Positions per chunk of the scan; None lets the operator choose. Does not change results.
        device: Where to create the parameters.
        dtype: Their dtype; those of the recurrence are float32 at least.

    Raises:
        ValueError: if sizes do not fit together.
    """

    conv_activation: ClassVar[Literal["silu"] | None] = None

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        d_conv: int = 4,
        expand: float = 1,
        nheads: int = 32,
        ngroups: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        recurrence: dict[str, Any] = {"device": device, "dtype": recurrence_dtype(dtype)}
        self.d_model, self.d_state, self.nheads = d_model, d_state, nheads
        self.d_ssm = self.d_inner = int(expand * d_model)
        if nheads < 1 or self.d_inner % nheads:
            raise ValueError(f"`nheads` must divide d_inner={self.d_inner}, got {nheads}.")
        self.headdim, self.ngroups = self.d_inner // nheads, nheads if ngroups is None else ngroups
        check_heads(self.d_inner, self.headdim, self.ngroups, d_state)
        self.chunk_size = chunk_size
        self.splits = [self.d_inner + 2 * self.ngroups * d_state, self.d_inner, nheads]
        self.in_proj = nn.Linear(d_model, sum(self.splits), bias=bias, **factory)  # [x, B, C], z, a
        self.conv1d = depthwise_conv(self.splits[0], d_conv, bias=conv_bias, **factory)
        self.z_bias = nn.Parameter(torch.zeros(self.d_inner, **factory))
        self.D = nn.Parameter(torch.ones(nheads, **recurrence))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        no_weight_decay(*(self.get_parameter(name) for name in self.no_decay_names()))

    @torch.no_grad()
    def attention_init_(self, skip: float = 0.0) -> None:
        """Set all but x, B, C, the decays and out_proj so that y = H C: the convolution passes its input on, the gate
        is open and D = `skip`. What is left are the maps of an attention layer: values x, keys B, queries C."""
        self.conv1d.weight.zero_()
        self.conv1d.weight[..., -1] = 1
        if self.conv1d.bias is not None:
            self.conv1d.bias.zero_()
        rows = self.in_proj.weight.split(self.splits)[1]
        rows.zero_()
        if self.in_proj.bias is not None:
            self.in_proj.bias.split(self.splits)[1].zero_()
        self.z_bias.fill_(_OPEN_GATE)
        self.D.fill_(skip)

    def _project(self, x: Tensor) -> _Projected:
        xBC, z, a = self.in_proj(x).split(self.splits, dim=-1)
        return _Projected(None, z, xBC, a)

    def _scan_inputs(self, xBC: Tensor, dt: Tensor, layout: Layout | None = None) -> _Scan:
        return _Scan(*self._heads(xBC), -softplus_steps(dt, layout=layout), None)

    def _gate(self, z: Tensor) -> Tensor:
        return z + self.z_bias.to(z.dtype)

    def _output(self, projected: _Projected, y: Tensor) -> Tensor:
        return self.out_proj(y * F.silu(self._gate(projected.z)))


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor
