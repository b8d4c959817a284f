"""`trapezoid_ssd` in Triton: launchers, custom ops and the autograd function around the kernels of `triton_kernels.py`.

As in `ssd`: forward is one kernel with the state in registers, after a sweep over parts of a row where rows and heads
alone give too few programs. Backward is one launch of two sweeps, states from the left and their gradients from the
right, each written between all chunks, and one kernel for all gradients of a chunk. Only the inputs are kept for it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ssd.triton_impl import choose_parts, contiguous, dense_rows, strides
from ..ssd.triton_kernels import _ssd_carry_kernel
from ..transforms import FirstDerivative, apply, operator
from ..triton_utils import INTERPRETED, multiprocessors, on_device
from .state import rotate, spin
from .triton_kernels import (
    _trapezoid_angle_kernel,
    _trapezoid_bwd_kernel,
    _trapezoid_fwd_kernel,
    _trapezoid_sweep_kernel,
)


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
    seq_idx: Tensor | None,
    half: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, last state and last angles, for one rank and without x_rank.

    `state` has the first position's share of the last input, and like the last state it is turned by its angles `phi`;
    both are None at the start.
    """
    dtype, sums, pairs = x.dtype, log_decay.dtype, theta.shape[2]
    narrow = sums if sums == torch.float64 else torch.promote_types(torch.promote_types(dtype, B.dtype), C.dtype)
    x, B, C = x.to(narrow), B[:, :, 0].to(narrow), C[:, :, 0].to(narrow)
    rate = theta.tanh()  # angles are counted in half turns, so that whole turns are taken off exactly
    if not pairs:  # one that stands still
        rate = rate.new_zeros(*rate.shape[:2], 1)
        phi = None if phi is None else phi.new_zeros(*phi.shape[:2], 1)
    y, final, through = apply(
        _Trapezoid, x, log_decay, gamma, beta, rate, B, C, state, phi, B_bias[:, 0], C_bias[:, 0], D, seq_idx, half
    )
    if seq_idx is not None:
        # Angles ran through all sequences of a row; those of the last one begin where it begins.
        angles = _of_last_sequence(rate, gamma + beta, phi, seq_idx)
        back = angles - through
        final, through = rotate(final, back.cos()[:, :, None], back.sin()[:, :, None], half), angles
    return y[:, :, None].to(dtype), final, through[:, :, :pairs]


def _of_last_sequence(rate: Tensor, dt: Tensor, phi: Tensor | None, seq_idx: Tensor) -> Tensor:
    """Angles after the last position modulo 2 pi, (b, h, s); float64, since sums over a row lose float32 digits."""
    dt = dt * (seq_idx == seq_idx[:, -1:])[..., None]
    total = math.pi * (dt.double().mT @ rate.double())
    if phi is not None:
        total = total + phi * (seq_idx[:, 0] == seq_idx[:, -1])[:, None, None]
    return total.remainder(2 * math.pi).to(rate.dtype)


class Tiles(NamedTuple):
    """Compile-time choices of one kernel."""

    chunk: int
    warps: int
    stages: int


def tiles(kernel: str, headdim: int, state: int, dtype: torch.dtype) -> Tiles:
    """Chunk, warps and pipeline stages of a kernel ("fwd", "sweep", "bwd") for padded p and n."""
    if INTERPRETED:
        return Tiles(64, 4, 1)
    if dtype == torch.float64:
        return Tiles(16, 4, 1)
    if dtype == torch.float32 or headdim * state > 64 * 128:
        return Tiles(32, 8, 1)
    return {"fwd": Tiles(64, 4, 1), "sweep": Tiles(64, 4, 1), "bwd": Tiles(64, 8, 1)}[kernel]


def _options(x: Tensor, rate: Tensor, n: int, seq_idx: Tensor | None, half: bool, chosen: Tiles) -> dict[str, Any]:
    """Compile-time arguments that the kernels share."""
    headdim, pairs = x.shape[3], rate.shape[2]
    dot = tl.float32 if INTERPRETED and x.element_size() < 4 else getattr(tl, str(x.dtype).removeprefix("torch."))
    found: dict[str, Any] = {
        "P": headdim,
        "N": n,
        "S": pairs,
        "Q": chosen.chunk,
        "BLOCK_P": max(16, triton.next_power_of_2(headdim)),
        "BLOCK_N": max(32, triton.next_power_of_2(n)),
        "HALF": half,
        "PACKED": seq_idx is not None,
        "EXACT": x.dtype == torch.float32,
        "DOT": dot,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        "STAGES": chosen.stages,
    }
    return found if INTERPRETED else found | {"num_warps": chosen.warps}


