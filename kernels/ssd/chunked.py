"""The recurrence as matrix products over chunks of q positions, with the gradient written out.

With u the sum of log-decays from a chunk's start, v = weight x, S the state that enters the chunk and R the gradient of
the one that leaves it, E[t,s] = e^{u_t - u_s} (s <= t), M = (C B^T) E and G = dy v^T:

    y_t = sum_s M[t,s] v_s + e^{u_t} S C_t + D_t x_t            S <- e^{u_last} S + sum_s e^{u_last - u_s} v_s B_s^T
    dv = M^T dy + e^{u_last - u} (B R^T)                        R <- e^{u_last} R + sum_t e^{u_t} dy_t C_t^T
    dC = (G E) B + e^u (dy S)                                   dB = (G E)^T C + e^{u_last - u} (v R)
    dlog_decay_t = sum_{i>=t} sum_{j<t} M_ij G_ij + sum_{i>=t} e^{u_i} dy_i.(S C_i)
                   + sum_{j<t} e^{u_last - u_j} v_j.(R B_j) + e^{u_last} <S, R>

No exponent and no gradient is a difference of two sums, which would lose float32 digits where decays are strong. With
packing every factor is zero that would link two sequences.

Chunks are taken in blocks that keep the (q, q) matrices small. Only the state before each block outlives it; the
gradient starts by computing those states again, so nothing but the inputs is saved. Forward and gradient are custom
ops, whose loops are opaque to torch.compile and torch.export, around differentiable code, which gives the second
derivative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..transforms import apply, fold, unfold

# Numbers in the largest temporary of a block: small enough for a CPU's cache, large enough to fill a GPU.
_BLOCK_NUMBERS = {"cpu": 2**18}
_BLOCK_NUMBERS_ELSEWHERE = 2**26


def ssd_chunked(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    weight: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """See `ssd`; weight and D are (b, l, h), everything but x, B and C has the dtype of the state."""
    return apply(_Ssd, x, log_decay, B, C, state, weight, D, seq_idx, chunk_size or default_chunk(x))


def default_chunk(x: Tensor) -> int:
    """Positions of a chunk where the caller names none."""
    return 64 if x.device.type == "cpu" else 128


def ssd_chunked_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Output and final state without a gradient, for functions that have one of their own; `ssd_chunked` says more."""
    return _forward(*arguments)


def ssd_chunked_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of x, log_decay, B, C, state, weight and D, from those arguments and the two outputs' gradients."""
    return apply(_SsdGradient, *arguments)


class _Block(NamedTuple):
    """k chunks of q positions, h = g r heads: heads lie before positions, as the products need them."""

    x: Tensor  # (b, k, g, r, q, p)
    v: Tensor  # (b, k, g, r, q, p)
    B: Tensor  # (b, k, g, q, n)
    C: Tensor  # (b, k, g, q, n)
    log_decay: Tensor  # (b, k, g, r, q)
    weight: Tensor | None  # (b, k, g, r, q)
    D: Tensor | None  # (b, k, g, r, q)
    seq_idx: Tensor | None  # (b, k, q)
    decay_in: Tensor  # e^{u_t}, from the chunk's start, (b, k, g, r, q)
    decay_out: Tensor  # e^{u_last - u_s}, to its end, (b, k, g, r, q)


