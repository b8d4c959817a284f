"""The menu of matrix mixers that Hydra was compared with: one shell, and a matrix over all pairs of positions.

    [z, v, extras] = in_proj(u);    conv (centred) on [v, extras];    v = silu(v)
    y = c M v + v;    output = out_proj(norm(y) * silu(z))

Hwang, Lahoti, Dao & Gu (2024), "Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers", section 2
and table 1. They are for comparisons: time and memory are quadratic in the length, apart from `QuasiseparableMixer`.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import causal_conv1d
from .common import (
    GatedRMSNorm,
    Layout,
    MixingMatrix,
    Mode,
    bidirectional_only,
    check_heads,
    check_input,
    depthwise_conv,
    lay_out,
    linear_flops,
    recurrence_dtype,
    total_flops,
    wide,
)
from .hydra import Hydra, _Side

_EPS = 1e-3  # frequencies of the data-dependent Vandermonde matrix


class _MatrixMixer(nn.Module):
    """The shell; see the module. Positions count from the first real token of a row.

    Args:
        d_model: Width of the stream.
        max_len: Length L that the scale c is for; longer inputs are refused.
        data_dependent: Make the matrix from the input; False learns one for all inputs. None: from the input if it can.
        qk_dim: Features that two positions are compared by.
        expand: d_inner = expand * d_model.
        headdim: Channels of a head.
        d_conv: Width of the centred convolution, odd, 1 to 7.
        norm_eps: Of the norm before the gate.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if a size is out of range.
    """

    causal: ClassVar[bool] = False
    linear_in_x: ClassVar[bool] = True
    varlen: ClassVar[bool] = False
    state_type: ClassVar[None] = None
    _activated: ClassVar[bool] = False  # whether extras pass the SiLU too
    _can_depend: ClassVar[bool] = True  # on the input

    def __init__(
        self,
        d_model: int,
        *,
        max_len: int = 1024,
        data_dependent: bool | None = None,
        qk_dim: int = 16,
        expand: float = 2,
        headdim: int = 128,
        d_conv: int = 7,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if max_len < 1 or qk_dim < 1:
            raise ValueError(f"`max_len` and `qk_dim` must be at least 1, got {max_len} and {qk_dim}.")
        if d_conv % 2 == 0:
            raise ValueError(f"`d_conv` must be odd, the convolution is centred; got {d_conv}.")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.max_len, self.qk_dim, self.headdim = d_model, max_len, qk_dim, headdim
        if data_dependent and not self._can_depend:
            raise ValueError(f"{type(self).__name__} learns its matrix; data_dependent must be False, got True.")
        self.data_dependent = self._can_depend if data_dependent is None else data_dependent
        self.d_inner = int(expand * d_model)
        self.nheads = check_heads(self.d_inner, headdim, 1, 1)
        self.extras = 2 * self.nheads * self._features() if self.data_dependent else 0
        channels = self.d_inner + self.extras
        self.in_proj = nn.Linear(d_model, self.d_inner + channels, bias=False, **factory)
        self.conv1d = depthwise_conv(channels, d_conv, **factory)
        self.norm = GatedRMSNorm(self.d_inner, eps=norm_eps, norm_before_gate=True, **factory)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False, **factory)
        self._make_parameters(factory)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Mix whole sequences.

        Args:
            x: (b, l, d).
            mask: True at real tokens, (b, l) bool; contiguous in each row. Outputs at padding are 0.
            seq_idx: None; packed sequences are not taken.

        Returns:
            (b, l, d).

        Raises:
            ValueError: if a shape is wrong, a mask has holes, the input is longer than `max_len` or `seq_idx` is given.
        """
        if seq_idx is not None:
            raise ValueError(f"{type(self).__name__} takes no packed sequences (seq_idx); give one sequence per row.")
        z, v, matrix, layout = self._parts(x, mask)
        y = self._product(matrix, v)
        return layout.restore(self.out_proj(self.norm(y.flatten(2).to(z.dtype), z)))

    def prefill(self, *_: Any, **__: Any) -> NoReturn:
        """Not of this mixer.

        Raises:
            TypeError: always.
        """
        raise bidirectional_only(self)

    step = init_state = prefill

    def mixing_matrix(self, x: Tensor, *, state: None = None) -> MixingMatrix:
        """c M + 1 of every head, (b, h, l, l), batch 1 where it is learned.

        Raises:
            TypeError: if a state is given.
        """
        if state is not None:
            raise bidirectional_only(self)
        _, v, matrix, _ = self._parts(x, None)
        eye = torch.eye(x.shape[1], dtype=matrix.dtype, device=x.device)
        return MixingMatrix(matrix + eye, wide(v), self._product(matrix, v))

    def flops(self, l: int, *, mode: Mode = "prefill") -> int:  # noqa: E741
        """Multiplications and additions for one sequence of length l; a cosine or an exponential counts one.

        Raises:
            TypeError: for mode "decode".
        """
        if mode == "decode":
            raise bidirectional_only(self)
        parts = {
            "projections": l * linear_flops(self.in_proj, self.out_proj),
            "convolution": l * 2 * self.conv1d.weight.numel(),
            "matrix": 2 * l * l * self.nheads * self._features(),
            "product": 2 * l * l * self.d_inner,
        }
        return total_flops(parts, mode)

    def state_numel(self) -> int:
        """There is no state: 0."""
        return 0

    def extra_repr(self) -> str:
        """Shown by repr()."""
        return f"max_len={self.max_len}, headdim={self.headdim}, data_dependent={self.data_dependent}"

    def _features(self) -> int:
        """Numbers per head and position on either side of a pair."""
        return self.qk_dim

    def _make_parameters(self, factory: dict[str, Any]) -> None:
        """Learned features (2, h, L, features) in place of those from the input."""
        if self.data_dependent:
            return
        shape = (2, self.nheads, self.max_len, self._features())
        self.features = nn.Parameter(torch.randn(shape, **factory))

    def _parts(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Layout]:
        """z (b, l, d_inner), values (b, l, h, p), c M (b, h, l, l) and the layout, of aligned rows."""
        check_input(x, self.d_model)
        if not torch.compiler.is_compiling() and x.shape[1] > self.max_len:
            raise ValueError(f"`x` has {x.shape[1]} positions, expected at most max_len={self.max_len}.")
        layout = lay_out(x, mask)
        z, rest = self.in_proj(layout.align(x)).split([self.d_inner, self.d_inner + self.extras], dim=-1)
        rest, _ = causal_conv1d(
            layout.zero_padding(rest), self.conv1d.weight[:, 0], self.conv1d.bias, symmetric=True, activation=None
        )
        v, extras = rest.split([self.d_inner, self.extras], dim=-1)
        v = layout.zero_padding(F.silu(v)).unflatten(-1, (self.nheads, self.headdim))
        if self.data_dependent:
            sides = wide(F.silu(extras) if self._activated else extras)
            left, right = sides.unflatten(-1, (2, self.nheads, -1)).permute(2, 0, 3, 1, 4)  # each (b, h, l, features)
        else:
            place = torch.arange(x.shape[1], device=x.device).clamp(max=self.max_len - 1)  # clamp: for export
            left, right = wide(self._learned()).index_select(-2, place)[:, None]
        with torch.autocast(x.device.type, enabled=False):
            return z, v, self._matrix(left, right, layout), layout

    def _learned(self) -> Tensor:
        return self.features

    def _product(self, matrix: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(v.device.type, enabled=False):
            v = wide(v)
            return torch.einsum("bhts,bshp->bthp", matrix.expand(v.shape[0], -1, -1, -1).to(v.dtype), v) + v

    def _matrix(self, left: Tensor, right: Tensor, layout: Layout) -> Tensor:
        """c M of features (b, h, l, f) of receivers and senders."""
        raise TypeError(f"{type(self).__name__} is the shell of the menu; take 'low_rank' or another member.")

    def _scale(self) -> float:
        return 1 / math.sqrt(self.max_len * self.qk_dim)


class DenseMixer(_MatrixMixer):
    """M is a free matrix per head, the same for all inputs; c = 1 / sqrt(L)."""

    _can_depend: ClassVar[bool] = False

    def _features(self) -> int:
        return self.max_len

    def _make_parameters(self, factory: dict[str, Any]) -> None:
        std = math.sqrt(1 / self.max_len)  # Xavier
        self.features = nn.Parameter(torch.randn(self.nheads, self.max_len, self.max_len, **factory) * std)

    def _learned(self) -> Tensor:
        return torch.stack([self.features, self.features])

    def _matrix(self, left: Tensor, right: Tensor, layout: Layout) -> Tensor:
        place = torch.arange(left.shape[2], device=left.device).clamp(max=self.max_len - 1)
        return left.index_select(-1, place) / math.sqrt(self.max_len)


class ToeplitzMixer(_MatrixMixer):
    """M[t, s] = f[t - s] for s <= t and r[s - t] for s > t; c = 1 / (2 sqrt(L))."""

    _activated: ClassVar[bool] = True

    def _features(self) -> int:
        return 1

    def _matrix(self, left: Tensor, right: Tensor, layout: Layout) -> Tensor:
        place = torch.arange(left.shape[2], device=left.device)
        lag = (place[:, None] - place).expand(*left.shape[:2], -1, -1)
        shape = left.mT.expand(-1, -1, left.shape[2], -1)
        f, r = shape.gather(-1, lag.clamp(min=0)), right.mT.expand_as(shape).gather(-1, (-lag).clamp(min=0))
        return torch.where(lag >= 0, f, r) / (2 * math.sqrt(self.max_len))


class LowRankMixer(_MatrixMixer):
    """M[t, s] = q_t.k_s; c = 1 / sqrt(L qk_dim)."""

    _activated: ClassVar[bool] = True

    def _matrix(self, left: Tensor, right: Tensor, layout: Layout) -> Tensor:
        return left @ right.mT * self._scale()


class SoftmaxMixer(_MatrixMixer):
    """M = softmax(q_t.k_s / sqrt(qk_dim)) over real tokens s; c = 1."""

    def _matrix(self, left: Tensor, right: Tensor, layout: Layout) -> Tensor:
        scores = left @ right.mT / math.sqrt(self.qk_dim)
        if layout.mask is not None:
            some = layout.mask | ~layout.mask.any(1, keepdim=True)  # a row of padding sees all, and gives zeros
            scores = scores.masked_fill(~some[:, None, None], -math.inf)
        return scores.softmax(-1)


class CauchyMixer(_MatrixMixer):
    """M[t, s] = sum_d 1 / (exp(q_td) + exp(k_sd) + 2 bias), the bias of a head is learned; c = 1 / sqrt(L qk_dim)."""

    def _make_parameters(self, factory: dict[str, Any]) -> None:
        super()._make_parameters(factory)
        dtype = recurrence_dtype(factory["dtype"])
        self.bias = nn.Parameter(torch.full((self.nheads,), 0.5, device=factory["device"], dtype=dtype))

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("bias",)

    def _matrix(self, left: Tensor, right: Tensor, layout: Layout) -> Tensor:
        bias = wide(self.bias)[:, None, None, None].to(left.dtype)
        total = left.exp()[..., None, :] + right.exp()[:, :, None] + 2 * bias + 1e-8
        return total.reciprocal().sum(-1) * self._scale()


class VandermondeMixer(_MatrixMixer):
    """M[t, s] = sum_d cos(2 pi e q_td s) - cos(2 pi e k_sd t) with e = 1e-3, c = 1 / sqrt(2 L qk_dim).

    Not data dependent it is the real Fourier transform cos(2 pi t s / L), without parameters, c = 1 / sqrt(L).
    """

    def _make_parameters(self, factory: dict[str, Any]) -> None:
        pass  # the Fourier transform has none

    def _learned(self) -> Tensor:
        return self.norm.weight.new_zeros(2, self.nheads, self.max_len, 1)

    def _matrix(self, left: Tensor, right: Tensor, layout: Layout) -> Tensor:
        place = torch.arange(left.shape[2], device=left.device)
        if not self.data_dependent:
            turns = (place[:, None] * place) % self.max_len / self.max_len
            return (2 * torch.pi * turns.to(left.dtype)).cos().expand(1, self.nheads, -1, -1) / math.sqrt(self.max_len)
        place = place.to(left.dtype)
        by_sender = (2 * torch.pi * _EPS * left[..., None, :] * place[:, None]).cos()  # (b, h, t, s, d)
        by_receiver = (2 * torch.pi * _EPS * right[:, :, None] * place[:, None, None]).cos()
        return (by_sender - by_receiver).sum(-1) * self._scale() / math.sqrt(2)


class QuasiseparableMixer(Hydra):
    """Hydra with B and C shared by both directions, qk_dim states for each head, one group.

    Args:
        d_model: Width of the stream.
        qk_dim: States per head; B and C have nheads * qk_dim.
        expand: d_inner = expand * d_model.
        headdim: Channels of a head.
        d_conv: Width of the centred convolution, odd, 1 to 7.
        norm_eps: Of the norm before the gate.
        chunk_size: Positions per chunk of the scans; None lets the operator choose.
        device: Where to create the parameters.
        dtype: Their dtype; those of the recurrence are float32 at least.
    """

    def __init__(
        self,
        d_model: int,
        *,
        qk_dim: int = 16,
        expand: float = 2,
        headdim: int = 128,
        d_conv: int = 7,
        norm_eps: float = 1e-5,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        heads = check_heads(int(expand * d_model), headdim, 1, qk_dim)
        super().__init__(
            d_model,
            d_state=heads * qk_dim,
            d_conv=d_conv,
            expand=expand,
            headdim=headdim,
            norm_eps=norm_eps,
            chunk_size=chunk_size,
            device=device,
            dtype=dtype,
        )
        channels = self.d_inner + 2 * self.d_state
        self.splits[1] = channels
        self.in_proj = nn.Linear(d_model, sum(self.splits), bias=False, device=device, dtype=dtype)
        self.conv1d = depthwise_conv(channels, d_conv, device=device, dtype=dtype)

    def _mix(self, xBC: Tensor, dt: Any, layout: Layout) -> tuple[Tensor, Tensor, Tensor, _Side, _Side]:
        return super()._mix(torch.cat([xBC, xBC[..., self.d_inner :]], dim=-1), dt, layout)
