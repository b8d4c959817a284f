"""The recurrence as matrix products over chunks of q positions, with the gradient written out.

One scan does both terms of the trapezoid: with `w_s = gamma_s + beta_{s+1}` (0 for beta of the next sequence) input s
enters the state with weight w_s, and the diagonal, where w is not complete yet, has gamma. Angles are counted from a
chunk's start, and the state is turned back by the chunk's total before it goes on, so nothing grows with the length.
With L[t,s] = e^{u_t - u_s} w_s (s < t), gamma_t (s = t), M = (q k^T) L over (position, rank) and S the entering state:

    y = M v + e^u q S + D v             S <- rot(e^{u_last} S + sum_s e^{u_last - u_s} w_s v_s k_s^T; -a_last)
    G = dy v^T,  dq = (G L) k + e^u (dy S),  dk = (G L)^T q + e^{u_last - u} w (v R)
    da_i = dq_i . J q_i + dk_i . J k_i  (J turns by a quarter),    da_last -= R . J S'
    ddelta_t = sum of da_i from t to the chunk's end

R is the gradient of the state S' that leaves the chunk, before it is turned. The rest is as in `ssd`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..transforms import apply, fold, unfold
from .state import rotate, spin

# Numbers in the largest temporary of a block: small enough for a CPU's cache, large enough to fill a GPU.
_BLOCK_NUMBERS = {"cpu": 2**18}
_BLOCK_NUMBERS_ELSEWHERE = 2**26
# Which arguments are shared by the rows of a batch: the biases, D and x_rank.
_SHARED = range(9, 13)


def trapezoid_ssd_chunked(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, the last state turned back by its angles, and these angles.

    Args:
        *arguments: x, log_decay, gamma, beta, theta, B, C, the state turned back by its angles and with the first
            position's share of the last input, these angles, B_bias, C_bias, D, x_rank, seq_idx, half, chunk_size.
    """
    return apply(_Trapezoid, *arguments)


class _Block(NamedTuple):
    """k chunks of q positions, heads before positions, ranks side by side with positions."""

    v: Tensor  # (b, k, h, q * r, p)
    keys: Tensor  # rotated, (b, k, h, q * r, n)
    queries: Tensor  # rotated, (b, k, h, q * r, n)
    cos: Tensor  # of the angles from the chunk's start, (b, k, h, q, s)
    sin: Tensor
    rate: Tensor  # pi tanh(theta), (b, k, 1, q, s)
    dt: Tensor  # gamma + beta, (b, k, h, q)
    log_decay: Tensor  # (b, k, h, q)
    gamma: Tensor  # (b, k, h, q)
    weight: Tensor  # (b, k, h, q)
    linked: Tensor | None  # whether the next sequence has not begun, (b, k, 1, q, q)
    decay_in: Tensor  # e^{u_t}, from the chunk's start, (b, k, h, q)
    decay_out: Tensor  # e^{u_last - u_s}, to its end, (b, k, h, q)