class _Buffers:
    """Memory that the blocks of a forward call write over: new memory takes longer to get than to fill."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.numbers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        count = math.prod(shape)
        if name not in self.numbers or self.numbers[name].numel() < count:
            self.numbers[name] = self.like.new_empty(count)
        return self.numbers[name][:count].view(shape)


def _blocks(x: Tensor, state: Tensor, chunk_size: int) -> list[tuple[int, int, int]]:
    """(start, k, q) of every block; the last chunk of a row is a block of its own if it is shorter."""
    batch, length, nheads, headdim = x.shape
    q = min(chunk_size, length)
    largest = batch * nheads * max(q, headdim) * max(q, headdim, state.shape[-1])
    k = max(1, _BLOCK_NUMBERS.get(x.device.type, _BLOCK_NUMBERS_ELSEWHERE) // largest)
    whole = length // q
    blocks = [(first * q, min(k, whole - first), q) for first in range(0, whole, k)]
    return blocks + ([(whole * q, 1, length % q)] if length % q else [])


def _block(
    span: tuple[int, int, int],
    dtype: torch.dtype,
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    weight: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
    buffers: _Buffers | None = None,
) -> _Block:
    start, k, q = span
    groups = B.shape[2]

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:, start : start + k * q].unflatten(1, (k, q))

    def per_head(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else cut(tensor).unflatten(3, (groups, -1)).movedim(2, 4)

    decays = per_head(log_decay)
    assert decays is not None  # it is a tensor
    decays = decays.contiguous()
    decay_in = decays.cumsum(-1).exp()
    following = torch.cat([torch.zeros_like(decays[..., :1]), decays[..., 1:].flip(-1).cumsum(-1)], -1)
    decay_out = following.flip(-1).exp()
    index = None
    if seq_idx is not None:
        index = cut(seq_idx)
        first = max(start - 1, 0)
        before = torch.cat([seq_idx[:, first, None], index[:, :-1, -1]], dim=1)
        decay_in = decay_in * (index == before[..., None])[:, :, None, None]
        decay_out = decay_out * (index == index[..., -1:])[:, :, None, None]
    weights, heads = per_head(weight), cut(x).to(dtype).unflatten(3, (groups, -1)).movedim(2, 4)
    v = None if buffers is None else buffers("v", *heads.shape)
    if weights is not None:
        v = torch.mul(weights[..., None], heads, out=v)
    else:
        v = heads if v is None else v.copy_(heads)
    return _Block(
        x=heads,
        v=v,
        B=cut(B).to(dtype).movedim(2, 3),
        C=cut(C).to(dtype).movedim(2, 3),
        log_decay=decays,
        weight=weights,
        D=per_head(D),
        seq_idx=index,
        decay_in=decay_in,
        decay_out=decay_out,
    )


def _decay_matrix(block: _Block, buffer: Tensor | None = None) -> Tensor:
    """E transposed, (b, k, g, r, s, t): e to the sum of the log-decays after s up to t; 1 for t < s, see `_linked`."""
    q = block.log_decay.shape[-1]
    steps = block.log_decay[..., None, :].expand(*block.log_decay.shape, q)
    steps = steps.triu(1) if buffer is None else buffer.copy_(steps).triu_(1)
    return steps.cumsum_(-1).exp_()


def _linked(scores: Tensor, block: _Block) -> Tensor:
    """Scores between positions (b, k, g, s, t), zero where s lies after t or in another sequence."""
    scores = scores.triu()
    if block.seq_idx is not None:
        scores = scores * (block.seq_idx[..., None] == block.seq_idx[..., None, :])[:, :, None]
    return scores


def _wide(tensor: Tensor) -> Tensor:
    """(b, k, g, r, q, p) -> (b, k, g, q, r * p): the heads of a group side by side, for one product per group."""
    return tensor.movedim(3, 4).flatten(4)


def _narrow(tensor: Tensor, r: int) -> Tensor:
    return tensor.unflatten(4, (r, -1)).movedim(4, 3)


def _positions(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """(b, k, g, r, q, ...) -> (b, k * q, g * r, ...)."""
    return tensor.to(dtype).movedim(4, 2).flatten(3, 4).flatten(1, 2)


def _carry(total: Tensor, added: Tensor, state: Tensor, order: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What each chunk finds, (b, k, g, r * p, n), and what is left at the end, of S <- total S + added."""
    found: list[Tensor] = [state] * len(order)
    for c in order:
        found[c] = state
        state = torch.addcmul(added[:, c], total[:, c, :, :, None, None], state)
    return torch.stack(found, dim=1).flatten(3, 4), state


