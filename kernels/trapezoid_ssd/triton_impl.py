"""`trapezoid_ssd` in Triton: launchers, custom ops and the autograd function around the kernels of `ssd`.

One kernel writes turned keys and queries per head, the weights of the inputs and skips such that what is left is `ssd`
with as many groups as heads. For the gradient they are computed again, with what turned them; a kernel of `ssd` finds
the states around chunks, those of `triton_links.py` and `triton_maps.py` the gradients, and a small one adds up gamma
and beta. Rows are taken in groups, so that all this never exists for many at once. With several ranks `ssd` scans
(position, rank) pairs; the kernels of `triton_ranks.py` put right in outputs what the ranks of a position read of each
other.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..replay import replayed
from ..ssd.op import in_dtype
from ..ssd.triton_outputs import Sweep, contiguous, run_outputs, strides
from ..ssd.triton_tiles import GradientTiles, fine_chunk, fine_products, gradient_tiles
from ..transforms import FirstDerivative, apply, call, operator
from ..triton_utils import INTERPRETED, cdiv, multiprocessors, next_power_of_2, on_device
from .state import rotate, spin
from .triton_fused import fused_outputs, fuses
from .triton_gradients import (
    Angles,
    Shared,
    blocks_of_heads,
    empty_keys,
    empty_shared,
    links,
    maps,
    states_at_borders,
    turned_columns,
)
from .triton_inputs import Inputs, angles_of_chunks, readable
from .triton_kernels import (
    _trapezoid_turn_fwd_kernel,
    _trapezoid_turn_kernel,
    _trapezoid_weights_kernel,
)
from .triton_last import key_gradients, key_op, last_key
from .triton_ranks import inputs_of_ranks, outputs_of_ranks, products_of_ranks


def trapezoid_ssd_triton(
    x: Tensor,
    log_decay: Tensor,
    gamma: Tensor,
    beta: Tensor,
    theta: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    phi: Tensor | None,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor,
    x_rank: Tensor | None,
    seq_idx: Tensor | None,
    half: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs, and the state after them: angles, matrix, key and input.

    `state` has the first position's share of the last input, and like the last state it is turned by its angles `phi`;
    both are None at the start. `x_rank` may be None with one rank only.
    """
    given, ranks, dtype, sums = x, B.shape[2], x.dtype, log_decay.dtype
    narrow = sums if sums == torch.float64 else torch.promote_types(torch.promote_types(dtype, B.dtype), C.dtype)
    x, B, C = in_dtype(x, narrow), in_dtype(B, narrow), in_dtype(C, narrow)
    if ranks == 1 and x_rank is not None:
        x, x_rank = (x * x_rank[:, 0]).to(narrow), None
    if missing := next_power_of_2(ranks) - ranks:  # tiles hold whole positions: ranks of zeros fill them up
        assert x_rank is not None
        B, C = (torch.nn.functional.pad(one, (0, 0, 0, 0, 0, missing)) for one in (B, C))
        B_bias, C_bias, x_rank = (torch.nn.functional.pad(one, (0, 0, 0, missing)) for one in (B_bias, C_bias, x_rank))
    y, through, final, k, v = apply(
        _Trapezoid, x, log_decay, gamma, beta, theta, B, C, state, phi, B_bias, C_bias, D, x_rank, seq_idx, half
    )
    if missing:
        y, k = y[:, :, :ranks], k[:, :ranks]
    if seq_idx is not None:
        # Angles ran through all sequences of a row; those of the last one begin where it begins.
        angles = _of_last_sequence(theta.to(sums).tanh(), gamma + beta, phi, seq_idx)
        back = angles - through
        final, through = rotate(final, back.cos()[:, :, None], back.sin()[:, :, None], half), angles
        k = last_key(angles, B[:, -1, :ranks], B_bias[:, :ranks], half)
    return in_dtype(y, dtype), through, final, k, v if x is given else given[:, -1].clone()


def _of_last_sequence(rate: Tensor, dt: Tensor, phi: Tensor | None, seq_idx: Tensor) -> Tensor:
    """Angles after the last position modulo 2 pi, (b, h, s); float64, since sums over a row lose float32 digits."""
    dt = dt * (seq_idx == seq_idx[:, -1:])[..., None]
    total = math.pi * (dt.double().mT @ rate.double())
    if phi is not None:
        total = total + phi * (seq_idx[:, 0] == seq_idx[:, -1])[:, None, None]
    return total.remainder(2 * math.pi).to(rate.dtype)


