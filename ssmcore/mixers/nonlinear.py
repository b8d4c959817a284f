"""ParaGRU and ParaLSTM: nonlinear recurrent networks whose whole sequence is solved at once by Newton's method.

    GRU:   z = sigmoid(A_z h + w_z),  r = sigmoid(A_r h + w_r),  n = tanh(A_n (h r) + w_n),   w = B x + b
           h_t = (1 - z) h_{t-1} + z n
    LSTM:  f = sigmoid(A_f h + C_f c + w_f),   g = tanh(A_c h + w_c),   c_t = f c_{t-1} + (1 - f) g
           o = sigmoid(A_o h + C_o c_t + w_o),   h_t = o tanh(c_t)

Recurrent weights A and C are diagonal, so the Jacobian of a step is too (2 x 2 blocks for the LSTM), and a Newton
iteration is one linear scan. The last one carries the gradient, which with the Jacobian at the solution is that of
backpropagation through time.

Danieli, Rodriguez, Sarabia, Suau & Zappella (2025), "ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large
Language Models".
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from ...kernels import linear_scan
from ..init import no_weight_decay
from .block_scan import block_scan
from .common import (
    ConvSSMState,
    GatedRMSNorm,
    Layout,
    MixerState,
    Mode,
    check_heads,
    check_input,
    check_state,
    convolve,
    convolve_step,
    depthwise_conv,
    lay_out,
    linear_flops,
    recurrence_dtype,
    total_flops,
    wide,
)


class _ParaRNN(nn.Module, ABC):
    """Convolution, cells solved by Newton's method, gated norm; subclasses say what a cell is."""

    causal: ClassVar[bool] = True
    linear_in_x: ClassVar[bool] = False
    varlen: ClassVar[bool] = True
    state_type: ClassVar[type[MixerState]] = ConvSSMState
    _parts: ClassVar[tuple[int, ...]] = ()  # states of a unit
    _operations: ClassVar[tuple[int, int]]  # per unit: a cell; a Newton iteration

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 1,
        headdim: int = 64,
        d_conv: int = 4,
        bound: float = 1.0,
        max_iters: int = 8,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if bound <= 0 or max_iters < 1:
            raise ValueError(f"`bound` must be positive and `max_iters` at least 1, got {bound} and {max_iters}.")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        recurrence: dict[str, Any] = {"device": device, "dtype": recurrence_dtype(dtype)}
        self.d_model, self.headdim, self.bound, self.max_iters = d_model, headdim, bound, max_iters
        self.d_inner = int(expand * d_model)
        self.nheads = check_heads(self.d_inner, headdim, 1, 1)
        self.fallbacks = 0
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False, **factory)  # [z, x]
        self.conv1d = depthwise_conv(self.d_inner, d_conv, **factory)
        self.A = nn.Parameter(torch.randn(3, self.d_inner, **recurrence) * (2 / math.sqrt(5)))
        B = torch.empty(self.nheads, headdim, 3, headdim, **factory)
        self.B = nn.Parameter(B.uniform_(-math.sqrt(3 / headdim), math.sqrt(3 / headdim)))  # Xavier
        self.b = nn.Parameter(torch.zeros(3, self.d_inner, **recurrence))
        with torch.no_grad():
            self.b[0] = -torch.linspace(0, 1, self.d_inner)  # memories of several lengths
        self.norm = GatedRMSNorm(self.d_inner, eps=norm_eps, **factory)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False, **factory)
        no_weight_decay(self.A, self.b)

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return tuple(name for name in ("A", "C", "b") if name in self._parameters)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Mix whole sequences, see `prefill`."""
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
        z, u = self.in_proj(layout.align(x)).chunk(2, dim=-1)
        if state is None:
            state = self.init_state(x.shape[0], device=x.device, dtype=self._dtype(u))
        check_state(state, ConvSSMState, self._shapes(x.shape[0]), x.device)
        u, conv = convolve(u, self.conv1d, state.conv, layout)
        h, last = self._solve(self._drive(u), layout.restart(state.ssm), layout)
        y = self.out_proj(self.norm(self._output(h).to(z.dtype), z))
        return layout.restore(y), ConvSSMState(conv, last)

    def step(self, x: Tensor, state: ConvSSMState) -> tuple[Tensor, ConvSSMState]:
        """One position, (b, d).

        Raises:
            ValueError: if a shape is wrong or the state does not fit.
            TypeError: if the state is of another kind.
        """
        check_input(x, self.d_model, "b")
        check_state(state, ConvSSMState, self._shapes(x.shape[0]), x.device)
        z, u = self.in_proj(x).chunk(2, dim=-1)
        u, conv = convolve_step(u, self.conv1d, state.conv)
        h, _ = self._cell(state.ssm, self._drive(u))
        return self.out_proj(self.norm(self._output(h).to(z.dtype), z)), ConvSSMState(conv, h)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ConvSSMState:
        """State before the first position; `dtype` is that of the activations."""
        device, dtype = device or self.A.device, dtype or self.out_proj.weight.dtype
        shapes = self._shapes(batch)
        return ConvSSMState(
            torch.zeros(shapes["conv"], device=device, dtype=dtype),
            torch.zeros(shapes["ssm"], device=device, dtype=recurrence_dtype(dtype)),
        )

    def mixing_matrix(self, x: Tensor, *, state: ConvSSMState | None = None) -> NoReturn:
        """Not of this mixer.

        Raises:
            NotImplementedError: always; `omnissm.ssmcore.analysis.token_jacobian` serves nonlinear mixers.
        """
        raise NotImplementedError(
            f"{type(self).__name__} is not linear and has no mixing matrix; see ssmcore.analysis.token_jacobian."
        )

    def flops(self, l: int, *, mode: Mode = "prefill") -> int:  # noqa: E741
        """Operations of one sequence of length l, with `max_iters` Newton iterations, or of one position ("decode").

        A cell counts 14 operations per unit (LSTM 22), its Jacobian 14 more (26), a linear scan 5 (28).
        """
        n, (cell, iteration) = self.d_inner, self._operations
        position = (
            linear_flops(self.in_proj, self.out_proj) + 2 * self.conv1d.weight.numel() + 2 * self.B.numel() + 3 * n
        )
        if mode == "decode":
            return position + cell * n
        return total_flops({"maps": l * position, "newton": l * n * iteration * (self.max_iters + 1)}, mode)

    def state_numel(self) -> int:
        """Numbers in the state of one sequence."""
        return sum(math.prod(shape) for shape in self._shapes(1).values())

    def extra_repr(self) -> str:
        """Shown by repr()."""
        return f"d_inner={self.d_inner}, headdim={self.headdim}, bound={self.bound}, max_iters={self.max_iters}"

    def _shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        conv = (batch, self.d_inner, self.conv1d.kernel_size[0] - 1)
        return {"conv": conv, "ssm": (batch, *self._parts, self.d_inner)}

    def _dtype(self, u: Tensor) -> torch.dtype:
        """float64 where a parameter is; else the dtype of the activations."""
        return torch.float64 if self.A.dtype == torch.float64 else u.dtype

    def _drive(self, u: Tensor) -> Tensor:
        """B x + b of the three gates, (..., d_inner) -> (..., 3, d_inner), at least float32."""
        heads = u.unflatten(-1, (self.nheads, self.headdim))
        w = torch.einsum("...hi,higj->...ghj", heads, self.B.to(u.dtype))
        return wide(w).flatten(-2) + wide(self.b)

    @abstractmethod
    def _cell(self, h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """One step f(h) and its derivative in h: (..., *parts, n) and (..., 3, n) -> f and (..., *parts, *parts, n)."""

    @abstractmethod
    def _output(self, h: Tensor) -> Tensor:
        """What is read of the states, (..., *parts, n) -> (..., n)."""

    @abstractmethod
    def _times(self, slope: Tensor, h: Tensor) -> Tensor:
        """A derivative applied to states."""

    @abstractmethod
    def _scan(self, slope: Tensor, b: Tensor, start: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """h_t = slope_t h_{t-1} + b_t of all positions, and the last."""

    def _bounded(self, weight: Tensor) -> tuple[Tensor, ...]:
        weight = wide(weight)
        # The gradient passes through the clip: a quarter of the weights starts beyond it and could never come back.
        return (weight.clamp(-self.bound, self.bound).detach() + (weight - weight.detach())).unbind()

    def _solve(self, w: Tensor, start: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """All states (b, l, *parts, n) and the last (b, *parts, n), for w (b, l, 3, n)."""
        if not torch.compiler.is_compiling() and not w.shape[1]:
            return start[:, None][:, :0], start

        def linearised(h: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            """f at the states before, its derivative there, and the part of f that is not linear in them."""
            before = self._before(h, start.detach(), layout)
            f, slope = self._cell(before, w)
            slope = slope.detach()
            if layout.mask is not None:  # padding lets the state pass
                f = torch.where(_over(layout.mask, f), f, before)
                identity = self._identity(slope)
                slope = torch.where(_over(layout.mask, slope), slope, identity)
            return f, slope, f - self._times(slope, before)

        with torch.no_grad():
            h = self._newton(linearised, start, layout)
            if h is None:
                h = self._loop(w, start, layout)
        _, slope, rest = linearised(h)
        return self._scan(slope, rest, start, layout)

    @staticmethod
    def _identity(slope: Tensor) -> Tensor:
        """The derivative of passing states on."""
        return torch.ones_like(slope)

    def _newton(
        self, linearised: Callable[[Tensor | None], tuple[Tensor, Tensor, Tensor]], start: Tensor, layout: Layout
    ) -> Tensor | None:
        """States by Newton's method, or None where it does not converge."""
        h, _, _ = linearised(None)
        # The iteration that carries the gradient comes on top and squares what is left of the states' error; that of
        # the gradient is of the size of the residual, since its Jacobian is taken here.
        enough = 0.1 * torch.finfo(h.dtype).eps ** (2 / 3)  # 4e-12, float32: 2e-6
        for iteration in range(self.max_iters + 1):
            f, slope, rest = linearised(h)
            if not torch.compiler.is_compiling():
                residual = float((f - h).abs().max()) if f.numel() else 0.0
                if residual < enough:
                    return h
                if not math.isfinite(residual):
                    break
            if iteration < self.max_iters:
                h, _ = self._scan(slope, rest, start, layout)
        if torch.compiler.is_compiling():
            return h
        if not self.fallbacks:
            warnings.warn(
                f"Newton's method did not converge in {self.max_iters} iterations with bound={self.bound}; positions "
                "are done one by one. Later cases are counted in `fallbacks`; a lower `bound` avoids them.",
                stacklevel=2,
            )
        self.fallbacks += 1
        return None

    def _loop(self, w: Tensor, start: Tensor, layout: Layout) -> Tensor:
        """States one after another."""
        h, found = start, []
        for t in range(w.shape[1]):
            if t and layout.index is not None:
                same = layout.index[:, t] == layout.index[:, t - 1]
                h = torch.where(_over(same, h), h, torch.zeros_like(h))
            after, _ = self._cell(h, w[:, t])
            h = after if layout.mask is None else torch.where(_over(layout.mask[:, t], h), after, h)
            found.append(h)
        return torch.stack(found, dim=1)

    def _before(self, h: Tensor | None, start: Tensor, layout: Layout) -> Tensor:
        """The state that every position starts from, (b, l, ...) or, without states yet, (b, 1, ...) of zeros."""
        if h is None:
            return torch.zeros_like(start)[:, None]
        first = torch.arange(h.shape[1], device=h.device) == 0
        before = torch.where(_over(first[None], h), start[:, None], h.roll(1, 1))
        if layout.index is None:
            return before
        return torch.where(_over(_starts(layout.index), h), torch.zeros_like(before), before)


