"""Mamba-3: trapezoidal input, decays that depend on the data, rotating keys and queries, one rank or several.

    [z, x, B, C, dt, A, lam, theta] = in_proj(u)
    dt = softplus(dt + dt_bias);    A = -max(heavy_tail(A), A_floor);    lam = sigmoid(lam)
    k = rot(rms(B) + B_bias; phi),    q = rot(rms(C) + C_bias; phi),    phi_t = phi_{t-1} + pi tanh(theta_t) dt_t
    H_t = exp(dt_t A_t) (H_{t-1} + (1 - lam_t) dt_t v_{t-1} k_{t-1}^T) + lam_t dt_t v_t k_t^T
    one rank:       out_proj((H q + D v) * silu(z)),    v = x
    several ranks:  out_proj(sum_r mimo_o_r (H q_r + D v_r) * silu(z mimo_z_r)),    v_r = x mimo_x_r

Lahoti, Li, Chen et al. (2026), "Mamba-3". Parameter names are those of the published code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import TrapezoidState, gated_norm, trapezoid_ssd, trapezoid_step
from ..init import dt_bias_init, no_weight_decay
from .common import (
    Layout,
    MixerState,
    MixingMatrix,
    Mode,
    check_dt_limit,
    check_heads,
    check_input,
    check_mode,
    check_state,
    decay_matrix,
    lay_out,
    linear_flops,
    mixer_state,
    recurrence_dtype,
    softplus_steps,
    total_flops,
    wide,
)


@mixer_state
class Mamba3State(MixerState):
    """State of `Mamba3`.

    Attributes:
        phi: Angles modulo 2 pi, (b, h, s), float32.
        ssm: Recurrent state, (b, h, p, n), float32.
        k: Key of the last position, rotated, (b, r, h, n), float32.
        v: Input of the last position, before `mimo_x`, (b, h, p).
    """

    phi: Tensor
    ssm: Tensor
    k: Tensor
    v: Tensor

    recurrent: ClassVar[tuple[str, ...]] = ("phi", "ssm", "k")
    periodic: ClassVar[tuple[str, ...]] = ("phi",)


class _Scan(NamedTuple):
    """Inputs of the recurrence, for rows (b, l, ...) or one position (b, ...), and the gate."""

    x: Tensor  # (b, l, h, p)
    log_decay: Tensor  # (b, l, h)
    gamma: Tensor  # (b, l, h)
    beta: Tensor  # (b, l, h)
    theta: Tensor  # (b, l, s)
    B: Tensor  # normed, (b, l, r, g, n)
    C: Tensor  # (b, l, r, g, n)
    z: Tensor  # (b, l, d_inner)


def heavy_tail(x: Tensor) -> Tensor:
    """1 + x for x >= 0 and 1 / (1 - x) below: positive, smooth at 0, with a slowly falling tail."""
    return torch.where(x >= 0, 1 + x, 1 / (1 - x.clamp(max=0)))


class Mamba3(nn.Module):
    """Causal mixer (b, l, d) -> (b, l, d) with complex states, no convolution; neither residual nor norm inside.

    Args:
        d_model: Width of the stream.
        d_state: States n per channel.
        expand: d_inner = expand * d_model.
        headdim: Channels p of a head.
        ngroups: Groups of heads that share B and C.
        rank: Ranks r that share one state; with more than one, products grow r-fold at an equal state (MIMO).
        rope_fraction: Share of the states that rotate, 0 to 1; in pairs, rounded down.
        rotation: Pairs of states, "interleaved" (2i, 2i + 1) or "half" (i, i + n // 2); None is that of the published
            code, "interleaved" for one rank and "half" for several. Part of a checkpoint's format.
        a_activation: From raw decay rates to positive ones, "heavy_tail", or "softplus" as in early checkpoints. Part
            of a checkpoint's format.
        A_floor: Smallest decay rate.
        dt_min: Shortest initial step.
        dt_max: Longest initial step.
        dt_init_floor: Initial steps below are raised to it.
        dt_limit: Smallest and largest step, applied after the softplus everywhere.
        outproj_norm: Norm each head before the gate.
        norm_eps: Of the norms.
        chunk_size: Positions per chunk of the scan; None lets the operator choose. Does not change results.
        device: Where to create the parameters.
        dtype: Their dtype; those of the recurrence are float32 at least.

    Raises:
        ValueError: if sizes do not fit together or an option is unknown.
    """

    causal: ClassVar[bool] = True
    linear_in_x: ClassVar[bool] = True
    varlen: ClassVar[bool] = True
    state_type: ClassVar[type[Mamba3State]] = Mamba3State

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rank: int = 1,
        rope_fraction: float = 0.5,
        rotation: Literal["interleaved", "half"] | None = None,
        a_activation: Literal["heavy_tail", "softplus"] = "heavy_tail",
        A_floor: float = 1e-4,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: Sequence[float] = (0.0, math.inf),
        outproj_norm: bool = False,
        norm_eps: float = 1e-5,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        recurrence: dict[str, Any] = {"device": device, "dtype": recurrence_dtype(dtype)}
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {rank}.")
        if not 0 <= rope_fraction <= 1:
            raise ValueError(f"`rope_fraction` must lie in 0 to 1, got {rope_fraction}.")
        if rotation not in (None, "interleaved", "half"):
            raise ValueError(f"`rotation` must be 'interleaved', 'half' or None, got {rotation!r}.")
        if a_activation not in ("heavy_tail", "softplus"):
            raise ValueError(f"`a_activation` must be 'heavy_tail' or 'softplus', got {a_activation!r}.")
        if A_floor < 0:
            raise ValueError(f"`A_floor` must not be negative, got {A_floor}.")
        self.d_model, self.d_state, self.headdim, self.ngroups, self.rank = d_model, d_state, headdim, ngroups, rank
        self.d_inner = int(expand * d_model)
        self.nheads = check_heads(self.d_inner, headdim, ngroups, d_state)
        self.angles = int(d_state * rope_fraction) // 2
        self.rotation: Literal["interleaved", "half"] = rotation or ("interleaved" if rank == 1 else "half")
        self.a_activation, self.A_floor, self.norm_eps = a_activation, A_floor, norm_eps
        self.dt_limit = check_dt_limit(dt_limit)
        self.chunk_size = chunk_size
        maps = rank * ngroups * d_state
        self.splits = [self.d_inner, self.d_inner, maps, maps, *3 * [self.nheads], self.angles]

        self.in_proj = nn.Linear(d_model, sum(self.splits), bias=False, **factory)  # z, x, B, C, dt, A, lam, theta
        self.dt_bias = nn.Parameter(dt_bias_init(self.nheads, dt_min, dt_max, dt_floor=dt_init_floor, **recurrence))
        self.B_norm = nn.RMSNorm(d_state, eps=norm_eps, **factory)
        self.C_norm = nn.RMSNorm(d_state, eps=norm_eps, **factory)
        self.B_bias = nn.Parameter(torch.ones(self.nheads, rank, d_state, **recurrence))
        self.C_bias = nn.Parameter(torch.ones(self.nheads, rank, d_state, **recurrence))
        self.D = nn.Parameter(torch.ones(self.nheads, **recurrence))
        if rank > 1:
            self.mimo_x = nn.Parameter(torch.full((self.nheads, rank, headdim), 1 / rank, **recurrence))
            self.mimo_z = nn.Parameter(torch.ones(self.nheads, rank, headdim, **recurrence))
            self.mimo_o = nn.Parameter(torch.full((self.nheads, rank, headdim), 1 / rank, **recurrence))
        self.norm = nn.RMSNorm(self.d_inner, eps=norm_eps, **factory) if outproj_norm else None
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False, **factory)
        no_weight_decay(*(self.get_parameter(name) for name in self.no_decay_names()))

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        names = ("dt_bias", "B_bias", "C_bias", "D", "mimo_x", "mimo_z", "mimo_o")
        own = tuple(name for name in names if name in self._parameters)
        return (*own, "B_norm.weight", "C_norm.weight", *(("norm.weight",) if self.norm is not None else ()))

    def forward(self, x: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Mix whole sequences, (b, l, d) -> (b, l, d); see `prefill`."""
        return self.prefill(x, mask=mask, seq_idx=seq_idx)[0]

    def prefill(
        self,
        x: Tensor,
        state: Mamba3State | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Mamba3State]:
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
        layout = lay_out(x, mask, seq_idx, reset)
        initial = None if state is None else self._restart(state, x, layout)
        scan = self._project(layout.align(x), layout)
        y, final = self._scan(scan, initial, layout.index)
        if layout.count is not None and x.shape[1]:
            final = self._at_last_token(scan, initial, final, layout.count)
        return layout.restore(self._output(y, scan.z)), Mamba3State(*final)

    def step(self, x: Tensor, state: Mamba3State) -> tuple[Tensor, Mamba3State]:
        """One position, (b, d) -> (b, d).

        Raises:
            ValueError: if a shape is wrong or the state does not fit.
            TypeError: if the state is of another kind.
        """
        check_input(x, self.d_model, "b")
        before = self._restart(state, x, Layout())
        scan = self._project(x)
        y, final = trapezoid_step(*scan[:-1], before, **self._parameters_of_scan())
        return self._output(y, scan.z), Mamba3State(final.phi, final.ssm, final.k, scan.x)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mamba3State:
        """The state before the first position; `dtype` is that of the activations, by default the parameters'."""
        device, dtype = device or self.D.device, dtype or self.in_proj.weight.dtype
        dtypes = {name: recurrence_dtype(dtype) for name in Mamba3State.recurrent} | {"v": dtype}
        shapes = self._state_shapes(batch)
        return Mamba3State(**{name: torch.zeros(shapes[name], device=device, dtype=dtypes[name]) for name in shapes})

    def mixing_matrix(self, x: Tensor, *, state: Mamba3State | None = None) -> MixingMatrix:
        """The operator of the recurrence on these inputs, one matrix per head.

            M[t, s] = q_t.k_s exp(sum_{s<j<=t} dt_j A_j) (lam_s dt_s + (1 - lam_{s+1}) dt_{s+1})     for s < t
            M[t, t] = q_t.k_t lam_t dt_t + D

        With several ranks it is (b, h, l, r, l, r) and acts on the inputs of the ranks, (b, l, r, h, p).

        Args:
            x: (b, l, d).
            state: To go on from.

        Raises:
            ValueError: if a shape is wrong or the state does not fit.
            TypeError: if the state is of another kind.
        """
        check_input(x, self.d_model)
        before = None if state is None else self._restart(state, x, Layout())
        scan = self._project(x)
        y, _ = self._scan(scan, before, None)
        with torch.autocast(x.device.type, enabled=False):
            matrix, from_state = self._matrix(scan, before)
        ranks = torch.ones_like(self.D)[:, None, None] if self.rank == 1 else self.mimo_x
        inputs, y = wide(scan.x)[:, :, None] * wide(ranks).movedim(1, 0), wide(y)
        if self.rank == 1:
            matrix, inputs, y = matrix[:, :, :, 0, :, 0], inputs[:, :, 0], y[:, :, 0]
            from_state = None if from_state is None else from_state[:, :, 0]
        return MixingMatrix(matrix, inputs, y, from_state)

    def flops(self, l: int, *, mode: Mode = "prefill") -> int:  # noqa: E741
        """Multiplications and additions for one sequence of length l, or for one step ("decode")."""
        return total_flops(self.flops_parts(l, mode=mode), mode)

    def flops_parts(self, l: int, *, mode: Mode = "prefill") -> dict[str, int]:  # noqa: E741
        """Those of the forward pass by part: "projections" and "scan"."""
        check_mode(mode)
        r, n, p = self.rank, self.d_state, self.headdim
        if mode == "decode":
            # The two inputs are added before they enter the state.
            return {
                "projections": linear_flops(self.in_proj, self.out_proj),
                "scan": self.nheads * (n * p + 4 * n * p * r - p * r),
            }
        q = min(self.chunk_size or max(16, 64 // r), l)
        per_position = r * (2 * q * r * (n + p) + 4 * n * p)
        return {
            "projections": l * linear_flops(self.in_proj, self.out_proj),
            "scan": l * self.nheads * per_position,
        }

    def state_numel(self) -> int:
        """Numbers in the state of one sequence."""
        return sum(math.prod(shape) for shape in self._state_shapes(1).values())

    def extra_repr(self) -> str:
        """Shown by repr()."""
        return f"d_state={self.d_state}, headdim={self.headdim}, ngroups={self.ngroups}, rank={self.rank}"

    def _state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return {
            "phi": (batch, self.nheads, self.angles),
            "ssm": (batch, self.nheads, self.headdim, self.d_state),
            "k": (batch, self.rank, self.nheads, self.d_state),
            "v": (batch, self.nheads, self.headdim),
        }

    def _restart(self, state: Mamba3State, x: Tensor, layout: Layout) -> TrapezoidState:
        """The state that the rows begin with."""
        check_state(state, self.state_type, self._state_shapes(x.shape[0]), x.device)
        return TrapezoidState(*(layout.restart(part) for part in (state.phi, state.ssm, state.k, state.v)))

    def _project(self, x: Tensor, layout: Layout | None = None) -> _Scan:
        z, x, B, C, dt, A, lam, theta = self.in_proj(x).split(self.splits, dim=-1)
        dt = softplus_steps(dt, self.dt_bias, self.dt_limit, layout)
        rates = heavy_tail(wide(A)) if self.a_activation == "heavy_tail" else F.softplus(wide(A))
        gamma = wide(lam).sigmoid() * dt
        B, C = (t.unflatten(-1, (self.rank, self.ngroups, self.d_state)) for t in (B, C))
        return _Scan(
            x=x.unflatten(-1, (self.nheads, self.headdim)),
            log_decay=-rates.clamp(min=self.A_floor) * dt,
            gamma=gamma,
            beta=dt - gamma,
            theta=theta,
            B=self._normed(B, self.B_norm.weight),
            C=self._normed(C, self.C_norm.weight),
            z=z,
        )

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), self.norm_eps).to(x.dtype)

    def _parameters_of_scan(self) -> dict[str, Any]:
        ranks = self.mimo_x if self.rank > 1 else None
        return {
            "B_bias": self.B_bias,
            "C_bias": self.C_bias,
            "D": self.D,
            "x_rank": ranks,
            "rotation": self.rotation,
        }

    def _scan(self, scan: _Scan, state: TrapezoidState | None, index: Tensor | None) -> tuple[Tensor, TrapezoidState]:
        return trapezoid_ssd(*scan[:-1], state, **self._parameters_of_scan(), seq_idx=index, chunk_size=self.chunk_size)

    def _at_last_token(
        self, scan: _Scan, initial: TrapezoidState | None, final: TrapezoidState, count: Tensor
    ) -> TrapezoidState:
        """The final state with key and input of each row's last real token instead of its last position."""
        last = (count - 1).clamp(min=0)

        def pick(tensor: Tensor) -> Tensor:
            index = last.unflatten(0, (-1, *[1] * (tensor.dim() - 1)))
            return tensor.gather(1, index.expand(-1, 1, *tensor.shape[2:])).squeeze(1)

        k = _turn(_per_head(pick(scan.B), self.B_bias), final.phi[:, None], self.rotation)
        v = pick(scan.x)
        some = (count > 0)[:, None, None]
        before = torch.zeros_like(v) if initial is None else initial.v.to(v.dtype)
        v = torch.where(some, v, before)
        before = torch.zeros_like(k) if initial is None else initial.k.to(k.dtype)
        return TrapezoidState(final.phi, final.ssm, torch.where(some[..., None], k, before), v)

    def _matrix(self, scan: _Scan, before: TrapezoidState | None) -> tuple[Tensor, Tensor | None]:
        """(b, h, l, r, l, r), and what the outputs (b, l, r, h, p) have from the state."""
        dtype = scan.log_decay.dtype
        delta = math.pi * scan.theta.to(dtype).tanh()[:, :, None] * (scan.gamma + scan.beta)[..., None]
        # Differences of sums over a whole row need the digits of float64.
        phi = delta.double().cumsum(1)
        if before is not None:
            phi = phi + before.phi[:, None].double()
        phi = phi.remainder(2 * math.pi).to(dtype)[:, :, None]
        k = _turn(_per_head(scan.B, self.B_bias), phi, self.rotation)  # (b, l, r, h, n)
        q = _turn(_per_head(scan.C, self.C_bias), phi, self.rotation)
        diagonal = torch.eye(scan.x.shape[1], dtype=dtype, device=k.device)
        following = F.pad(scan.beta[:, 1:], (0, 0, 0, 1))
        weights = (scan.gamma + following).movedim(1, 2)[..., None, :] * (1 - diagonal)
        weights = weights + scan.gamma.movedim(1, 2)[..., None, :] * diagonal  # (b, h, t, s)
        weights = weights * decay_matrix(scan.log_decay)
        matrix = torch.einsum("btihn,bsjhn->bhtisj", q, k) * weights[:, :, :, None, :, None]
        same = torch.eye(self.rank, dtype=dtype, device=k.device)
        matrix = matrix + wide(self.D)[:, None, None, None, None] * diagonal[:, None, :, None] * same[:, None]
        if before is None:
            return matrix, None
        ranks = wide(self.mimo_x).movedim(1, 0) if self.rank > 1 else torch.ones_like(k[0, 0, :, :, :1])
        v = before.v.to(dtype)[:, None] * ranks  # (b, r, h, p)
        entering = before.ssm + scan.beta[:, 0, :, None, None] * torch.einsum("brhp,brhn->bhpn", v, before.k)
        from_state = torch.einsum("btihn,bhpn->btihp", q, entering)
        return matrix, from_state * scan.log_decay.cumsum(1).exp()[:, :, None, :, None]

    def _output(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate the outputs of the ranks, (..., r, h, p), join them and apply out_proj."""
        if self.rank == 1:
            return self.out_proj(self._gated(y.flatten(-3), z))
        factors, joining = (part.movedim(1, 0).to(z.dtype) for part in (self.mimo_z, self.mimo_o))  # (r, h, p)
        gates = z.unflatten(-1, (1, self.nheads, self.headdim)) * factors
        y = self._gated(y.flatten(-2), gates.flatten(-2)) * joining.flatten(-2)
        return self.out_proj(y.sum(-2))

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        if self.norm is None:
            return y * F.silu(z)
        weight = self.norm.weight
        return gated_norm(y, z, weight, eps=self.norm_eps, group_size=self.headdim, norm_before_gate=True)


def _per_head(tensor: Tensor, bias: Tensor) -> Tensor:
    """(..., r, g, n) -> (..., r, h, n), a value per head with its bias."""
    nheads = bias.shape[0]
    return wide(tensor).repeat_interleave(nheads // tensor.shape[-2], dim=-2) + wide(bias).movedim(1, 0)


def _turn(tensor: Tensor, angles: Tensor, rotation: str) -> Tensor:
    """Rotate pairs of the last dimension by `angles`, (..., s)."""
    count, size = angles.shape[-1], tensor.shape[-1]
    index = torch.arange(count, device=tensor.device)
    first, second = (index, index + size // 2) if rotation == "half" else (2 * index, 2 * index + 1)
    cos, sin = angles.cos(), angles.sin()
    a, b = tensor[..., first], tensor[..., second]
    turned = tensor.index_copy(-1, first, a * cos - b * sin)
    return turned.index_copy(-1, second, a * sin + b * cos)
