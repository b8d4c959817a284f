"""Hydra: a quasiseparable matrix mixer, two recurrences from both ends and a free diagonal.

    [z, x, B_f, C_f, B_b, C_b, dt_f, dt_b] = in_proj(u);    conv (centred) and silu on [x, B_f, C_f, B_b, C_b]
    y = shift_right(ssd(dt_f x, dt_f A, B_f, C_f)) + shift_left(reversed ssd(dt_b x, dt_b A, B_b, C_b))
        + (fc_D(x) + D) x
    out_proj(norm(y) * silu(z))

Hwang, Lahoti, Dao & Gu (2024), "Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers", section 3.
Parameter names are those of the published code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import causal_conv1d, quasiseparable
from ..init import dt_bias_init, no_weight_decay
from .common import (
    GatedRMSNorm,
    Layout,
    MixingMatrix,
    Mode,
    bidirectional_only,
    check_dt_limit,
    check_heads,
    check_input,
    decay_matrix,
    decay_since_start,
    depthwise_conv,
    lay_out,
    linear_flops,
    read_states,
    recurrence_dtype,
    softplus_steps,
    total_flops,
    wide,
)
from .effective import effective_matrix


class _Side(NamedTuple):
    """One of the two recurrences."""

    dt: Tensor  # (b, l, h)
    log_decay: Tensor  # (b, l, h)
    B: Tensor  # (b, l, g, n)
    C: Tensor  # (b, l, g, n)


class Hydra(nn.Module):
    """Bidirectional mixer (b, l, d) -> (b, l, d); neither residual nor norm inside.

    Args:
        d_model: Width of the stream.
        d_state: States n per channel and direction.
        d_conv: Width of the centred convolution, odd, 1 to 7.
        expand: d_inner = expand * d_model.
        headdim: Channels p of a head.
        ngroups: Groups of heads that share B and C.
        dt_min: Shortest initial step.
        dt_max: Longest initial step.
        dt_init_floor: Initial steps below are raised to it.
        dt_limit: Smallest and largest step, applied after the softplus.
        norm_eps: Of the norm before the gate.
        bias: Of the two projections.
        conv_bias: Of the convolution.
        conv_init: Draw the convolution's weight from [-conv_init, conv_init]; None is torch's default.
        learnable_init_states: Learn the state before either end of every sequence, one for both (zero at first).
        chunk_size: Positions per chunk of the scans; None lets the operator choose. Does not change results.
        device: Where to create the parameters.
        dtype: Their dtype; those of the recurrence are float32 at least.

    Raises:
        ValueError: if sizes do not fit together or a range is empty.
    """

    causal: ClassVar[bool] = False
    linear_in_x: ClassVar[bool] = True
    varlen: ClassVar[bool] = True
    state_type: ClassVar[None] = None

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        d_conv: int = 7,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: Sequence[float] = (0.0, math.inf),
        norm_eps: float = 1e-5,
        bias: bool = False,
        conv_bias: bool = True,
        conv_init: float | None = None,
        learnable_init_states: bool = False,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_conv % 2 == 0:
            raise ValueError(f"`d_conv` must be odd, the convolution is centred; got {d_conv}.")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        recurrence: dict[str, Any] = {"device": device, "dtype": recurrence_dtype(dtype)}
        self.d_model, self.d_state, self.headdim, self.ngroups = d_model, d_state, headdim, ngroups
        self.d_inner = int(expand * d_model)
        self.nheads = check_heads(self.d_inner, headdim, ngroups, d_state)
        self.dt_limit = check_dt_limit(dt_limit)
        self.chunk_size = chunk_size
        conv_channels = self.d_inner + 4 * ngroups * d_state
        self.splits = [self.d_inner, conv_channels, self.nheads, self.nheads]  # z, [x, B_f, C_f, B_b, C_b], dt_f, dt_b

        self.in_proj = nn.Linear(d_model, sum(self.splits), bias=bias, **factory)
        self.conv1d = depthwise_conv(conv_channels, d_conv, bias=conv_bias, init=conv_init, **factory)
        self.dt_bias = nn.Parameter(dt_bias_init(self.nheads, dt_min, dt_max, dt_floor=dt_init_floor, **recurrence))
        self.A_log = nn.Parameter(torch.zeros(self.nheads, **recurrence))
        self.D = nn.Parameter(torch.ones(self.nheads, **recurrence))
        self.fc_D = nn.Linear(self.d_inner, self.nheads, bias=False, **factory)
        self.norm = GatedRMSNorm(self.d_inner, eps=norm_eps, norm_before_gate=True, **factory)
        if learnable_init_states:
            self.init_states = nn.Parameter(torch.zeros(self.nheads, headdim, d_state, **recurrence))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        no_weight_decay(*(self.get_parameter(name) for name in self.no_decay_names()))

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return tuple(name for name in ("dt_bias", "A_log", "D", "init_states") if name in self._parameters)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Mix whole sequences.

        Args:
            x: (b, l, d).
            mask: True at real tokens, (b, l) bool; contiguous in each row. Outputs at padding are 0.
            seq_idx: Which packed sequence a position belongs to, (b, l) integers; sequences do not see each other.

        Returns:
            (b, l, d).

        Raises:
            ValueError: if a shape is wrong or a mask has holes.
            TypeError: if a dtype is wrong.
        """
        check_input(x, self.d_model)
        layout = lay_out(x, mask, seq_idx, align=False)
        z, xBC, *dt = self.in_proj(x).split(self.splits, dim=-1)
        y, *_ = self._mix(self._convolve(xBC, layout), dt, layout)
        return layout.restore(self.out_proj(self.norm(y.flatten(2), z)))

    def prefill(self, *_: Any, **__: Any) -> NoReturn:
        """Not of this mixer.

        Raises:
            TypeError: always.
        """
        raise bidirectional_only(self)

    step = init_state = prefill

    def mixing_matrix(
        self, x: Tensor, *, state: None = None, effective: bool = False, channels: Sequence[int] | None = None
    ) -> MixingMatrix:
        """The quasiseparable operator on these inputs, one matrix per head.

            s < t:  C^f_{t-1}.B^f_s exp(sum_{s<j<=t-1} dt^f_j A) dt^f_s;    s > t: the mirror image
            s = t:  fc_D(x)_t + D

        Args:
            x: (b, l, d).
            state: None; there is no state.
            effective: Count gate and convolution in: the operator from the x slice of in_proj to the gated signal, one
                matrix per channel. The norm is left out.
            channels: Which of the d_inner channels an effective matrix is wanted for; None: all.

        Raises:
            ValueError: if the shape is wrong.
            TypeError: if a state is given.
        """
        check_input(x, self.d_model)
        if state is not None:
            raise bidirectional_only(self)
        z, xBC, *dt = self.in_proj(x).split(self.splits, dim=-1)
        y, heads, diagonal, forward, backward = self._mix(self._convolve(xBC, Layout()), dt, Layout())
        lower = self._one_side(forward)
        flipped = self._one_side(_Side(*(part.flip(1) for part in backward))).flip(2, 3)
        matrix = lower + flipped + torch.diag_embed(diagonal.mT)
        learned = self._learned()
        from_state = None
        if learned is not None:
            first = torch.zeros(x.shape[:2], dtype=torch.int32, device=x.device)
            from_state = self._from_learned(learned, forward, backward, first)
        inputs, outputs = wide(heads), wide(y)
        if not effective:
            return MixingMatrix(matrix, inputs, outputs, from_state)
        chosen = torch.arange(self.d_inner, device=x.device)
        chosen = chosen if channels is None else chosen[list(channels)]
        plain = MixingMatrix(
            matrix[:, chosen // self.headdim],
            inputs.flatten(2)[..., chosen, None],
            outputs.flatten(2)[..., chosen, None],
            None if from_state is None else from_state.flatten(2)[..., chosen, None],
        )
        gate = F.silu(wide(z)[..., chosen])
        return effective_matrix(plain, xBC[..., chosen], gate, self.conv1d, chosen, symmetric=True)

    def flops(self, l: int, *, mode: Mode = "prefill") -> int:  # noqa: E741
        """Multiplications and additions for one sequence of length l."""
        return total_flops(self.flops_parts(l, mode=mode), mode)

    def flops_parts(self, l: int, *, mode: Mode = "prefill") -> dict[str, int]:  # noqa: E741
        """Those of the forward pass by part: "projections", "convolution" and "scan" (both directions).

        Raises:
            TypeError: for mode "decode".
        """
        if mode == "decode":
            raise bidirectional_only(self)
        q = min(self.chunk_size or 128, l)
        one = 2 * q * self.d_state * self.ngroups + 2 * q * self.d_inner + 4 * self.d_inner * self.d_state
        return {
            "projections": l * linear_flops(self.in_proj, self.fc_D, self.out_proj),
            "convolution": l * 2 * self.conv1d.weight.numel(),
            "scan": 2 * l * one,
        }

    def state_numel(self) -> int:
        """There is no state: 0."""
        return 0

    def extra_repr(self) -> str:
        """Shown by repr()."""
        return f"d_state={self.d_state}, headdim={self.headdim}, ngroups={self.ngroups}"

    def _learned(self) -> Tensor | None:
        """The learned initial state, (h, p, n)."""
        return self._parameters.get("init_states")

    def _convolve(self, xBC: Tensor, layout: Layout) -> Tensor:
        """Centred convolution and SiLU; zero at padding before (it is no neighbour) and after (nothing enters)."""
        y, _ = causal_conv1d(
            layout.zero_padding(xBC), self.conv1d.weight[:, 0], self.conv1d.bias, symmetric=True, seq_idx=layout.index
        )
        return layout.zero_padding(y)

    def _mix(self, xBC: Tensor, dt: Sequence[Tensor], layout: Layout) -> tuple[Tensor, Tensor, Tensor, _Side, _Side]:
        """Outputs (b, l, h, p), inputs (b, l, h, p), the diagonal (b, l, h) and both recurrences."""
        x, *maps = xBC.split([self.d_inner, *4 * [self.ngroups * self.d_state]], dim=-1)
        maps = [t.unflatten(-1, (self.ngroups, self.d_state)) for t in maps]
        steps = [softplus_steps(raw, self.dt_bias, self.dt_limit, layout) for raw in dt]
        rate = -wide(self.A_log).exp()
        forward = _Side(steps[0], steps[0] * rate, *maps[:2])
        backward = _Side(steps[1], steps[1] * rate, *maps[2:])
        # Rows of one matrix: torch.compile makes a product for each sample of a slice in three dimensions.
        diagonal = wide(self.fc_D(x.flatten(0, 1)).view(steps[0].shape)) + wide(self.D)
        heads = x.unflatten(-1, (self.nheads, self.headdim))
        y, _ = quasiseparable(
            heads,
            forward.log_decay,
            forward.dt,
            forward.B,
            forward.C,
            backward.log_decay,
            backward.dt,
            backward.B,
            backward.C,
            diagonal,
            seq_idx=layout.index,
            chunk_size=self.chunk_size,
        )
        if (learned := self._learned()) is not None:
            index = x.new_zeros(x.shape[:2], dtype=torch.int32) if layout.index is None else layout.index
            y = (wide(y) + self._from_learned(learned, forward, backward, index)).to(y.dtype)
        return y, heads, diagonal, forward, backward

    def _from_learned(self, learned: Tensor, forward: _Side, backward: _Side, index: Tensor) -> Tensor:
        """What the learned state adds, (b, l, h, p): it decays from both ends of every sequence."""
        mirrored = _Side(*(part.flip(1) for part in backward))
        from_left = _shift_right(self._decayed(learned, forward, index), index)
        from_right = _shift_right(self._decayed(learned, mirrored, -index.flip(1)), -index.flip(1))
        return from_left + from_right.flip(1)

    def _decayed(self, learned: Tensor, side: _Side, index: Tensor) -> Tensor:
        return read_states(side.C, learned) * decay_since_start(side.log_decay, index)[..., None]

    def _one_side(self, side: _Side) -> Tensor:
        """Strictly lower part of the matrix, (b, h, l, l): rows of the plain recurrence, one lower."""
        with torch.autocast(side.B.device.type, enabled=False):
            scores = wide(side.C).movedim(1, 2) @ wide(side.B).permute(0, 2, 3, 1)
        scores = scores.repeat_interleave(self.nheads // self.ngroups, dim=1)
        rows = scores * decay_matrix(side.log_decay) * side.dt.movedim(1, 2)[..., None, :]
        return F.pad(rows, (0, 0, 1, 0))[:, :, :-1]


def _shift_right(y: Tensor, index: Tensor) -> Tensor:
    """y of the position before, zero at the start of a sequence; (b, l, h, p)."""
    same = (index == index.roll(1, 1)) & (torch.arange(index.shape[1], device=index.device) > 0)
    return torch.where(same[..., None, None], y.roll(1, 1), torch.zeros_like(y))