class _Inputs(NamedTuple):
    """The inputs as the kernels read them."""

    x: Tensor
    log_decay: Tensor
    gamma: Tensor
    beta: Tensor
    rate: Tensor
    B: Tensor
    C: Tensor
    state: Tensor | None
    phi: Tensor | None
    B_bias: Tensor
    C_bias: Tensor
    D: Tensor
    seq_idx: Tensor | None


def _readable(*tensors: Tensor | None) -> _Inputs:
    """Dense in the dimensions that the kernels take for granted: heads and width of x, B and C, all of the others."""
    given = _Inputs(*tensors)  # type: ignore[arg-type]
    dense: dict[str, Any] = {
        name: contiguous(tensor) for name, tensor in given._asdict().items() if name not in ("x", "B", "C")
    }
    return given._replace(x=dense_rows(given.x), B=dense_rows(given.B), C=dense_rows(given.C), **dense)


class _Angles(NamedTuple):
    """In half turns, from 0 to 2."""

    within: Tensor  # from the start of each chunk, (b, l, h, s)
    before: Tensor  # up to each chunk, and after the last one, (b, h, s, chunks + 1)


def _angles(given: _Inputs, chunk: int) -> _Angles:
    (batch, length, nheads, _), pairs = given.x.shape, given.rate.shape[2]
    chunks = triton.cdiv(length, chunk)
    totals = given.log_decay.new_empty(batch, nheads, pairs, chunks + 1)
    within = given.log_decay.new_empty(batch, length, nheads, pairs)
    dtype = tl.float64 if totals.dtype == torch.float64 else tl.float32
    _trapezoid_angle_kernel[(batch * chunks * nheads,)](
        given.gamma, given.beta, given.rate, given.phi, within, totals, length, nheads, HAS_PHI=given.phi is not None,
        S=pairs, Q=chunk, BLOCK_S=triton.next_power_of_2(pairs), ACC=dtype,
    )  # fmt: skip
    # Whole turns are taken off each term; float64 keeps the digits of the sum over chunks.
    return _Angles(within, totals.cumsum(3, dtype=torch.float64).remainder(2.0).to(totals.dtype))


def _sweep(
    given: _Inputs,
    angles: _Angles,
    entering: Tensor | None,
    dy: Tensor | None,
    dfinal: Tensor | None,
    parts: int,
    part_chunks: int,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    store: bool,
    shared: dict[str, Any],
) -> None:
    (batch, length, nheads, _), groups = given.x.shape, given.B.shape[2]
    right = given.x if dy is None else dy
    _trapezoid_sweep_kernel[((1 if dy is None else 2) * batch * parts * nheads,)](
        given.x, given.B, given.B_bias, entering, right, given.C, given.C_bias, dfinal, given.log_decay, given.gamma,
        given.beta, *angles, given.seq_idx, *outputs, batch, length, nheads, nheads // groups, parts, part_chunks,
        *strides(given.x, given.B, right, given.C), BACKWARD=dy is not None, HAS_STATE=entering is not None,
        HAS_DFINAL=dfinal is not None, STORE=store, **shared,
    )  # fmt: skip


