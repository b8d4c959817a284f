"""What sequence mixers share: states, rows with padding and several sequences, steps, convolution, mixing matrices.

A causal mixer aligns every row to the left first (`lay_out`), so that padding stands behind the real tokens; all else
then is a matter of zero steps, and the state at the end is that after the last real token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar, dataclass_transform

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

from ...kernels import causal_conv1d, conv_step, gated_norm

Mode = Literal["train", "prefill", "decode"]


class MixerState:
    """Base of the states of causal mixers: tensors with the batch in front, never changed in place.

    Subclasses are decorated with `mixer_state`. Fields named in `recurrent` or `choices` are float32 (float64 in
    float64 models) whatever the activations are; the others have the dtype of the activations. Those in `periodic` are
    angles, which mean the same modulo 2 pi; those in `integral` are integers. Only choices hang on those in `choices`,
    which therefore have no gradient.
    """

    recurrent: ClassVar[tuple[str, ...]] = ()
    periodic: ClassVar[tuple[str, ...]] = ()
    integral: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[tuple[str, ...]] = ()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name, for safetensors; `type(state)(**tensors)` is the way back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the state; a dtype is that of the activations, and wide fields are kept in at least float32."""

        def moved(name: str, tensor: Tensor) -> Tensor:
            wide = name in (*self.recurrent, *self.choices)
            target = dtype if dtype is None or not wide else torch.promote_types(dtype, torch.float32)
            return tensor.to(device=device, dtype=target if tensor.is_floating_point() else None)

        return self._map(moved)

    def detach(self) -> Self:
        """Cut the state off the graph, as between pieces of truncated backpropagation."""
        return self._map(lambda _, tensor: tensor.detach())

    def select(self, index: Tensor) -> Self:
        """Rows `index` (integers, repeats allowed) of the batch: beam search, dropping rows, copying a prompt."""
        return self._map(lambda _, tensor: tensor.index_select(0, index))

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return next(iter(self.tensors().values())).shape[0]

    @property
    def nbytes(self) -> int:
        """Memory of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def _map(self, function: Any) -> Self:
        return replace(self, **{name: function(name, tensor) for name, tensor in self.tensors().items()})  # type: ignore[type-var]


_State = TypeVar("_State", bound=MixerState)


@dataclass_transform(frozen_default=True, eq_default=False)
def mixer_state(cls: type[_State]) -> type[_State]:
    """Make a class of tensor fields a frozen dataclass that torch.compile and torch.export take apart."""
    made = dataclass(frozen=True, eq=False)(cls)
    name = f"{cls.__module__}.{cls.__qualname__}"
    _pytree.register_dataclass(made, serialized_type_name=name)
    return made


@mixer_state
class ConvSSMState(MixerState):
    """State of a mixer with a short convolution before its recurrence.

    Attributes:
        conv: The k - 1 inputs of the convolution before the next position, oldest first, (b, c, k - 1).
        ssm: Recurrent state, (b, d_inner, n) or (b, h, p, n), float32.
    """

    conv: Tensor
    ssm: Tensor

    recurrent: ClassVar[tuple[str, ...]] = ("ssm",)


def check_state(
    state: Any, expected: type[MixerState], shapes: Mapping[str, Sequence[int]], device: torch.device
) -> None:
    """Check that a state fits this mixer and batch.

    Args:
        state: What the caller handed in.
        expected: The mixer's type of state.
        shapes: Shape of each field, batch in front.
        device: Device of the input.

    Raises:
        TypeError: if it is a state of another kind, or a recurrent field has 16 bits, or another one no floating dtype
            (counts: no integer dtype).
        ValueError: if a shape or the device differs.
    """
    require_state(state, expected)
    for name, tensor in state.tensors().items():
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise ValueError(
                f"`state.{name}` must have shape {tuple(shapes[name])}, got {tuple(tensor.shape)}; "
                "init_state(batch) makes one that fits, state.select(rows) another batch."
            )
        if tensor.device != device:
            raise ValueError(f"`state.{name}` is on '{tensor.device}', expected '{device}'; state.to(device) moves it.")
        if tensor.is_floating_point() == (name in state.integral):
            kind = "an integer" if name in state.integral else "a floating"
            raise TypeError(f"`state.{name}` must have {kind} dtype, got {tensor.dtype}; init_state() makes one.")
        wide = name in (*state.recurrent, *state.choices)
        if wide and torch.promote_types(tensor.dtype, torch.float32) != tensor.dtype:
            raise TypeError(
                f"`state.{name}` must be float32 or float64, got {tensor.dtype}: 16 bits lose slow decays. "
                "init_state() and state.to(dtype=...) keep it."
            )


def require_state(state: Any, expected: type[Any]) -> None:
    """Check the kind of a state.

    Raises:
        TypeError: if it is of another one.
    """
    if not isinstance(state, expected):
        raise TypeError(f"`state` must be a {expected.__name__}, got {type(state).__name__}; init_state() makes one.")


def check_input(x: Tensor, d_model: int, dims: str = "b l") -> None:
    """Check the shape of a mixer's input, (b, l, d_model) or for steps (b, d_model).

    Raises:
        ValueError: if it is another one.
    """
    if x.dim() != len(dims.split()) + 1 or x.shape[-1] != d_model:
        raise ValueError(f"`x` must be ({', '.join(dims.split())}, {d_model}), got shape {tuple(x.shape)}.")


def bidirectional_only(mixer: nn.Module) -> TypeError:
    """The error of `prefill`, `step` and `init_state` where outputs depend on later positions."""
    return TypeError(
        f"{type(mixer).__name__} sees both directions and has no state; call it on whole sequences, "
        "or take a causal mixer such as 'mamba2' for prefill and step."
    )


def require_causal(mixer: Any) -> None:
    """Check that a mixer with the attribute `causal` has a state.

    Raises:
        TypeError: if its outputs depend on later positions.
    """
    if not mixer.causal:
        raise bidirectional_only(mixer)


class MixingMatrix(NamedTuple):
    """A mixer's linear operator on one batch: outputs[t] = sum_s matrix[t, s] inputs[s] (+ from_state + offset).

    Attributes:
        matrix: (b, h, l, l), float32 or float64; batch 1 where it does not depend on the input. With several ranks
            (b, h, l, r, l, r), and the others are (b, l, r, h, p).
        inputs: What it acts on, (b, l, h, p).
        outputs: (b, l, h, p), as the mixer computes them.
        from_state: Part of the outputs that comes from the state handed in, (b, l, h, p), or None.
        offset: Part that depends on neither, (b, l, h, p), or None; only of `effective` matrices.
    """

    matrix: Tensor
    inputs: Tensor
    outputs: Tensor
    from_state: Tensor | None = None
    offset: Tensor | None = None

    def apply(self) -> Tensor:
        """The right-hand side: matrix times inputs, plus the parts that are none of it; equals `outputs`."""
        product = "bhts,bshp->bthp" if self.matrix.dim() == 4 else "bhtisj,bsjhp->btihp"
        y = torch.einsum(product, self.matrix, self.inputs.to(self.matrix.dtype))
        for part in (self.from_state, self.offset):
            y = y if part is None else y + part
        return y


@dataclass(frozen=True)
class Layout:
    """How the rows of one call are read; made by `lay_out`, rows already aligned to the left if it was asked to."""

    index: Tensor | None = None  # (b, l), number of the sequence in its row, never decreasing; None: one per row
    fresh: Tensor | None = None  # (b,), rows that drop the state they are given
    mask: Tensor | None = None  # (b, l), True at real tokens
    order: Tensor | None = None  # (b, l), where each aligned position comes from; None: not aligned
    count: Tensor | None = None  # (b,), real tokens

    def align(self, x: Tensor) -> Tensor:
        """Real tokens to the front of each row, (b, l, d)."""
        return x if self.order is None else x.gather(1, self.order[..., None].expand(-1, -1, x.shape[2]))

    def restore(self, y: Tensor) -> Tensor:
        """Back to the places of the input, zeros at padding, (b, l, d)."""
        if self.mask is None:
            return y
        y = self.zero_padding(y)
        if self.order is None:
            return y
        return y.gather(1, self.order.argsort(1)[..., None].expand(-1, -1, y.shape[2]))

    def zero_padding(self, x: Tensor) -> Tensor:
        """Zeros where `x` (b, l, ...) is padding."""
        if self.mask is None:
            return x
        return torch.where(self.mask.unflatten(1, (-1, *[1] * (x.dim() - 2))), x, x.new_zeros(()))

    def restart(self, state: Tensor, initial: Tensor | None = None) -> Tensor:
        """The state (b, ...) that the rows begin with: the one given, or the initial one (zeros if None)."""
        if self.fresh is None:
            return state
        initial = torch.zeros_like(state) if initial is None else initial.to(state.dtype).expand_as(state)
        return torch.where(self.fresh.unflatten(0, (-1, *[1] * (state.dim() - 1))), initial, state)


def lay_out(
    x: Tensor,
    mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    align: bool = True,
) -> Layout:
    """Read mask, sequence numbers and resets of one call.

    Args:
        x: Input, (b, l, d).
        mask: True at real tokens, (b, l) bool; they are contiguous in each row, with padding on either side or both. A
            row may hold none.
        seq_idx: Which packed sequence a position belongs to, (b, l) integers; a new one begins where it changes.
        reset: True where the state is dropped before the position is absorbed, (b, l) bool.
        align: Whether the caller will move real tokens to the front of the rows; then all fields are of moved rows.

    Raises:
        ValueError: if a shape is wrong or a mask has holes. Compiled code does not look for holes.
        TypeError: if a dtype is wrong.
    """
    if mask is None and seq_idx is None and reset is None:
        return Layout()
    for name, tensor in (("mask", mask), ("seq_idx", seq_idx), ("reset", reset)):
        if tensor is None:
            continue
        if tensor.shape != x.shape[:2]:
            raise ValueError(f"`{name}` must be {tuple(x.shape[:2])} (b, l of `x`), got shape {tuple(tensor.shape)}.")
        if name == "seq_idx" and (tensor.is_floating_point() or tensor.dtype == torch.bool):
            raise TypeError(f"`seq_idx` must be of integers, got {tensor.dtype}.")
        if name != "seq_idx" and tensor.dtype != torch.bool:
            raise TypeError(f"`{name}` must be bool, got {tensor.dtype}; convert it, e.g. {name}.bool().")
    if not x.shape[1]:  # no position to begin a sequence at, or to be padding
        return Layout()
    order = count = None
    if mask is not None:
        in_front = _check_contiguous(mask)
        count = mask.sum(1)
        if align and in_front:
            length = mask.shape[1]
            first = (mask.cumsum(1) == 0).sum(1, keepdim=True)  # padding in front; l in a row of nothing else
            order = torch.arange(length, device=mask.device) + first
            order = torch.where(order >= length, order - length, order)
            mask, seq_idx, reset = (None if t is None else t.gather(1, order) for t in (mask, seq_idx, reset))
    starts = fresh = None
    if seq_idx is not None:
        starts = seq_idx != seq_idx.roll(1, 1)
        starts = starts & (torch.arange(seq_idx.shape[1], device=seq_idx.device) > 0)
    if reset is not None:
        starts = reset if starts is None else starts | reset
        fresh = reset[:, :1] if mask is None else reset[:, :1] & mask[:, :1]
        fresh = fresh.any(1)
    if starts is None:
        return Layout(mask=mask, order=order, count=count)
    # Padding belongs to the sequence before it: what seq_idx says there would hide the last state.
    starts = starts if mask is None else starts & mask
    return Layout(starts.cumsum(1, dtype=torch.int32), fresh, mask, order, count)


def padding_behind(count: Tensor, length: int) -> Tensor:
    """A mask of rows with padding behind, which is known to have no holes: to look for them is to wait for the device.

    Args:
        count: Real tokens of each row, (b,) integers.
        length: Positions of a row, l.

    Returns:
        (b, l) bool, not to be changed in place.
    """
    mask = torch.arange(length, device=count.device) < count[:, None]
    if not torch.compiler.is_compiling():
        mask.no_holes = True  # type: ignore[attr-defined]
    return mask


def is_padding_behind(mask: Tensor) -> bool:
    """Whether no real token stands behind padding; waits for the device, unless `padding_behind` made the mask."""
    known = not torch.compiler.is_compiling() and hasattr(mask, "no_holes")
    return known or not bool((mask[:, 1:] & ~mask[:, :-1]).any())


def _check_contiguous(mask: Tensor) -> bool:
    """Whether padding may stand in front of real tokens; compiled code does not look."""
    if torch.compiler.is_compiling() or mask.shape[1] < 2:
        return mask.shape[1] > 1
    if hasattr(mask, "no_holes"):
        return False
    begins = mask[:, :1].int().sum(1) + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    holes, in_front = torch.stack([(begins > 1).any(), ((begins > 0) & ~mask[:, 0]).any()]).tolist()  # one wait
    if holes:
        row = int((begins > 1).int().argmax())
        raise ValueError(
            f"`mask` has a hole in row {row}: real tokens must be contiguous, with padding on the left or right only."
        )
    return bool(in_front)


def wide(tensor: Tensor) -> Tensor:
    """In float32, or the tensor's own dtype if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def recurrence_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """dtype of recurrence parameters and states in a model of `dtype`: at least float32."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