def _blocks(x: Tensor, B: Tensor, chunk_size: int) -> list[tuple[int, int, int]]:
    """(start, k, q) of every block; the last chunk of a row is a block of its own if it is shorter."""
    batch, length, nheads, headdim = x.shape
    q, rank, state = min(chunk_size, length), B.shape[2], B.shape[4]
    largest = batch * nheads * max((q * rank) ** 2, q * rank * max(headdim, state), headdim * state)
    k = max(1, _BLOCK_NUMBERS.get(x.device.type, _BLOCK_NUMBERS_ELSEWHERE) // largest)
    whole = length // q
    blocks = [(first * q, min(k, whole - first), q) for first in range(0, whole, k)]
    return blocks + ([(whole * q, 1, length % q)] if length % q else [])


def _block(
    span: tuple[int, int, int],
    x: Tensor,
    log_decay: Tensor,
    gamma: Tensor,
    beta: Tensor,
    theta: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    x_rank: Tensor,
    seq_idx: Tensor | None,
    half: bool,
) -> _Block:
    start, k, q = span
    stop, length, nheads, dtype = start + k * q, x.shape[1], x.shape[2], log_decay.dtype

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:, start:stop].unflatten(1, (k, q))

    def per_head(tensor: Tensor) -> Tensor:
        return cut(tensor).movedim(3, 2).contiguous()

    steps, now = per_head(log_decay), per_head(gamma)
    following = beta[:, start + 1 : stop + 1]
    if seq_idx is not None:
        next_idx = seq_idx[:, start + 1 : stop + 1]
        following = following * (next_idx == seq_idx[:, start : start + next_idx.shape[1]])[..., None]
    if stop == length:
        following = torch.cat([following, torch.zeros_like(beta[:, :1])], dim=1)
    dt = now + per_head(beta)
    rate = math.pi * cut(theta).tanh()[:, :, None]
    angles = (rate * dt[..., None]).cumsum(3)
    cos, sin = angles.cos(), angles.sin()

    def rotated(tensor: Tensor, bias: Tensor) -> Tensor:
        heads = cut(tensor).to(dtype).movedim(4, 2)  # (b, k, g, q, r, n)
        heads = heads.repeat_interleave(nheads // heads.shape[2], dim=2) + bias[:, None]
        return rotate(heads, cos[..., None, :], sin[..., None, :], half).flatten(3, 4)

    v = cut(x).to(dtype).movedim(3, 2)[..., None, :] * x_rank[:, None]
    decay_in = steps.cumsum(-1).exp()
    after = torch.cat([torch.zeros_like(steps[..., :1]), steps[..., 1:].flip(-1).cumsum(-1)], -1)
    decay_out = after.flip(-1).exp()
    linked = None
    if seq_idx is not None:
        index = cut(seq_idx)
        before = torch.cat([seq_idx[:, max(start - 1, 0), None], index[:, :-1, -1]], dim=1)
        decay_in = decay_in * (index == before[..., None])[:, :, None]
        decay_out = decay_out * (index == index[..., -1:])[:, :, None]
        linked = (index[..., None] == index[..., None, :])[:, :, None]
    return _Block(
        v=v.flatten(3, 4),
        keys=rotated(B, B_bias),
        queries=rotated(C, C_bias),
        cos=cos,
        sin=sin,
        rate=rate,
        dt=dt,
        log_decay=steps,
        gamma=now,
        weight=now + following.unflatten(1, (k, q)).movedim(3, 2),
        linked=linked,
        decay_in=decay_in,
        decay_out=decay_out,
    )


def _decays(block: _Block) -> Tensor:
    """e to the sum of the log-decays after s up to t, (b, k, h, s, t), 0 unless s < t in one sequence."""
    q = block.log_decay.shape[-1]
    steps = block.log_decay[..., None, :].expand(*block.log_decay.shape, q).triu(1)
    decays = steps.cumsum(-1).exp().triu(1)
    return decays if block.linked is None else decays * block.linked


def _links(block: _Block, decays: Tensor) -> Tensor:
    """L transposed, (b, k, h, s, 1, t, 1) to be used on (position, rank) pairs."""
    return (decays * block.weight[..., None] + torch.diag_embed(block.gamma))[..., :, None, :, None]


def _ranks(per_position: Tensor, rank: int) -> Tensor:
    """(b, k, h, q) -> (b, k, h, q * r, 1)."""
    return per_position.repeat_interleave(rank, dim=3)[..., None]


def _turned(state: Tensor, block: _Block, c: int, sign: int, half: bool) -> Tensor:
    """A state (b, h, p, n) turned by the total angle of chunk c."""
    return rotate(state, block.cos[:, c, :, -1, None], sign * block.sin[:, c, :, -1, None], half)


def _states(block: _Block, state: Tensor, rank: int, half: bool) -> tuple[list[Tensor], Tensor]:
    """The states that enter the chunks, (b, h, p, n) each, and the one after the block."""
    added = (block.v * _ranks(block.decay_out * block.weight, rank)).mT @ block.keys
    entering = []
    for c in range(block.v.shape[1]):
        entering.append(state)
        state = _turned(block.decay_in[:, c, :, -1, None, None] * state + added[:, c], block, c, -1, half)
    return entering, state


def _total_angles(phi: Tensor, block: _Block, span: tuple[int, int, int], seq_idx: Tensor | None) -> Tensor:
    delta = block.rate * block.dt[..., None]
    if seq_idx is not None:
        start, k, q = span
        last = seq_idx[:, start : start + k * q].unflatten(1, (k, q)) == seq_idx[:, -1, None, None]
        delta = delta * last[:, :, None, :, None]
    # Chunks first, so that the sum of few reduced numbers keeps its digits.
    return (phi + delta.sum(3).remainder(2 * math.pi).sum(1)).remainder(2 * math.pi)


def _outputs(
    x: Tensor,
    log_decay: Tensor,
    gamma: Tensor,
    beta: Tensor,
    theta: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    phi: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor,
    x_rank: Tensor,
    seq_idx: Tensor | None,
    half: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, nheads, headdim = x.shape
    rank = B.shape[2]
    if seq_idx is not None:
        phi = phi * (seq_idx[:, 0] == seq_idx[:, -1])[:, None, None]
    outputs = x.new_empty(batch, length, rank, nheads, headdim)
    for span in _blocks(x, B, chunk_size):
        start, k, q = span
        block = _block(span, x, log_decay, gamma, beta, theta, B, C, B_bias, C_bias, x_rank, seq_idx, half)
        entering, state = _states(block, state, rank, half)
        phi = _total_angles(phi, block, span, seq_idx)
        scores = (block.keys @ block.queries.mT).unflatten(4, (q, rank)).unflatten(3, (q, rank))
        mixing = (scores * _links(block, _decays(block))).flatten(5, 6).flatten(3, 4)
        y = mixing.mT @ block.v + D[:, None, None] * block.v
        y = y + (block.queries @ torch.stack(entering, dim=1).mT) * _ranks(block.decay_in, rank)
        y = y.unflatten(3, (q, rank)).movedim(2, 4)  # (b, k, q, r, h, p)
        outputs[:, start : start + k * q].unflatten(1, (k, q)).copy_(y)
    return outputs, state, phi.clone()


def _gradients(
    x: Tensor,
    log_decay: Tensor,
    gamma: Tensor,
    beta: Tensor,
    theta: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    phi: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor,
    x_rank: Tensor,
    seq_idx: Tensor | None,
    half: bool,
    chunk_size: int,
    dy: Tensor,
    dfinal: Tensor,
    dphi: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of the first 13 arguments."""
    dtype, groups, nheads, rank, count = state.dtype, B.shape[3], x.shape[2], B.shape[2], theta.shape[2]
    spans = _blocks(x, B, chunk_size)
    before, blocks_of = [state], (x, log_decay, gamma, beta, theta, B, C, B_bias, C_bias, x_rank, seq_idx, half)
    for span in spans[:-1]:
        before.append(_states(_block(span, *blocks_of), before[-1], rank, half)[1])

    carried = dfinal.to(dtype)
    parts: list[tuple[Tensor, ...]] = []
    sums: list[tuple[Tensor, ...]] = []
    for span in reversed(spans):
        start, k, q = span
        block = _block(span, *blocks_of)
        entering, last = _states(block, before.pop(), rank, half)
        grad = dy[:, start : start + k * q].to(dtype).unflatten(1, (k, q)).movedim(4, 2).flatten(3, 4)
        decayed = grad * _ranks(block.decay_in, rank)
        added = decayed.mT @ block.queries
        after, leaving, found = [*entering[1:], last], [carried] * k, [carried] * k
        for c in range(k - 1, -1, -1):
            found[c], leaving[c] = carried, _turned(carried, block, c, 1, half)
            carried = block.decay_in[:, c, :, -1, None, None] * leaving[c] + added[:, c]
        enter, leave = torch.stack(entering, dim=1), torch.stack(leaving, dim=1)  # (b, k, h, p, n)

        decays = _decays(block)
        scores = (block.keys @ block.queries.mT).unflatten(4, (q, rank)).unflatten(3, (q, rank))
        products = (block.v @ grad.mT).unflatten(4, (q, rank)).unflatten(3, (q, rank))
        links = _links(block, decays)
        mixing = (scores * links).flatten(5, 6).flatten(3, 4)
        kernel = (products * links).flatten(5, 6).flatten(3, 4)
        both = (scores * products).sum((4, 6))  # gradient of L, (b, k, h, s, t)
        late = _ranks(block.decay_out * block.weight, rank)
        from_end = block.keys @ leave.mT
        dv = mixing @ grad + from_end * late + D[:, None, None] * grad
        dq = kernel.mT @ block.keys + decayed @ enter
        dk = kernel @ block.queries + (block.v * late) @ leave

        pairwise = both * decays
        written = (block.v * from_end).sum(-1).unflatten(3, (q, rank)).sum(-1) * block.decay_out
        read = (decayed * (block.queries @ enter.mT)).sum(-1).unflatten(3, (q, rank)).sum(-1)
        dweight = pairwise.sum(-1) + written
        crossing = torch.ones(q, q, dtype=dtype, device=x.device).tril(-1) @ (pairwise * block.weight[..., None])
        through = (enter * leave).sum((-2, -1)) * block.decay_in[..., -1]
        written = (written * block.weight)[..., :-1].cumsum(-1)
        dlog_decay = crossing.triu().sum(-1) + read.flip(-1).cumsum(-1).flip(-1) + through[..., None]
        dlog_decay = dlog_decay + torch.cat([torch.zeros_like(read[..., :1]), written], -1)

        dangle = spin(dq, block.queries, count, half) + spin(dk, block.keys, count, half)
        dangle = dangle.unflatten(3, (q, rank)).sum(4)
        border = spin(torch.stack(found, dim=1), torch.stack(after, dim=1), count, half).sum(3)
        ddelta = dangle.flip(3).cumsum(3).flip(3) - border[..., None, :]
        into = dphi.to(dtype)[:, None, :, None]
        if seq_idx is not None:
            same = seq_idx[:, start : start + k * q].unflatten(1, (k, q)) == seq_idx[:, -1, None, None]
            into = into * same[:, :, None, :, None]
        ddelta = ddelta + into
        ddt = (ddelta * block.rate).sum(-1)
        dtheta = (ddelta * block.dt[..., None]).sum(2) * (math.pi - block.rate[:, :, 0].square() / math.pi)
        dgamma = ddt + dweight + both.diagonal(dim1=-2, dim2=-1)

        cos, sin = block.cos[..., None, :], block.sin[..., None, :]
        dkeys = rotate(dk.unflatten(3, (q, rank)), cos, -sin, half)  # (b, k, h, q, r, n)
        dqueries = rotate(dq.unflatten(3, (q, rank)), cos, -sin, half)
        dv = dv.unflatten(3, (q, rank))
        heads = x[:, start : start + k * q].to(dtype).unflatten(1, (k, q)).movedim(3, 2)[..., None, :]
        parts.append(
            (
                (dv * x_rank[:, None]).sum(4).to(x.dtype).movedim(2, 3).flatten(1, 2),
                *(part.movedim(2, 3).flatten(1, 2) for part in (dlog_decay, dgamma, ddt, dweight)),
                dtheta.flatten(1, 2),
                *(
                    part.unflatten(2, (groups, nheads // groups)).sum(3).movedim(2, 4).flatten(1, 2).to(B.dtype)
                    for part in (dkeys, dqueries)
                ),
            )
        )
        sums.append(
            (
                dkeys.sum((0, 1, 3)),
                dqueries.sum((0, 1, 3)),
                (grad * block.v).sum((0, 1, 3, 4)),
                (dv * heads).sum((0, 1, 3)),
            )
        )
    dx, dlog_decay, dgamma, ddt, dweight, dtheta, dB, dC = (
        torch.cat(part, dim=1) for part in zip(*reversed(parts), strict=True)
    )
    shifted = dweight[:, :-1]
    if seq_idx is not None:
        shifted = shifted * (seq_idx[:, 1:] == seq_idx[:, :-1])[..., None]
        dphi = dphi * (seq_idx[:, 0] == seq_idx[:, -1])[:, None, None]
    dbeta = ddt + torch.cat([torch.zeros_like(dweight[:, :1]), shifted], dim=1)
    shared = (torch.stack(part).sum(0) for part in zip(*sums, strict=True))
    return dx, dlog_decay, dgamma, dbeta, dtheta, dB, dC.to(C.dtype), carried, dphi.to(dtype).clone(), *shared


@torch.library.custom_op("ssm::trapezoid_ssd_chunked", mutates_args=())
def _forward(
    x: Tensor,
    log_decay: Tensor,
    gamma: Tensor,
    beta: Tensor,
    theta: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    phi: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor,
    x_rank: Tensor,
    seq_idx: Tensor | None,
    half: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):  # it would round the operands of the products
        return _outputs(
            x, log_decay, gamma, beta, theta, B, C, state, phi, B_bias, C_bias, D, x_rank, seq_idx, half, chunk_size
        )


@torch.library.custom_op("ssm::trapezoid_ssd_chunked_bwd", mutates_args=())
def _backward(
    x: Tensor,
    log_decay: Tensor,
    gamma: Tensor,
    beta: Tensor,
    theta: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    phi: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor,
    x_rank: Tensor,
    seq_idx: Tensor | None,
    half: bool,
    chunk_size: int,
    dy: Tensor,
    dfinal: Tensor,
    dphi: Tensor,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):
        return _gradients(
            x, log_decay, gamma, beta, theta, B, C, state, phi, B_bias, C_bias, D, x_rank, seq_idx, half, chunk_size,
            dy, dfinal, dphi,
        )  # type: ignore[return-value]  # fmt: skip


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, B, state, phi = arguments[0], arguments[5], arguments[7], arguments[8]
    batch, length, nheads, headdim = x.shape
    y = x.new_empty(batch, length, B.shape[2], nheads, headdim)
    return y, state.new_empty(state.shape), phi.new_empty(phi.shape)


@_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in arguments[:13])


@_forward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    count = info.batch_size
    if any(in_dims[place] is not None for place in _SHARED):
        return _one_by_one(_forward, count, in_dims, arguments)
    outputs = tuple(unfold(output, count) for output in _forward(*_folded(count, in_dims, arguments)))
    return outputs, (0,) * len(outputs)


@_backward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    # What rows share gets a gradient of its own in each instance, so these cannot be merged into one batch.
    return _one_by_one(_backward, info.batch_size, in_dims, arguments)


def _folded(count: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> list[Any]:
    return [
        fold(argument, in_dims[place], count) if isinstance(argument, Tensor) and place not in _SHARED else argument
        for place, argument in enumerate(arguments)
    ]


def _one_by_one(op: Any, count: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    found = [
        op(*(a if dim is None else a.select(dim, place) for a, dim in zip(arguments, in_dims, strict=True)))
        for place in range(count)
    ]
    outputs = tuple(torch.stack(output) for output in zip(*found, strict=True))
    return outputs, (0,) * len(outputs)


class _Trapezoid(torch.autograd.Function):
    """The forward op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.half, ctx.chunk_size = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor, dphi: Tensor) -> tuple[Tensor | None, ...]:
        found = apply(_TrapezoidGradient, *ctx.saved_tensors, ctx.half, ctx.chunk_size, dy, dfinal, dphi)
        return *found, None, None, None


class _TrapezoidGradient(torch.autograd.Function):
    """The gradient op with its own gradient, by differentiating the code above."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.half, ctx.chunk_size = inputs[14:16]
        ctx.save_for_backward(*inputs[:14], *inputs[16:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        seq_idx = saved[13]

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            arguments: tuple[Any, ...] = (*tensors[:13], seq_idx, ctx.half, ctx.chunk_size, *tensors[13:])
            return _gradients(*arguments)

        with torch.autocast(saved[0].device.type, enabled=False):
            found = torch.func.vjp(gradients, *saved[:13], *saved[14:])[1](tuple(cotangents))
        return *found[:13], None, None, None, *found[13:]
