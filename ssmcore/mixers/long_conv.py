"""Long convolutions whose kernels no recurrence ties: learned tap by tap, or by a network of the position.

    long_conv:  z = gelu(K * x + D x);   output = glu(out_proj(z)),      K_t shrunk towards 0 by a threshold
    monarch:    [q, k, v] = conv(in_proj(x));   output = out_proj(q (K * kv + D kv) + K' * x + D' x)
                K_t = MLP(features of t) exp(-|rate| t / L),             sines as activations

Fu et al. (2023), "Simple Hardware-Efficient Long Convolutions for Sequence Modeling"; Fu et al. (2023), "Monarch
Mixer", with the filters of Poli et al. (2023), "Hyena". Kernels reach `max_len` positions, inputs may be longer.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import causal_conv1d, fft_conv
from ..init import no_weight_decay
from .common import (
    Layout,
    MixerState,
    MixingMatrix,
    Mode,
    check_input,
    check_state,
    convolve,
    depthwise_conv,
    linear_flops,
    mixer_state,
    recurrence_dtype,
    require_causal,
    total_flops,
    wide,
)
from .rows import RowMixer


@mixer_state
class LongConvState(MixerState):
    """State of `LongConv`: the last max_len - 1 inputs, oldest first, (b, d, max_len - 1)."""

    x: Tensor


@mixer_state
class MonarchState(MixerState):
    """State of `MonarchMixer`.

    Attributes:
        conv: Inputs of the short convolution, (b, 3 d, 2).
        kv: The last max_len - 1 products of keys and values, oldest first, (b, d, max_len - 1).
        x: The last max_len - 1 inputs, (b, d, max_len - 1).
    """

    conv: Tensor
    kv: Tensor
    x: Tensor


class _LongConv(RowMixer):
    """What mixers by long convolution share; see the subclasses."""

    linear_in_x: ClassVar[bool] = True
    max_len: int
    D: nn.Parameter

    def extra_repr(self) -> str:
        """Shown by repr()."""
        return f"max_len={self.max_len}, causal={self.causal}"

    def _dtype(self, x: Tensor) -> torch.dtype:
        """float64 where the parameters are; under autocast its dtype; else that of the input."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return super()._dtype(x)

    def _matrix(self, kernels: Tensor, D: Tensor, x: Tensor, before: Tensor | None) -> MixingMatrix:
        """The Toeplitz matrix of every channel, (1, d, l, l), acting on x (b, l, d)."""
        length = x.shape[1]
        place = torch.arange(length, device=x.device)
        lag = place[:, None] - place
        taps = F.pad(kernels, (0, max(length - self.max_len, 0)))
        matrix = torch.where(lag >= 0, taps[0][:, lag.clamp(min=0)], 0.0)
        if not self.causal:
            matrix = matrix + torch.where(lag < 0, taps[1][:, (-lag - 1).clamp(min=0)], 0.0)
        matrix = matrix + torch.diag_embed(wide(D)[:, None].expand(-1, length))
        y, _ = _convolved(x, kernels, D, before, Layout())
        from_state = None
        if before is not None:
            from_state = wide(_convolved(torch.zeros_like(x), kernels, D, before, Layout())[0])[..., None]
        return MixingMatrix(matrix[None], wide(x)[..., None], wide(y)[..., None], from_state)

    def _fft_flops(self, l: int, mode: Mode, count: int) -> int:  # noqa: E741
        """Of `count` convolutions: 2.5 n log2 n for an FFT of n real numbers; in one step products with all taps."""
        if mode == "decode":
            return count * 2 * self.max_len * self.d_model
        transforms = (3 if self.causal else 4) * 5 * l * math.ceil(math.log2(max(2 * l, 2)))
        return count * self.d_model * (transforms + 8 * l)