def softplus_steps(
    raw: Tensor,
    bias: Tensor | None = None,
    limit: tuple[float, float] = (0.0, math.inf),
    layout: Layout | None = None,
) -> Tensor:
    """dt = clamp(softplus(raw + bias), limit) in at least float32, and 0 at padding.

    Args:
        raw: Before the softplus, (..., h).
        bias: (h,).
        limit: Smallest and largest step.
        layout: With the padding of `raw` (b, l, h).
    """
    dt = F.softplus(wide(raw) if bias is None else wide(raw) + wide(bias))
    if tuple(limit) != (0.0, math.inf):
        dt = dt.clamp(*limit)
    return dt if layout is None else layout.zero_padding(dt)


def check_dt_limit(limit: Sequence[float]) -> tuple[float, float]:
    """The limits of steps as a pair.

    Raises:
        ValueError: if they are not 0 <= smallest <= largest.
    """
    if len(limit) != 2 or not 0 <= limit[0] <= limit[1]:
        raise ValueError(f"`dt_limit` must be (smallest, largest) step, 0 <= smallest <= largest, got {limit}.")
    return float(limit[0]), float(limit[1])


def depthwise_conv(
    channels: int, width: int, *, bias: bool = True, init: float | None = None, **factory: Any
) -> nn.Conv1d:
    """Parameters of a short depthwise convolution, (c, 1, k) and (c,); the kernels do the work.

    Args:
        channels: c.
        width: k, 1 to 8.
        bias: Whether there is one.
        init: Draw the weight uniformly from [-init, init]; None is the default of torch.
        **factory: Device and dtype.

    Raises:
        ValueError: if the width is out of range.
    """
    if not 1 <= width <= 8:
        raise ValueError(f"`d_conv` must lie in 1 to 8, got {width}.")
    conv = nn.Conv1d(channels, channels, width, groups=channels, bias=bias, **factory)
    if init is not None:
        nn.init.uniform_(conv.weight, -init, init)
    return conv