def _entering(
    given: _Inputs,
    angles: _Angles,
    dy: Tensor | None,
    dfinal: Tensor | None,
    parts: int,
    part_chunks: int,
    shared: dict[str, Any],
) -> tuple[Tensor | None, Tensor | None]:
    """States that enter the parts from the left, and with dy their gradients from the right, (b, h, parts, p, n)."""
    if parts == 1:
        return given.state, dfinal
    sides = 1 if dy is None else 2
    (batch, _, nheads, headdim), n = given.x.shape, given.B.shape[3]
    ends = given.log_decay.new_empty(sides, batch, nheads, parts, headdim, n)
    factors = given.log_decay.new_empty(sides, batch, nheads, parts)
    _sweep(given, angles, None, dy, None, parts, part_chunks, (ends, ends, factors, ends), False, shared)
    block = 1024 if INTERPRETED else 256
    _ssd_carry_kernel[(sides * batch * nheads * triton.cdiv(headdim * n, block),)](
        given.state, dfinal, ends, factors, batch * nheads, parts, headdim * n, DESCENDS=False,
        HAS_STATE=given.state is not None, DESCENDS_2=True, HAS_STATE_2=dfinal is not None, BLOCK=block,
    )  # fmt: skip
    return ends[0], None if dy is None else ends[1]