def _states(block: _Block, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states that enter the chunks, (b, k, g, r * p, n), and the one after the block, (b, g, r, p, n)."""
    r, k = block.v.shape[3], block.v.shape[1]
    added = _wide(block.v * block.decay_out[..., None]).mT @ block.B
    return _carry(block.decay_in[..., -1], added.unflatten(3, (r, -1)), state, range(k))


def _outputs(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    weight: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    groups, headdim, n = B.shape[2], *state.shape[2:]
    r = x.shape[2] // groups
    carried = state.unflatten(1, (groups, r))
    outputs = torch.empty_like(x, memory_format=torch.contiguous_format)
    buffers = _Buffers(state)
    for span in _blocks(x, state, chunk_size):
        start, k, q = span
        block = _block(span, state.dtype, x, log_decay, B, C, weight, D, seq_idx, buffers)
        heads = block.log_decay.shape[:-1]  # (b, k, g, r)
        count = math.prod(heads)

        # What chunks add to the state, and the states between them.
        maps = torch.mul(block.B[:, :, :, None], block.decay_out[..., None], out=buffers("maps", *heads, q, n))
        v = block.v.view(count, q, headdim)
        added = torch.bmm(v.mT, maps.view(count, q, n), out=buffers("added", count, headdim, n))
        added = added.view(*heads, headdim, n)
        entering = buffers("states", *added.shape)
        for c in range(k):
            entering[:, c] = carried
            carried = torch.addcmul(added[:, c], block.decay_in[:, c, :, :, -1, None, None], carried)

        mixing = buffers("mixing", *heads, q, q)
        _decay_matrix(block, mixing).mul_(_linked(block.B @ block.C.mT, block)[:, :, :, None])
        y = torch.bmm(mixing.view(count, q, q).mT, v, out=buffers("y", count, q, headdim))
        maps = torch.mul(block.C[:, :, :, None], block.decay_in[..., None], out=maps)
        y.baddbmm_(maps.view(count, q, n), entering.view(count, headdim, n).mT)
        y = y.view(*heads, q, headdim)
        target = outputs[:, start : start + k * q].unflatten(1, (k, q)).unflatten(3, (groups, r)).movedim(2, 4)
        if block.D is None:
            target.copy_(y)
        else:
            torch.addcmul(y, block.D[..., None], block.x, out=target)
    return outputs, carried.flatten(1, 2)


def _gradients(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    weight: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
    dy: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, log_decay, B, C, state, weight and D; those of absent tensors have no positions."""
    groups = B.shape[2]
    r = x.shape[2] // groups
    spans = _blocks(x, state, chunk_size)
    before = [state.unflatten(1, (groups, r))]
    for span in spans[:-1]:
        before.append(_states(_block(span, state.dtype, x, log_decay, B, C, weight, D, seq_idx), before[-1])[1])

    carried = dfinal.to(state.dtype).unflatten(1, (groups, r))
    parts: list[tuple[Tensor, ...]] = []
    for span in reversed(spans):
        start, k, q = span
        block = _block(span, state.dtype, x, log_decay, B, C, weight, D, seq_idx)
        entering, _ = _states(block, before.pop())
        grad = dy[:, start : start + k * q].to(state.dtype).unflatten(1, (k, q))
        grad = grad.unflatten(3, (groups, r)).movedim(2, 4)
        decayed = _wide(grad * block.decay_in[..., None])
        added = (decayed.mT @ block.C).unflatten(3, (r, -1))
        leaving, carried = _carry(block.decay_in[..., -1], added, carried, range(k - 1, -1, -1))

        decays = _decay_matrix(block)
        products = block.v @ grad.mT
        mixing = _linked(block.B @ block.C.mT, block)[:, :, :, None] * decays
        late = _wide(block.v * block.decay_out[..., None])
        from_end = _narrow(block.B @ leaving.mT, r) * block.decay_out[..., None]
        dv = mixing @ grad + from_end
        kernel = _linked((products * decays).sum(3), block)
        dC = kernel.mT @ block.B + decayed @ entering
        dB = kernel @ block.C + late @ leaving

        links = torch.ones(q, q, dtype=state.dtype, device=x.device).tril(-1) @ (mixing * products)
        read = (decayed * (block.C @ entering.mT)).unflatten(4, (r, -1)).sum(-1).movedim(3, 4)
        written = (block.v * from_end).sum(-1)
        through = (entering * leaving).unflatten(3, (r, -1)).sum((-2, -1)) * block.decay_in[..., -1]
        dlog_decay = links.triu().sum(-1) + read.flip(-1).cumsum(-1).flip(-1) + through[..., None]
        dlog_decay = dlog_decay + torch.cat([torch.zeros_like(written[..., :1]), written[..., :-1].cumsum(-1)], -1)

        dx = dv if block.weight is None else dv * block.weight[..., None]
        dx = dx if block.D is None else dx + grad * block.D[..., None]
        dweight = dlog_decay[..., :0] if block.weight is None else (block.x * dv).sum(-1)
        dD = dlog_decay[..., :0] if block.D is None else (block.x * grad).sum(-1)
        parts.append(
            (
                _positions(dx, x.dtype),
                _positions(dlog_decay, state.dtype),
                dB.to(B.dtype).movedim(3, 2).flatten(1, 2),
                dC.to(C.dtype).movedim(3, 2).flatten(1, 2),
                _positions(dweight, state.dtype),
                _positions(dD, state.dtype),
            )
        )
    dx, dlog_decay, dB, dC, dweight, dD = (torch.cat(part, dim=1) for part in zip(*reversed(parts), strict=True))
    return dx, dlog_decay, dB, dC, carried.flatten(1, 2), dweight, dD


@torch.library.custom_op("ssm::ssd_chunked", mutates_args=())
def _forward(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    weight: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):  # it would round the operands of the products
        return _outputs(x, log_decay, B, C, state, weight, D, seq_idx, chunk_size)


@torch.library.custom_op("ssm::ssd_chunked_bwd", mutates_args=())
def _backward(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    weight: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
    dy: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return _gradients(x, log_decay, B, C, state, weight, D, seq_idx, chunk_size, dy, dfinal)


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, state = arguments[0], arguments[4]
    return x.new_empty(x.shape), state.new_empty(state.shape)


@_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    x, log_decay, B, C, state, weight, D = arguments[:7]
    absent = log_decay.shape[0], 0, log_decay.shape[2]
    optional = (log_decay.new_empty(absent if tensor is None else tensor.shape) for tensor in (weight, D))
    return (*(tensor.new_empty(tensor.shape) for tensor in (x, log_decay, B, C, state)), *optional)


def _mapped(op: Any, info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    count = info.batch_size
    folded = [
        fold(argument, mapped, count) if isinstance(argument, Tensor) else argument
        for argument, mapped in zip(arguments, in_dims, strict=True)
    ]
    outputs = tuple(unfold(output, count) for output in op(*folded))
    return outputs, (0,) * len(outputs)


@_forward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    return _mapped(_forward, info, in_dims, arguments)


@_backward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    return _mapped(_backward, info, in_dims, arguments)


class _Ssd(torch.autograd.Function):
    """The forward op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.chunk_size = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, weight, D, seq_idx = ctx.saved_tensors
        *found, dweight, dD = apply(_SsdGradient, *tensors, weight, D, seq_idx, ctx.chunk_size, dy, dfinal)
        return *found, None if weight is None else dweight, None if D is None else dD, None, None


class _SsdGradient(torch.autograd.Function):
    """The gradient op with its own gradient, by differentiating the code above."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.chunk_size, dy, dfinal = inputs
        ctx.save_for_backward(*tensors, dy, dfinal)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, seq_idx, dy, dfinal = ctx.saved_tensors
        inputs = [*tensors, dy, dfinal]
        given = [position for position, tensor in enumerate(inputs) if tensor is not None]

        def gradients(*present: Tensor) -> tuple[Tensor, ...]:
            whole: list[Any] = [None] * len(inputs)
            for position, tensor in zip(given, present, strict=True):
                whole[position] = tensor
            arguments: tuple[Any, ...] = (*whole[:-2], seq_idx, ctx.chunk_size, *whole[-2:])
            return _gradients(*arguments)

        with torch.autocast(dy.device.type, enabled=False):
            pulled = torch.func.vjp(gradients, *(inputs[position] for position in given))[1](tuple(cotangents))
        found: list[Tensor | None] = [None] * len(inputs)
        for position, gradient in zip(given, pulled, strict=True):
            found[position] = gradient
        return *found[:-2], None, None, *found[-2:]