class LongConv(_LongConv):
    """Sequence mixer by one learned kernel per channel, causal or two-sided, then a gated linear map.

    Args:
        d_model: Width d.
        max_len: Taps of a kernel, positions it reaches back and, two-sided, ahead.
        bidirectional: Add a second kernel that looks ahead; there is no state then.
        threshold: Taps smaller than it are zero, others that much smaller: sign(K) max(|K| - threshold, 0).
        dropout: Dropout between activation and output map.
        device: Where to create the parameters.
        dtype: Floating dtype of the output map; kernels are at least float32.

    Raises:
        ValueError: if a size is out of range.
    """

    state_type: ClassVar[type[MixerState]] = LongConvState

    def __init__(
        self,
        d_model: int,
        *,
        max_len: int = 1024,
        bidirectional: bool = False,
        threshold: float = 0.003,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if max_len < 1 or threshold < 0:
            raise ValueError(f"`max_len` must be at least 1 and `threshold` not negative, got {max_len}, {threshold}.")
        self.d_model, self.max_len, self.causal, self.threshold = d_model, max_len, not bidirectional, threshold
        real: dict[str, Any] = {"device": device, "dtype": recurrence_dtype(dtype)}
        # Noise of unit energy that fades within 1 to max_len positions, from the first channel to the last.
        reach = torch.logspace(0, math.log10(max_len), d_model, **real)[:, None]
        envelope = torch.exp(-torch.arange(max_len, **real) / reach)
        envelope = envelope / envelope.square().sum(1, keepdim=True).sqrt()
        self.kernel = nn.Parameter(torch.randn(2 if bidirectional else 1, d_model, max_len, **real) * envelope)
        self.D = nn.Parameter(torch.randn(d_model, **real))
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(d_model, 2 * d_model, device=device, dtype=dtype)
        no_weight_decay(self.D, self.kernel)

    def lr_names(self) -> tuple[str, ...]:
        """Parameters with their own learning rate and no weight decay."""
        return ("kernel",)

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("kernel", "D")

    def mixing_matrix(self, x: Tensor, *, state: LongConvState | None = None) -> MixingMatrix:
        """The Toeplitz matrix of every channel, (1, d, l, l), before activation and output map."""
        check_input(x, self.d_model)
        if state is not None:
            require_causal(self)
            check_state(state, LongConvState, self._shapes(x.shape[0]), x.device)
        return self._matrix(self._kernels(), self.D, x, None if state is None else state.x)

    def flops(self, l: int, *, mode: Mode = "prefill") -> int:  # noqa: E741
        """Operations of one sequence of length l, or of one position ("decode")."""
        positions = 1 if mode == "decode" else l
        return total_flops({"out": positions * linear_flops(self.out_proj), "fft": self._fft_flops(l, mode, 1)}, mode)

    def _shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return {"x": (batch, self.d_model, self.max_len - 1)}

    def _kernels(self) -> Tensor:
        kernel = wide(self.kernel)
        return kernel.sign() * (kernel.abs() - self.threshold).relu()

    def _mix(self, x: Tensor, state: LongConvState | None, layout: Layout) -> tuple[Tensor, LongConvState | None]:
        y, last = _convolved(x, self._kernels(), self.D, None if state is None else state.x, layout)
        y = F.glu(self.out_proj(self.dropout(F.gelu(y.to(x.dtype)))), dim=-1)
        return y, None if state is None else LongConvState(last.to(state.x.dtype))


class HyenaFilter(nn.Module):
    """A kernel of `max_len` taps per channel as a function of the position.

    Args:
        d_model: Channels d.
        max_len: Taps L.
        features: Of a position t: t / L, and cosines and sines of (features - 1) / 2 frequencies; odd, at least 3.
        order: Width of the two hidden layers.
        frequency: Initial frequencies of the sines between the layers.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if a size is out of range.

    Source: Poli et al. (2023), section 3.3.
    """

    def __init__(
        self,
        d_model: int,
        max_len: int,
        *,
        features: int = 5,
        order: int = 64,
        frequency: float = 10.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if features < 3 or features % 2 == 0 or order < 1 or max_len < 1:
            raise ValueError(
                "`features` must be odd and at least 3, `order` and `max_len` at least 1; "
                f"got {features}, {order} and {max_len}."
            )
        factory: dict[str, Any] = {"device": device, "dtype": recurrence_dtype(dtype)}
        self.max_len, self.bands = max_len, (features - 1) // 2
        sizes = (features, order, order)
        self.hidden = nn.ModuleList(nn.Linear(i, order, **factory) for i in sizes)
        self.frequency = nn.Parameter(torch.full((order,), frequency, **factory))
        self.out = nn.Linear(order, d_model, bias=False, **factory)
        # Channels fade to 1 % within 0.3 to 1.5 times the length.
        rate = torch.linspace(math.log(100) / 1.5, math.log(100) / 0.3, d_model, **factory)
        self.rate = nn.Parameter(rate)

    def forward(self) -> Tensor:
        """The taps, (d, L)."""
        weight = wide(self.rate)
        with torch.autocast(weight.device.type, enabled=False):
            place = torch.arange(self.max_len, device=weight.device, dtype=weight.dtype)[:, None] / self.max_len
            angle = 2 * math.pi * place * torch.linspace(1e-4, self.bands - 1, self.bands).to(weight)
            h = torch.cat([place, angle.cos(), angle.sin()], dim=-1)
            for layer in self.hidden:
                weights = (wide(layer.get_parameter(name)) for name in ("weight", "bias"))
                h = torch.sin(wide(self.frequency) * F.linear(h, *weights))
            taps = F.linear(h, wide(self.out.weight)) * torch.exp(-place * weight.abs())
        return taps.mT


class MonarchMixer(_LongConv):
    """Sequence mixer by gated long convolutions with filters from `HyenaFilter`, causal or two-sided.

    Args:
        d_model: Width d.
        max_len: Taps of a filter, positions it reaches back and, two-sided, ahead.
        bidirectional: Add filters that look ahead; there is no state then.
        residual_conv: Add a long convolution of the input beside the gated one.
        features: Of a position, for the filters; odd.
        order: Width of the filters' hidden layers.
        device: Where to create the parameters.
        dtype: Their dtype; filters are float32 at least.

    Raises:
        ValueError: if a size is out of range.
    """

    state_type: ClassVar[type[MixerState]] = MonarchState

    def __init__(
        self,
        d_model: int,
        *,
        max_len: int = 1024,
        bidirectional: bool = False,
        residual_conv: bool = True,
        features: int = 5,
        order: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        real: dict[str, Any] = {"device": device, "dtype": recurrence_dtype(dtype)}
        self.d_model, self.max_len, self.causal, self.residual_conv = d_model, max_len, not bidirectional, residual_conv
        self.in_proj = nn.Linear(d_model, 3 * d_model, **factory)  # [q, k, v]
        self.conv1d = depthwise_conv(3 * d_model, 3, **factory)
        sides = 2 if bidirectional else 1
        sizes: dict[str, Any] = {"features": features, "order": order}
        self.filters = nn.ModuleList(HyenaFilter(d_model, max_len, **sizes, **factory) for _ in range(sides))
        self.D = nn.Parameter(torch.randn(d_model, **real))
        if residual_conv:
            self.residual = nn.ModuleList(HyenaFilter(d_model, max_len, **sizes, **factory) for _ in range(sides))
            self.residual_D = nn.Parameter(torch.randn(d_model, **real))
        self.out_proj = nn.Linear(d_model, d_model, **factory)
        no_weight_decay(*(self.get_parameter(name) for name in self.no_decay_names()))

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        ends = ("D", "rate", "frequency", "bias")
        return tuple(name for name, _ in self.named_parameters() if name.endswith(ends))

    def mixing_matrix(self, x: Tensor, *, state: MonarchState | None = None) -> MixingMatrix:
        """The Toeplitz matrix of every channel, (1, d, l, l), on k v and before q; without the residual convolution."""
        check_input(x, self.d_model)
        if state is not None:
            require_causal(self)
            check_state(state, MonarchState, self._shapes(x.shape[0]), x.device)
        _, kv, _ = self._project(x, None if state is None else state.conv, Layout())
        return self._matrix(_taps(self.filters), self.D, kv, None if state is None else state.kv)

    def flops(self, l: int, *, mode: Mode = "prefill") -> int:  # noqa: E741
        """Operations of one sequence of length l, or of one position ("decode"); filters count in all but steps."""
        positions = 1 if mode == "decode" else l
        linear = linear_flops(self.in_proj, self.out_proj) + 2 * self.conv1d.weight.numel() + 3 * self.d_model
        filters = [*self.filters, *(self.residual if self.residual_conv else [])]
        weights = sum(p.numel() for one in filters for p in one.parameters())
        parts = {"linear": positions * linear, "fft": self._fft_flops(l, mode, 1 + self.residual_conv)}
        return total_flops(parts | {"filters": 0 if mode == "decode" else 2 * weights * self.max_len}, mode)

    def _shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        held = (batch, self.d_model, self.max_len - 1)
        return {"conv": (batch, 3 * self.d_model, 2), "kv": held, "x": held if self.residual_conv else (batch, 0, 0)}

    def _project(self, x: Tensor, before: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """q and k v (b, l, d), zero at padding, and the inputs of the short convolution to go on with."""
        qkv = layout.zero_padding(self.in_proj(x))
        if self.causal:
            qkv, last = convolve(qkv, self.conv1d, before, layout, activation=None)
        else:
            qkv, last = causal_conv1d(
                qkv, self.conv1d.weight[:, 0], self.conv1d.bias, symmetric=True, activation=None, seq_idx=layout.index
            )
        q, k, v = layout.zero_padding(qkv).chunk(3, dim=-1)
        return q, k * v, last

    def _mix(self, x: Tensor, state: MonarchState | None, layout: Layout) -> tuple[Tensor, MonarchState | None]:
        q, kv, conv = self._project(x, None if state is None else state.conv, layout)
        y, held = _convolved(kv, _taps(self.filters), self.D, None if state is None else state.kv, layout)
        y, inputs = q * y, None if state is None else state.x
        if self.residual_conv:
            more, inputs = _convolved(x.to(q.dtype), _taps(self.residual), self.residual_D, inputs, layout)
            y = y + more
        y = self.out_proj(y.to(q.dtype))
        if state is None or inputs is None:
            return y, None
        return y, MonarchState(conv, held.to(state.kv.dtype), inputs.to(state.x.dtype))


class BlockDiagLinear(nn.Module):
    """A linear map whose matrix is block diagonal: each block of inputs makes its block of outputs.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        nblocks: Blocks, which divide both.
        bias: Whether there is one.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if the blocks do not divide the sizes.

    Source: Fu et al. (2023), "Monarch Mixer", section 3: block-diagonal factors of Monarch matrices.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        nblocks: int = 4,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if nblocks < 1 or in_features % nblocks or out_features % nblocks:
            raise ValueError(f"`nblocks` must divide {in_features} inputs and {out_features} outputs, got {nblocks}.")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        fan_in = in_features // nblocks
        size = fan_in**-0.5
        weight = torch.empty(nblocks, out_features // nblocks, fan_in, **factory)
        self.weight = nn.Parameter(weight.uniform_(-size, size))
        self.bias = nn.Parameter(torch.empty(out_features, **factory).uniform_(-size, size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        y = torch.einsum("...ki,koi->...ko", x.unflatten(-1, (self.weight.shape[0], -1)), self.weight).flatten(-2)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def matrix(self) -> Tensor:
        """The matrix as a whole, (out_features, in_features)."""
        return torch.block_diag(*self.weight)


class MonarchMLP(nn.Module):
    """Channel mixer of Monarch Mixer: fc2(value * gelu(gate)) with block-diagonal maps; for `Residual(mlp=...)`.

    Args:
        d_model: Width of input and output.
        hidden: Inner width; None: 4 d_model.
        nblocks: Blocks of both maps.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        d_model: int,
        *,
        hidden: int | None = None,
        nblocks: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = 4 * d_model if hidden is None else hidden
        shared: dict[str, Any] = {"nblocks": nblocks, "device": device, "dtype": dtype}
        self.value = BlockDiagLinear(d_model, hidden, **shared)
        self.gate = BlockDiagLinear(d_model, hidden, **shared)
        self.fc2 = BlockDiagLinear(hidden, d_model, **shared)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_model) to itself."""
        return self.fc2(self.value(x) * F.gelu(self.gate(x)))


def _taps(filters: nn.ModuleList) -> Tensor:
    """Kernels of all sides, (sides, d, L)."""
    return torch.stack([one() for one in filters])


def _convolved(x: Tensor, kernels: Tensor, D: Tensor, before: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
    """Convolve aligned rows x (b, l, d); also the last inputs of each row's last sequence, to go on with."""
    ahead = kernels[1] if kernels.shape[0] == 2 else None
    taps = kernels[0]
    if before is None:
        if not torch.compiler.is_compiling():  # taps beyond the length meet nothing
            reach = max(x.shape[1], 1)
            taps, ahead = taps[:, :reach], None if ahead is None else ahead[:, :reach]
        return fft_conv(x, taps, wide(D), kernel_ahead=ahead, seq_idx=layout.index)
    state = layout.restart(before.to(x.dtype))
    if not torch.compiler.is_compiling() and x.shape[1] == 1:
        window = torch.cat([state, x.mT], dim=-1)
        y = (wide(window) * taps.flip(-1)).sum(-1) + wide(D) * wide(x[:, 0])
        y, last = y[:, None].to(x.dtype), window[..., 1:]
    else:
        y, last = fft_conv(x, taps, wide(D), state, seq_idx=layout.index)
    if layout.count is None:
        return y, last
    place = layout.count[:, None] + torch.arange(state.shape[2], device=x.device)  # in [state, x]
    found = torch.cat([state.mT, x], dim=1).gather(1, place[..., None].expand(-1, -1, x.shape[2]))
    if layout.index is not None:
        index = torch.cat([layout.index[:, :1].expand(-1, state.shape[2]), layout.index], dim=1).gather(1, place)
        found = torch.where((index == layout.index[:, -1:])[..., None], found, torch.zeros_like(found))
    return y, found.mT