@operator("trapezoid_ssd_triton_fwd")
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
    seq_idx: Tensor | None,
    half: bool,
    chunk: int,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, last state, last angles modulo 2 pi; `chunk` and `parts` (of a row) are 0 to be chosen."""
    given = _readable(x, log_decay, gamma, beta, rate, B, C, state, phi, B_bias, C_bias, D, seq_idx)
    (batch, length, nheads, headdim), (groups, n) = x.shape, B.shape[2:]
    chosen, of_sweep = (tiles(kernel, headdim, n, x.dtype) for kernel in ("fwd", "sweep"))
    chosen = chosen._replace(chunk=chunk or chosen.chunk)
    y, final = x.new_empty(x.shape), log_decay.new_empty(batch, nheads, headdim, n)
    parts, part_length = choose_parts(batch * nheads, length, chosen.chunk, x.device, parts)
    with on_device(x):
        angles = _angles(given, chosen.chunk)
        shared = _options(x, rate, n, seq_idx, half, of_sweep._replace(chunk=chosen.chunk))
        entering, _ = _entering(given, angles, None, None, parts, part_length // chosen.chunk, shared)
        _trapezoid_fwd_kernel[(batch * parts * nheads,)](
            given.x, given.log_decay, given.gamma, given.beta, *angles, given.B, given.C, given.B_bias,
            given.C_bias, given.D, given.seq_idx, entering, y, final, length, nheads, nheads // groups, parts,
            part_length, *strides(given.x, given.B, given.C), HAS_STATE=entering is not None,
            **_options(x, rate, n, seq_idx, half, chosen),
        )  # fmt: skip
    return y, final, angles.before[..., -1] * math.pi


@torch.library.register_fake("ssm::trapezoid_ssd_triton_fwd")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, log_decay, rate, B = arguments[0], arguments[1], arguments[4], arguments[5]
    batch, _, nheads, headdim = x.shape
    final = log_decay.new_empty(batch, nheads, headdim, B.shape[3])
    return x.new_empty(x.shape), final, log_decay.new_empty(batch, nheads, rate.shape[2])


@operator("trapezoid_ssd_triton_bwd")
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
    seq_idx: Tensor | None,
    half: bool,
    dy: Tensor,
    dfinal: Tensor | None,
    dphase: Tensor | None,
    chunk: int,
    parts: int,
    blocks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x to D.

    `dphase` is the gradient of the last angles with what they do to the last state; `blocks` (of a group's heads) is 0
    to be chosen.
    """
    given = _readable(x, log_decay, gamma, beta, rate, B, C, state, phi, B_bias, C_bias, D, seq_idx)
    dy, dfinal, dphase = dy.contiguous(), contiguous(dfinal), contiguous(dphase)
    (batch, length, nheads, headdim), (groups, n), pairs = x.shape, B.shape[2:], rate.shape[2]
    chosen, of_sweep = (tiles(kernel, headdim, n, x.dtype) for kernel in ("bwd", "sweep"))
    if chunk:
        chosen = chosen._replace(chunk=chunk)
    of_sweep = of_sweep._replace(chunk=chosen.chunk)
    chunks = triton.cdiv(length, chosen.chunk)
    parts, part_length = choose_parts(2 * batch * nheads, length, chosen.chunk, x.device, parts)
    borders = x.new_empty(2, batch, nheads, chunks + 1, headdim, n)
    dstate = log_decay.new_empty(batch, nheads, headdim, n)
    repeats, programs = nheads // groups, batch * chunks * groups
    if blocks == 0:
        blocks = max(1, min(repeats, 2 * multiprocessors(x.device) // programs))
    block_heads = triton.cdiv(repeats, blocks)
    blocks = triton.cdiv(repeats, block_heads)
    dx = x.new_empty(x.shape)
    dlog_decay, dgamma, ddt, dweight = (torch.empty_like(given.log_decay) for _ in range(4))
    drate = log_decay.new_empty(blocks * groups, *rate.shape)
    dB, dC = (log_decay.new_empty(blocks, *B.shape, dtype=x.dtype if blocks == 1 else None) for _ in range(2))
    dB_bias, dC_bias = (log_decay.new_empty(batch * chunks, nheads, n) for _ in range(2))
    dD, dphi = log_decay.new_empty(batch * chunks, nheads), log_decay.new_empty(batch, nheads, pairs)
    with on_device(x):
        angles = _angles(given, chosen.chunk)
        shared = _options(x, rate, n, seq_idx, half, of_sweep)
        part_chunks = part_length // chosen.chunk
        left, right = _entering(given, angles, dy, dfinal, parts, part_chunks, shared)
        outputs = borders, dstate, dstate, dstate
        _sweep(given, angles, left, dy, right, parts, part_chunks, outputs, True, shared)
        _trapezoid_bwd_kernel[(programs * blocks,)](
            given.x, given.log_decay, given.gamma, given.beta, given.rate, *angles, given.B, given.C, given.B_bias,
            given.C_bias, given.D, given.seq_idx, borders, dphase, dy, dx, dlog_decay, dgamma, ddt, dweight, drate,
            dB, dC, dB_bias, dC_bias, dD, dphi, batch, length, nheads, repeats, blocks, block_heads,
            *strides(given.x, given.B, given.C), HAS_DPHASE=dphase is not None, LINKS=_links(x.dtype),
            **_options(x, rate, n, seq_idx, half, chosen),
        )  # fmt: skip
    # An input weighs what it had when it came and, one position later, what beta adds to it.
    later = dweight[:, :-1]
    if seq_idx is not None:
        later = later * (seq_idx[:, 1:] == seq_idx[:, :-1])[..., None]
    ddt[:, 1:] += later
    dB, dC = (part[0] if blocks == 1 else part.sum(0).to(x.dtype) for part in (dB, dC))
    drate = drate[0] if blocks * groups == 1 else drate.sum(0)
    return dx, dlog_decay, dgamma, ddt, drate, dB, dC, dstate, dphi, dB_bias.sum(0), dC_bias.sum(0), dD.sum(0)


def _links(dtype: torch.dtype) -> Any:
    if dtype == torch.float64:
        return tl.float64
    return tl.bfloat16 if dtype.itemsize < 4 and not INTERPRETED else tl.float32


@torch.library.register_fake("ssm::trapezoid_ssd_triton_bwd")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    x, log_decay, gamma, beta, rate, B, C, _, _, B_bias, C_bias, D = arguments[:12]
    dstate = log_decay.new_empty(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    dphi = log_decay.new_empty(x.shape[0], x.shape[2], rate.shape[2])
    like = (tensor.new_empty(tensor.shape) for tensor in (x, log_decay, gamma, beta, rate, B, C))
    return *like, dstate, dphi, *(tensor.new_empty(tensor.shape) for tensor in (B_bias, C_bias, D))


class _Trapezoid(torch.autograd.Function):
    """The forward op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(*arguments, 0, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.half = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, dphi: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, final = ctx.saved_tensors
        dy = torch.zeros_like(tensors[0]) if dy is None else dy
        if dfinal is not None:
            # The last state is turned by the last angles.
            turned = spin(dfinal, final, tensors[4].shape[2], ctx.half).sum(2)
            dphi = turned if dphi is None else dphi + turned
        found = list(apply(_TrapezoidGradient, *tensors, ctx.half, dy, dfinal, dphi))
        for place in (7, 8):
            found[place] = None if tensors[place] is None else found[place]
        return *found, None, None


class _TrapezoidGradient(FirstDerivative):
    name = "trapezoid_ssd"

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _backward(*arguments, 0, 0, 0)


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
