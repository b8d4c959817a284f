"""The recurrence in about 2 sqrt(l) vector operations instead of l.

Inside chunks of q positions all chunks advance together from a zero state (only the first one from the initial state),
collecting the products of their decays; then the chunks' end states are handed on one after another:

    s_t = a_t s_{t-1} + b_t,  p_t = a_t p_{t-1}   from s = 0, p = 1 at the chunk's start;     h_t = s_t + p_t h_chunk

No logarithm and no division, so any decay is exact, also 0. The gradient is the same scan in the other direction:

    g_t = dh_t + conj(a_{t+1}) g_{t+1},    db_t = g_t,    da_t = g_t conj(h_{t-1}),    dh0 = conj(a_0) g_0

It is one custom op, so that its loops are opaque to torch.compile and torch.export and no length is built in. Its
gradient is made of differentiable calls to itself: derivatives of any order work.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..transforms import apply, fold, unfold

# From this many numbers per position on, a CPU works longer on one position than Python needs to dispatch it.
_SERIAL_NUMBERS = 8192


def linear_scan_chunked(
    a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool, state_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `linear_scan`; a is (b, l, d), (b, l, 1) or (1, 1, d), b (b, l, d)."""
    if initial_state is not None:
        initial_state = initial_state.to(state_dtype)
    states, final = apply(_Scan, a.to(state_dtype), b.to(state_dtype), initial_state, reverse)
    return states.to(b.dtype), final


@torch.library.custom_op("ssm::linear_scan_chunked", mutates_args=())
def _scan(a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    batch, length, channels = b.shape
    a = a.expand(-1, length, -1)
    serial = b.device.type == "cpu" and batch * channels >= _SERIAL_NUMBERS
    q = length if serial else max(1, math.isqrt(length))
    states = torch.empty_like(b, memory_format=torch.contiguous_format)
    products = torch.empty_like(a, memory_format=torch.contiguous_format) if q < length else None

    def at(x: Tensor, k: int) -> Tensor:
        """Position k of every chunk; the last chunk of the scan may be too short to have one."""
        return x[:, (length - 1 - k) % q :: q] if reverse else x[:, k::q]

    def with_successor(x: Tensor, count: int) -> Tensor:
        return x[:, -count:] if reverse else x[:, :count]

    at(states, 0).copy_(at(b, 0))
    if initial_state is not None:
        first = length - 1 if reverse else 0
        states[:, first].addcmul_(a[:, first], initial_state)
    if products is not None:
        at(products, 0).copy_(at(a, 0))
    for k in range(1, q):
        a_k, b_k = at(a, k), at(b, k)
        count = b_k.shape[1]
        torch.addcmul(b_k, a_k, with_successor(at(states, k - 1), count), out=at(states, k))
        if products is not None:
            torch.mul(a_k, with_successor(at(products, k - 1), count), out=at(products, k))

    for start in range(q, length, q):
        assert products is not None  # there is a second chunk
        size = min(q, length - start)
        first = length - start - size if reverse else start
        previous = states[:, length - start] if reverse else states[:, start - 1]
        states[:, first : first + size].addcmul_(products[:, first : first + size], previous[:, None])
    return states, states[:, 0 if reverse else -1].clone()


@_scan.register_fake
def _(a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(b, memory_format=torch.contiguous_format), b.new_empty(b.shape[0], b.shape[2])


@_scan.register_vmap
def _(
    info: Any, in_dims: tuple[Any, ...], a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    count = info.batch_size
    plain = b.shape[:] if in_dims[1] is None else b.select(in_dims[1], 0).shape
    if in_dims[0] is not None:
        a = fold(a.movedim(in_dims[0], 0).expand(count, plain[0], -1, -1), 0, count)  # type: ignore[assignment]
    elif a.shape[0] != 1:
        a = fold(a, None, count)  # type: ignore[assignment]
    states, final = _scan(a, fold(b, in_dims[1], count), fold(initial_state, in_dims[2], count), reverse)
    return (unfold(states, count), unfold(final, count)), (0, 0)


class _Scan(torch.autograd.Function):
    """The custom op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        return _scan(a, b, initial_state, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        a, _, initial_state, ctx.reverse = inputs
        ctx.save_for_backward(a, output[0], initial_state)

    @staticmethod
    def backward(ctx: Any, dstates: Tensor, dfinal: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        a, states, initial_state = ctx.saved_tensors
        batch, length, channels = states.shape
        zero = states.new_zeros(batch, 1, channels) if initial_state is None else initial_state[:, None]
        one = a.new_ones(a.shape[0], 1, a.shape[2])
        wide = a.expand(-1, length, -1)
        if ctx.reverse:
            following, before = torch.cat([one, wide[:, :-1]], 1), torch.cat([states[:, 1:], zero], 1)
        else:
            following, before = torch.cat([wide[:, 1:], one], 1), torch.cat([zero, states[:, :-1]], 1)
        g, _ = apply(_Scan, following.conj().resolve_conj(), dstates, dfinal, not ctx.reverse)
        da = (g * before.conj()).sum_to_size(a.shape)
        first = length - 1 if ctx.reverse else 0
        dstate = None if initial_state is None else wide[:, first].conj() * g[:, first]
        return da, g, dstate, None