def convolve(
    x: Tensor, conv: nn.Conv1d, state: Tensor | None, layout: Layout, activation: Literal["silu"] | None = "silu"
) -> tuple[Tensor, Tensor]:
    """Causal convolution of aligned rows, zero at padding before and after, and the inputs to go on with.

    Args:
        x: (b, l, c).
        conv: Its parameters.
        state: The k - 1 inputs before, (b, c, k - 1); zeros if None.
        layout: Of the rows.
        activation: "silu" or None.

    Returns:
        (b, l, c), and the last k - 1 real inputs of each row's last sequence, (b, c, k - 1).
    """
    x = layout.zero_padding(x)
    state = None if state is None else layout.restart(state.to(x.dtype))
    y, last = causal_conv1d(x, conv.weight[:, 0], conv.bias, state, activation=activation, seq_idx=layout.index)
    size = conv.kernel_size[0] - 1
    if layout.count is not None and size:
        state = x.new_zeros(x.shape[0], x.shape[2], size) if state is None else state
        window = layout.count[:, None] + torch.arange(size, device=x.device)  # in [state, x]: ends at the last token
        last = state.mT.gather(1, window.clamp(max=size - 1)[..., None].expand(-1, -1, x.shape[2]))
        if x.shape[1]:
            own = x.gather(1, (window - size).clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
            last = torch.where((window < size)[..., None], last, own)
        if layout.index is not None and x.shape[1]:
            index = torch.cat([layout.index[:, :1].expand(-1, size), layout.index], dim=1).gather(1, window)
            last = torch.where((index == index[:, -1:])[..., None], last, torch.zeros_like(last))
        last = last.mT
    return layout.zero_padding(y), last.to(y.dtype)


def convolve_step(
    x: Tensor, conv: nn.Conv1d, state: Tensor, activation: Literal["silu"] | None = "silu"
) -> tuple[Tensor, Tensor]:
    """One position of `convolve`: (b, c) -> (b, c)."""
    y, state = conv_step(x, state.to(x.dtype), conv.weight[:, 0], conv.bias, activation=activation)
    return y, state.to(y.dtype)


class GatedRMSNorm(nn.Module):
    """RMS norm over groups of channels with a SiLU gate, see `omnissm.kernels.gated_norm`.

    Args:
        d: Channels.
        eps: Added to the mean square.
        group_size: Channels that share a mean; None: all.
        norm_before_gate: False norms the gated signal (Mamba-2), True gates the normed one (Hydra).
        device: Where to create the weight.
        dtype: Its dtype.
    """

    def __init__(
        self,
        d: int,
        *,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(d, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Norm x (..., d) and gate it by z (..., d)."""
        return gated_norm(
            x, z, self.weight, eps=self.eps, group_size=self.group_size, norm_before_gate=self.norm_before_gate
        )

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("weight",)

    def extra_repr(self) -> str:
        """Shown by repr()."""
        return f"{self.weight.numel()}, group_size={self.group_size}, norm_before_gate={self.norm_before_gate}"


def decay_matrix(log_decay: Tensor) -> Tensor:
    """E[t, s] = exp(sum of log_decay over s < j <= t) for s <= t, else 0: (b, l, h) -> (b, h, l, l).

    Sums are taken from each s on and are no differences, which would lose digits where decays are strong.
    """
    steps = log_decay.movedim(1, 2)[..., None].expand(*log_decay.movedim(1, 2).shape, log_decay.shape[1])
    return steps.tril(-1).cumsum(-2).exp().tril()


def sequence_start(index: Tensor) -> Tensor:
    """Place where the sequence of each position begins, (b, l), from the numbers of sequences."""
    place = torch.arange(index.shape[1], device=index.device)
    begins = (index != index.roll(1, 1)) & (place > 0)
    return torch.where(begins, place, 0).cummax(1).values


def decay_since_start(log_decay: Tensor, index: Tensor) -> Tensor:
    """exp of the sum of log_decay (b, l, h) from the start of each position's sequence up to and with it."""
    # Differences of sums over a whole row need the digits of float64.
    total = log_decay.double().cumsum(1)
    start = sequence_start(index)[..., None].expand_as(total)
    before = (total - log_decay.double()).gather(1, start)
    return (total - before).clamp(max=0).exp().to(log_decay.dtype)


def total_flops(parts: Mapping[str, int], mode: Mode) -> int:
    """Sum of the parts; a training step counts three times the forward pass, as usual for products.

    Raises:
        ValueError: if the mode is unknown.
    """
    check_mode(mode)
    return sum(parts.values()) * (3 if mode == "train" else 1)


def check_mode(mode: str) -> None:
    """Check the name of a way to run.

    Raises:
        ValueError: if it is unknown.
    """
    if mode not in ("train", "prefill", "decode"):
        raise ValueError(f"`mode` must be 'train', 'prefill' or 'decode', got {mode!r}.")


def linear_flops(*layers: nn.Linear) -> int:
    """Multiplications and additions of linear layers at one position."""
    return sum(2 * layer.weight.numel() for layer in layers)


def check_heads(channels: int, headdim: int, ngroups: int, d_state: int) -> int:
    """The number of heads.

    Raises:
        ValueError: if heads do not divide the channels, or groups the heads, or there is no state.
    """
    if d_state < 1:
        raise ValueError(f"`d_state` must be at least 1, got {d_state}.")
    if headdim < 1 or channels < 1 or channels % headdim:
        raise ValueError(f"`headdim` must divide the {channels} inner channels, got {headdim}.")
    nheads = channels // headdim
    if ngroups < 1 or nheads % ngroups:
        raise ValueError(f"`ngroups` must divide the {nheads} heads ({channels} channels), got {ngroups}.")
    return nheads


def read_states(C: Tensor, state: Tensor) -> Tensor:
    """One state (b, h, p, n), or (h, p, n) for all rows, read at every position by C (b, l, g, n): (b, l, h, p)."""
    C, state = wide(C), wide(state)
    heads = state.expand(C.shape[0], *state.shape[-3:]).unflatten(1, (C.shape[2], -1))
    with torch.autocast(C.device.type, enabled=False):
        return torch.einsum("blgn,bgrpn->blgrp", C.to(heads.dtype), heads).flatten(2, 3)


def ssd_flops_parts(
    projections: Sequence[nn.Linear],
    conv: nn.Conv1d,
    *,
    d_ssm: int,
    d_state: int,
    nheads: int,
    ngroups: int,
    chunk_size: int | None,
    length: int,
    mode: Mode,
) -> dict[str, int]:
    """Multiplications and additions of a mixer around `ssd`: chunks of full tiles, or one step in the recurrent form.

    Chunks have 128 positions where the operator chooses.
    """
    check_mode(mode)
    positions = 1 if mode == "decode" else length
    q = min(chunk_size or 128, length)
    chunked = 2 * q * d_state * ngroups + 2 * q * d_ssm + 4 * d_ssm * d_state
    scan = 5 * d_ssm * d_state - d_ssm if mode == "decode" else length * chunked
    return {
        "projections": positions * linear_flops(*projections),
        "convolution": positions * 2 * conv.weight.numel(),
        "scan": scan,
    }