# Turned keys and queries of a group of rows, with inputs and outputs of several ranks, take about this many bytes; in
# the gradient they do together with states, turns and matrices over chunks.
_TURNED_BYTES = 2**29
_GRADIENT_BYTES = 430 * 2**20
# Rows that together fill the multiprocessors, so that sweeps over them are not cut, may take this many in the gradient.
_FILLING_BYTES = 5 * 2**28


class _Turned(NamedTuple):
    """What `ssd` takes, l counting positions and ranks."""

    x: Tensor  # (b, l, h, p)
    log_decay: Tensor  # (b, l, h)
    n: int
    k: Tensor  # (b, l, h, n), or some of their columns
    q: Tensor
    weight: Tensor  # (b, l, h)
    skip: Tensor  # (b, l, h), for outputs
    seq_idx: Tensor | None  # (b, l)
    turns: Tensor  # cos and sin side by side, (b, h, positions, 2 s), for gradients
    decays: tuple[Tensor, Tensor]  # from a chunk's start, and of weights to its end, (b, l, h), for gradients

    def sweep(self, state: Tensor | None) -> Sweep:
        fine = fine_products(self.x, self.n)
        return Sweep(self.x, self.k, self.log_decay, self.weight, state, 0, fine)


def _groups(given: Inputs, chunk: int = 0) -> list[slice]:
    """Groups of rows such that what exists for each takes few bytes; for gradients with the length of their chunks."""
    (batch, _, nheads, headdim), n, size = given.x.shape, given.B.shape[3], given.x.element_size()
    of_ranks = headdim if given.ranks > 1 else 0
    if chunk:
        wide = turned_columns(given) + headdim * n // chunk + given.rate.shape[2] // given.ranks
        row, most = (2 * wide + chunk + of_ranks) * size, _GRADIENT_BYTES
    else:
        row, most = 2 * n * size + of_ranks * (size + 4), _TURNED_BYTES
    row *= given.B.shape[1] * nheads
    rows = max(1, most // row)
    filling = multiprocessors(given.x.device) // (2 * nheads)
    if chunk and filling * row <= _FILLING_BYTES:
        rows = max(rows, filling)
    rows = cdiv(batch, cdiv(batch, rows))
    return [slice(start, start + rows) for start in range(0, batch, rows)]


def _shared(given: Inputs, half: bool, chunk: int) -> dict[str, Any]:
    """Compile-time arguments of the kernels."""
    n, pairs = given.B.shape[3], given.rate.shape[2]
    return {
        "N": n,
        "S": pairs,
        "Q": chunk,
        "BLOCK_N": max(32, next_power_of_2(n)),
        "HALF": half,
        "PACKED": given.seq_idx is not None,
        "ACC": tl.float64 if given.log_decay.dtype == torch.float64 else tl.float32,
        "RANKS": given.ranks,
    }


# Columns of keys and queries that are turned, or turned back, at once.
_COLUMNS = 32


def launch(kernel: str, numbers: int) -> dict[str, int]:
    """Options of a kernel whose tiles have so many numbers: warps, and how many registers a thread may have.

    With 128 registers 16 warps fit on a multiprocessor; their loads hide behind each other.
    """
    if INTERPRETED:
        return {}
    if kernel == "later" or numbers < 2048 or torch.version.hip is not None:
        return {"num_warps": 8 if numbers > 4096 else 4}
    return {"num_warps": 4 if kernel == "turn" else 8, "maxnreg": 128}


def _tiles(x: Tensor, n: int, chunk: int) -> GradientTiles:
    """Those of `ssd`, with short chunks where operands of products take three parts."""
    return gradient_tiles(x, n, chunk or fine_chunk(x, n), "turned ")


def _turned(given: Inputs, half: bool, chunk: int, before: Tensor, into: Tensor | None = None) -> _Turned:
    """For outputs, or for gradients, where `into` takes turned keys and queries (see `empty_keys`)."""
    (batch, _, nheads, _), (length, groups, n) = given.x.shape, given.B.shape[1:]
    ranks, wide, keep = given.ranks, given.log_decay, into is not None
    chunks, repeats = cdiv(length, chunk), nheads // groups
    shared = _shared(given, half, chunk)
    x, log_decay, seq_idx = given.x, wide, given.seq_idx
    weight = wide.new_empty(batch, length, nheads)
    skip = wide.new_empty(0) if keep else torch.empty_like(weight)
    if given.x_rank is not None:
        x = inputs_of_ranks(x, given.x_rank)
        log_decay = torch.nn.functional.pad(wide[:, :, None], (0, 0, 0, ranks - 1)).flatten(1, 2)
        seq_idx = None if seq_idx is None else seq_idx.repeat_interleave(ranks, dim=1)
        skip = given.D.expand(weight.shape)
    k, q = (given.x.new_empty(2, batch, length, nheads, n) if into is None else into).unbind(0)
    programs = batch * chunks * groups * (cdiv(k.shape[3], _COLUMNS) if keep else 1)
    blocks, block_heads = blocks_of_heads(repeats, programs, 12 * multiprocessors(given.x.device))
    # Keys have no more digits than 16 bits hold; their turns need no more either.
    turns = wide.new_empty(
        *wide.shape if keep else (0,) * 3, 2 * given.rate.shape[2], dtype=torch.float16 if k.itemsize == 2 else None
    )
    of_decays = wide.new_empty(2, *weight.shape if keep else (0,))
    decays = of_decays[0], of_decays[1]
    inputs = given.gamma, given.beta, given.rate, before, given.B, given.C, given.B_bias, given.C_bias
    sizes = length, nheads, repeats, blocks, block_heads, *strides(given.B, given.C)
    chosen = shared | {"BLOCK_N": _COLUMNS} | launch("turn", chunk * _COLUMNS)
    if keep:
        _trapezoid_turn_kernel[(programs * blocks,)](
            log_decay, *inputs, given.seq_idx, k, q, weight, turns, *decays, *sizes,
            *k.stride()[2:0:-1], EXACT=k.dtype == torch.float32, WIDTH=k.shape[3], **chosen,
        )  # fmt: skip
    else:
        _trapezoid_turn_fwd_kernel[(programs * blocks,)](
            *inputs, given.D, given.seq_idx, k, q, weight, skip, *sizes, **chosen
        )
    return _Turned(x, log_decay, n, k, q, weight, skip, seq_idx, turns, decays)


@operator("trapezoid_ssd_triton_fwd")
@replayed
def _forward(
    x: Tensor,
    log_decay: Tensor,
    gamma: Tensor,
    beta: Tensor,
    rate: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    phi: Tensor | None,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor,
    x_rank: Tensor | None,
    seq_idx: Tensor | None,
    half: bool,
    chunk: int,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (b, l * r, h, p), last state, last angles modulo 2 pi; `chunk` and `parts` are 0 to be chosen."""
    given = readable(x, log_decay, gamma, beta, rate, B, C, state, phi, B_bias, C_bias, D, x_rank, seq_idx)
    n = B.shape[3]
    y = x.new_empty(x.shape[0], B.shape[1], *x.shape[2:])
    final = log_decay.new_empty(x.shape[0], *x.shape[2:], n)
    last = log_decay.new_empty(x.shape[0], x.shape[2], rate.shape[2])
    if fuses(given):
        with on_device(x):
            fused_outputs(given, half, y, final, last, chunk, parts)
        return y, final, last
    with on_device(x):
        of_turns = _tiles(x, n, chunk).links.chunk
        before = angles_of_chunks(given, of_turns)
        for rows in _groups(given):
            some = given.cut(rows)
            turned = _turned(some, half, of_turns, before[rows])
            # What several ranks of a position add comes to unrounded outputs.
            rounded = some.x_rank is not None and y.dtype != log_decay.dtype
            partial = log_decay.new_empty(y[rows].shape) if rounded else y[rows]
            # Short chunks as in the gradient, where operands of products take three parts.
            of_outputs = chunk or fine_chunk(x, n)
            run_outputs(
                turned.sweep(some.state), turned.q, turned.skip, turned.seq_idx, partial, final[rows], of_outputs, parts
            )
            if some.x_rank is not None:
                product = products_of_ranks(some.B, some.C, some.B_bias, some.C_bias)
                outputs_of_ranks(some.x, some.x_rank, product, some.gamma, some.beta, some.seq_idx, partial, y[rows])
        torch.mul(before[:, :, -1], math.pi, out=last)
    return y, final, last


@torch.library.register_fake("ssm::trapezoid_ssd_triton_fwd")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, log_decay, rate, B = arguments[0], arguments[1], arguments[4], arguments[5]
    states = log_decay.new_empty(x.shape[0], *x.shape[2:], B.shape[3])
    y = x.new_empty(x.shape[0], B.shape[1], *x.shape[2:])
    return y, states, log_decay.new_empty(x.shape[0], x.shape[2], rate.shape[2])


@operator("trapezoid_ssd_triton_bwd")
@replayed
def _backward(
    x: Tensor,
    log_decay: Tensor,
    gamma: Tensor,
    beta: Tensor,
    rate: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    phi: Tensor | None,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor,
    x_rank: Tensor | None,
    seq_idx: Tensor | None,
    half: bool,
    dy: Tensor,
    dfinal: Tensor | None,
    dphase: Tensor | None,
    dphi_end: Tensor | None,
    chunk: int,
    parts: int,
    blocks: int,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """Gradients of x to x_rank (empty if it is None); `blocks` (of a group's heads) is 0 to be chosen.

    `dphase` is the gradient of the last angles, `dphi_end`, with what they do to the last state.
    """
    given = readable(x, log_decay, gamma, beta, rate, B, C, state, phi, B_bias, C_bias, D, x_rank, seq_idx)
    dy, dfinal, dphase, dphi_end = dy.contiguous(), contiguous(dfinal), contiguous(dphase), contiguous(dphi_end)
    n = B.shape[3]
    tiles = _tiles(x, n, chunk)
    dx, dlog_decay = x.new_empty(x.shape), torch.empty_like(given.log_decay)
    dgamma, dbeta = torch.empty_like(given.log_decay), torch.empty_like(given.log_decay)
    drate, dphi = torch.empty_like(given.rate), log_decay.new_empty(x.shape[0], x.shape[2], rate.shape[2])
    dB, dC = x.new_empty(B.shape), x.new_empty(C.shape)
    dstate = log_decay.new_empty(x.shape[0], *x.shape[2:], n)
    into = dx, dlog_decay, dgamma, dbeta, drate, dB, dC, dstate, dphi
    ends = dfinal, dphase, dphi_end
    with on_device(x):
        chunk, chunks = tiles.links.chunk, cdiv(B.shape[1], tiles.links.chunk)
        before, shared = angles_of_chunks(given, chunk), empty_shared(given, chunk)
        for rows in _groups(given, chunk):
            _gradients(
                given.cut(rows), half, tiles, before[rows], dy[rows],
                [None if one is None else one[rows] for one in ends], [one[rows] for one in into],
                shared.cut(slice(rows.start * chunks, rows.stop * chunks)), parts, blocks,
            )  # fmt: skip
    dB_bias, dC_bias, dD, dx_rank = (one.sum(0) if one.numel() else one for one in shared)
    return dx, dlog_decay, dgamma, dbeta, drate, dB, dC, dstate, dphi, dB_bias, dC_bias, dD, dx_rank


def _gradients(
    given: Inputs,
    half: bool,
    tiles: GradientTiles,
    before: Tensor,
    dy: Tensor,
    ends: list[Tensor | None],
    into: list[Tensor],
    shared: Shared,
    parts: int,
    blocks: int,
) -> None:
    """Write gradients of a group of rows; `ends` are those of the last state and angles."""
    dx, dlog_decay, dgamma, dbeta, drate, dB, dC, dstate, dphi = into
    dfinal, dphase, dphi_end = ends
    if 20 * given.x.shape[0] * given.x.shape[2] >= 9 * multiprocessors(dy.device):
        parts = parts or 1  # two sweeps over each head fill it
    turned = _turned(given, half, tiles.links.chunk, before, empty_keys(given, tiles, parts))
    wide, sweep = given.log_decay, turned.sweep(given.state)
    borders = states_at_borders(
        given, half, sweep, turned.q, turned.seq_idx, dy, turned.decays, dfinal, dstate, tiles, parts
    )
    kernel, dweight = links(given, half, sweep, turned.q, dy, borders, tiles.links, dx, dlog_decay, dgamma, shared)
    angles = Angles(turned.turns, half, dphase, dphi_end)
    ddt = maps(
        given, angles, sweep, turned.q, dy, turned.decays, borders, kernel, tiles.maps, drate, dB, dC, dphi, shared,
        blocks,
    )  # fmt: skip
    _trapezoid_weights_kernel[(cdiv(wide.numel(), 1024),)](
        ddt, dgamma, dweight, given.seq_idx, dgamma, dbeta, wide.numel(), given.x.shape[1], given.x.shape[2],
        SLICES=len(ddt), PACKED=given.seq_idx is not None, BLOCK=1024,
    )  # fmt: skip


@torch.library.register_fake("ssm::trapezoid_ssd_triton_bwd")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    x, log_decay, gamma, beta, rate, B, C, _, _, B_bias, C_bias, D, x_rank = arguments[:13]
    dstate = log_decay.new_empty(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    dphi = log_decay.new_empty(x.shape[0], x.shape[2], rate.shape[2])
    like = (tensor.new_empty(tensor.shape) for tensor in (x, log_decay, gamma, beta, rate, B, C))
    dx_rank = log_decay.new_empty(0 if x_rank is None else x_rank.shape)
    return *like, dstate, dphi, *(tensor.new_empty(tensor.shape) for tensor in (B_bias, C_bias, D)), dx_rank


class _Trapezoid(torch.autograd.Function):
    """The forward op with what stands around it, and its gradient.

    Tensors as `trapezoid_ssd` takes them; outputs are y (b, l, r, h, p), last angles, matrix, key and input.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        *tensors, half = arguments
        x, B, B_bias = tensors[0], tensors[5], tensors[9]
        y, final, last = call(_forward, *_flat(tensors), half, 0, 0)
        k = call(key_op, last, B[:, -1], B_bias, half)
        return y.unflatten(1, (x.shape[1], -1)), last[:, :, : tensors[4].shape[2]], final, k, x[:, -1].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.half = inputs
        ctx.save_for_backward(*tensors, *output[1:4])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dphi, dfinal, dk, dv = gradients
        *tensors, last, final, k = ctx.saved_tensors
        x, theta, B, half = tensors[0], tensors[4], tensors[5], ctx.half
        flat = _flat(tensors)
        rate, pairs = flat[4], theta.shape[2]
        dy = x.new_zeros(x.shape[0], flat[5].shape[1], *x.shape[2:]) if dy is None else dy.flatten(1, 2)
        if dk is not None:
            of_angles, of_last, of_bias = key_gradients(dk, last, k, B.shape[3], half)
            dphi = of_angles if dphi is None else dphi + of_angles
        if dphi is not None and not pairs:
            dphi = None
        dphase = dphi
        if dfinal is not None and pairs:
            # The last state is turned by the last angles.
            turned = spin(dfinal, final, pairs, half).sum(2)
            dphase = turned if dphi is None else dphi + turned
        found = list(apply(_TrapezoidGradient, *flat, half, dy, dfinal, dphase, dphi))
        drate = torch.ops.aten.tanh_backward(found[4], rate)
        found[4] = in_dtype(drate, theta.dtype) if pairs else theta.new_zeros(theta.shape)
        found[5:7] = found[5].view(B.shape), found[6].view(B.shape)
        found[8] = found[8][:, :, :pairs]
        if dk is not None:
            found[5] = _added_last(found[5], of_last)
            found[9] = found[9] + of_bias
        if dv is not None:
            found[0] = _added_last(found[0], dv)
        for place in (7, 8, 12):
            found[place] = None if tensors[place] is None else found[place]
        return *found, None, None


def _flat(tensors: list[Any]) -> list[Any]:
    """The tensors as the ops take them: rates, in half turns, instead of theta, ranks side by side in B and C."""
    x, log_decay, gamma, beta, theta, B, C, state, phi, *others = tensors
    # Angles are counted in half turns, so that whole turns are taken off exactly.
    rate = in_dtype(theta, log_decay.dtype).tanh()
    if not theta.shape[2]:  # one that stands still
        rate = rate.new_zeros(*rate.shape[:2], 1)
        phi = None if phi is None else phi.new_zeros(*phi.shape[:2], 1)
    return [x, log_decay, gamma, beta, rate, B.flatten(1, 2), C.flatten(1, 2), state, phi, *others]


def _added_last(gradient: Tensor, last: Tensor) -> Tensor:
    """A gradient (b, l, ...) with something added at the last position, (b, ...)."""
    return torch.cat([gradient[:, :-1], (gradient[:, -1] + last).to(gradient.dtype)[:, None]], dim=1)


class _TrapezoidGradient(FirstDerivative):
    name = "trapezoid_ssd"

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = call(_backward, *arguments, 0, 0, 0)
        return found


def _one_by_one(op: Any, info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    # Biases and D are shared by the rows of a call, so that mapped ones cannot be merged into a batch.
    each = (
        [argument] * info.batch_size if dim is None else argument.unbind(dim)
        for argument, dim in zip(arguments, in_dims, strict=True)
    )
    found = [op(*one) for one in zip(*each, strict=True)]
    outputs = tuple(torch.stack(parts) for parts in zip(*found, strict=True))
    return outputs, (0,) * len(outputs)


@torch.library.register_vmap("ssm::trapezoid_ssd_triton_fwd")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    return _one_by_one(_forward, info, in_dims, arguments)


@torch.library.register_vmap("ssm::trapezoid_ssd_triton_bwd")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    return _one_by_one(_backward, info, in_dims, arguments)