def _over(flags: Tensor, x: Tensor) -> Tensor:
    """Flags of the first dimensions of x, to be broadcast over the others."""
    return flags.reshape(*flags.shape, *[1] * (x.dim() - flags.dim()))


def _starts(index: Tensor) -> Tensor:
    """Where another sequence begins than the row's first, (b, l)."""
    return (index != index.roll(1, 1)) & (torch.arange(index.shape[1], device=index.device) > 0)


class ParaGRU(_ParaRNN):
    """Causal, nonlinear sequence mixer: convolution, gated recurrent units with diagonal recurrence, gated norm.

    A (3, d_inner) and the gates of B and b are in the order z, r, n.

    Args:
        d_model: Width of the stream.
        expand: d_inner = expand * d_model, the number of units.
        headdim: Units of a head; the input map B is block diagonal in heads.
        d_conv: Width of the causal convolution.
        bound: Recurrent weights are clipped to [-bound, bound], with the gradient of what is not clipped. Newton's
            method converges up to 1, mostly up to 1.5.
        max_iters: Newton iterations before the loop over positions takes over.
        norm_eps: Of the gated norm.
        device: Where to create the parameters.
        dtype: Their dtype; A and b are float32 at least.

    Raises:
        ValueError: if a size is out of range.

    Attributes:
        fallbacks: How often Newton's method did not converge and the loop was run; the first time warns. Compiled and
            exported code always does `max_iters` iterations and does not look.
    """

    _operations: ClassVar[tuple[int, int]] = (14, 33)

    def _cell(self, h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """One step f(h) and its derivative in h: (..., n) and (..., 3, n) -> (..., n) each."""
        A_z, A_r, A_n = self._bounded(self.A)
        w_z, w_r, w_n = w.unbind(-2)
        z, r = (A_z * h + w_z).sigmoid(), (A_r * h + w_r).sigmoid()
        n = (A_n * (h * r) + w_n).tanh()
        through_z = z * (1 - z) * A_z * (n - h)
        through_n = z * (1 - n.square()) * A_n * (r + h * r * (1 - r) * A_r)
        return (1 - z) * h + z * n, (1 - z) + through_z + through_n

    def _output(self, h: Tensor) -> Tensor:
        return h

    def _times(self, slope: Tensor, h: Tensor) -> Tensor:
        return slope * h

    def _scan(self, slope: Tensor, b: Tensor, start: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        return linear_scan(slope, b, start, seq_idx=layout.index)


class ParaLSTM(_ParaRNN):
    """Causal, nonlinear sequence mixer: convolution, LSTM cells with diagonal recurrence and peepholes, gated norm.

    The input gate is 1 minus the forget gate. A (3, d_inner) and the gates of B and b are in the order f, o, c; C
    (2, d_inner), the peepholes, is in the order f, o. A state holds c and h, (b, 2, d_inner).

    Args:
        d_model: Width of the stream.
        expand: d_inner = expand * d_model, the number of units.
        headdim: Units of a head; the input map B is block diagonal in heads.
        d_conv: Width of the causal convolution.
        bound: Recurrent weights are clipped to [-bound, bound], with the gradient of what is not clipped. Newton's
            method converges up to 1, mostly up to 1.5.
        max_iters: Newton iterations before the loop over positions takes over.
        norm_eps: Of the gated norm.
        device: Where to create the parameters.
        dtype: Their dtype; A, C and b are float32 at least.

    Raises:
        ValueError: if a size is out of range.

    Attributes:
        fallbacks: How often Newton's method did not converge and the loop was run; the first time warns. Compiled and
            exported code always does `max_iters` iterations and does not look.
    """

    _parts: ClassVar[tuple[int, ...]] = (2,)
    _operations: ClassVar[tuple[int, int]] = (22, 76)

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 1,
        headdim: int = 64,
        d_conv: int = 4,
        bound: float = 1.0,
        max_iters: int = 8,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            expand=expand,
            headdim=headdim,
            d_conv=d_conv,
            bound=bound,
            max_iters=max_iters,
            norm_eps=norm_eps,
            device=device,
            dtype=dtype,
        )
        self.C = nn.Parameter(torch.randn_like(self.A[:2]) * (2 / math.sqrt(5)))
        no_weight_decay(self.C)

    def _cell(self, h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        (A_f, A_o, A_c), (C_f, C_o) = self._bounded(self.A), self._bounded(self.C)
        w_f, w_o, w_c = w.unbind(-2)
        c, h = h.unbind(-2)
        f, g = (A_f * h + C_f * c + w_f).sigmoid(), (A_c * h + w_c).tanh()
        after = f * c + (1 - f) * g
        o, read = (A_o * h + C_o * after + w_o).sigmoid(), after.tanh()
        through_f, through_o = f * (1 - f) * (c - g), o * (1 - o) * read
        c_c, c_h = f + through_f * C_f, through_f * A_f + (1 - f) * (1 - g.square()) * A_c
        h_after = through_o * C_o + o * (1 - read.square())
        to_h = torch.stack([h_after * c_c, h_after * c_h + through_o * A_o], dim=-2)
        slope = torch.stack([torch.stack([c_c, c_h], dim=-2), to_h], dim=-3)
        return torch.stack([after, o * read], dim=-2), slope

    def _output(self, h: Tensor) -> Tensor:
        return h[..., 1, :]

    def _times(self, slope: Tensor, h: Tensor) -> Tensor:
        return (slope * h[..., None, :, :]).sum(-2)

    @staticmethod
    def _identity(slope: Tensor) -> Tensor:
        return torch.eye(2, dtype=slope.dtype, device=slope.device)[..., None].expand_as(slope)

    def _scan(self, slope: Tensor, b: Tensor, start: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        if layout.index is not None:
            slope = torch.where(_over(_starts(layout.index), slope), torch.zeros_like(slope), slope)
        states = block_scan(slope, b, start)
        return states, states[:, -1]
