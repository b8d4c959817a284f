"""All blocks of a stack of Hydra mixers, one after another, without gradients.

    n = LayerNorm(x);  p = n W_in^T;  c = silu(conv(p));  d = c_x W_D^T
    m the quasiseparable product of c, p and d;  g = rms(m) w silu(z);  x = x + g W_out^T

A block takes nine launches (a few more, if rows are longer than a piece) on buffers that all blocks share, and the host
looks at their arguments once for all blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..causal_conv1d.triton_impl import _causal_conv1d_fwd_kernel
from ..causal_conv1d.triton_impl import _tile as conv_tile
from ..gated_norm import triton_impl as gating
from ..gated_norm.triton_step import _layer_norm_kernel
from ..ssd.triton_kernels import DESCENDING
from ..ssd.triton_outputs import Sweep, run_sweeps
from ..ssd.triton_tiles import padded, tiles
from ..transforms import operator
from ..triton_utils import INTERPRETED, Repeated, cdiv, direct, multiprocessors, next_power_of_2, on_device
from .blocks import HydraWeights
from .triton_short import LONGEST, TILE, _mix_kernel, _vectors_kernel, mix_options


class _Buffers(NamedTuple):
    """What all blocks write to and read from: tensors, or their addresses."""

    total: Any  # (b, l, d), float32
    vectors: Any  # (4, b, pieces, h, LONGEST), float32
    steps: Any  # (4, b, l, h), float32
    n: Any  # (b l, d)
    o: Any  # (b l, d)
    p: Any  # (b l, width), first z
    p_mixed: Any
    p_dt_f: Any
    p_dt_b: Any
    c: Any  # (b l, mixed), first x
    B_f: Any
    C_f: Any
    B_b: Any
    C_b: Any
    d: Any  # (b l, h and a few more)
    m: Any  # (b l, d_inner)
    g: Any  # (b l, d_inner)


@operator("hydra_blocks_triton")
def hydra_blocks_triton(
    x: Tensor, weights: list[Tensor], headdim: int, d_state: int, eps: float, gate_eps: float, dtype: torch.dtype
) -> Tensor:
    """See `hydra_blocks`; the weights of all blocks in one list, of sizes that it has checked."""
    x, size = x.contiguous(), len(HydraWeights._fields)
    weights = [_aligned(one) for one in weights]
    blocks = [HydraWeights(*weights[k : k + size]) for k in range(0, len(weights), size)]
    products = narrow([part for block in blocks for part in (block.in_proj, block.from_x, block.out_proj)], dtype)
    (batch, length, channels), rows = x.shape, x.shape[0] * x.shape[1]
    (nheads, d_inner), (mixed, _, k) = blocks[0].from_x.shape, blocks[0].conv.shape
    maps = (mixed - d_inner) // 4
    repeats, pieces = nheads * d_state // maps, cdiv(length, LONGEST)
    tile = TILE._replace(heads=next(one for one in range(TILE.heads, 0, -1) if repeats % one == 0))
    parts = nheads // tile.heads
    width, width_D = products[0].shape[1], products[1].shape[1]

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device=x.device)

    p, c = empty(rows, width), empty(rows, mixed)
    B_f, C_f, B_b, C_b = c[:, d_inner:].split(maps, dim=1)
    tensors = _Buffers(
        total=empty(*x.shape, kind=torch.float32),
        vectors=empty(4, batch, pieces, nheads, LONGEST, kind=torch.float32),
        steps=empty(4, batch, length, nheads, kind=torch.float32) if pieces > 1 else None,
        n=empty(rows, channels),
        o=empty(rows, channels),
        p=p,
        p_mixed=p[:, d_inner:],
        p_dt_f=p[:, d_inner + mixed :],
        p_dt_b=p[:, d_inner + mixed + nheads :],
        c=c,
        B_f=B_f,
        C_f=C_f,
        B_b=B_b,
        C_b=C_b,
        d=empty(rows, width_D),
        m=empty(rows, d_inner),
        g=empty(rows, d_inner),
    )
    stride, c_stride = (length * width, width), (length * mixed, mixed)
    columns = next_power_of_2(channels)
    block_r = max(1, min(next_power_of_2(rows), (16384 if INTERPRETED else 2048) // columns))
    begin, join = (
        Repeated(
            _layer_norm_kernel, (cdiv(rows, block_r),), rows, channels, channels, channels, ADD=add, EPS=eps,
            BLOCK_R=block_r, BLOCK=columns, num_warps=4 if columns <= 2048 else 8,
        )
        for add in (False, True)
    )  # fmt: skip
    options, part = _conv_tile(batch, length, mixed, x.device)
    convolve = Repeated(
        _causal_conv1d_fwd_kernel, (batch * cdiv(length, part) * cdiv(mixed, options["BLOCK_C"]),), length, length,
        mixed, part, *stride, K=k, LEFT=(k - 1) // 2, HAS_BIAS=True, PACKED=False, SILU=True, ACC=tl.float32, **options,
    )  # fmt: skip
    prepare = Repeated(
        _vectors_kernel, (batch * pieces * cdiv(nheads, 4),), batch, length, nheads, *stride, LONGEST=LONGEST,
        BLOCK_H=4, STEPS=pieces > 1,
    )  # fmt: skip
    mix = Repeated(
        _mix_kernel, (batch * cdiv(length, tile.rows) * parts,), batch, length, nheads, repeats, *c_stride, *c_stride,
        width_D, **mix_options(dtype, headdim, d_state, tile), STATES=pieces > 1,
    )  # fmt: skip
    norm_tile = gating._tile(rows, d_inner)
    gate = Repeated(
        gating._gated_norm_fwd_kernel, (cdiv(rows, norm_tile["BLOCK_R"]), 1), rows, d_inner, d_inner, d_inner, width,
        EPS=gate_eps, NORM_FIRST=True, ACC=tl.float32, **norm_tile,
    )  # fmt: skip
    u = c[:, :d_inner]
    heads_of = u.unflatten(0, (batch, length)).unflatten(2, (nheads, headdim))
    maps_of = c[:, d_inner:].unflatten(0, (batch, length)).unflatten(2, (4, -1, d_state)).unbind(2)
    with on_device(x):
        address: Any = _address if direct() else _itself
        one = tensors
        begin(x, None, blocks[0].norm, blocks[0].norm_bias, None, one.n)
        for number, block in enumerate(blocks):
            if number == 1:
                join(x, one.o, block.norm, block.norm_bias, one.total, one.n)
                one = _Buffers(*map(address, tensors))
            own: Any = HydraWeights(*map(address, block)) if number else block
            if number > 1:
                join(one.total, one.o, own.norm, own.norm_bias, one.total, one.n)
            W_in, W_D, W_out = products[3 * number : 3 * number + 3]
            torch.mm(tensors.n, W_in, out=p)
            convolve(one.p_mixed, own.conv, own.conv_bias, None, one.c)
            torch.mm(u, W_D, out=tensors.d)
            prepare(one.p_dt_f, one.p_dt_b, own.dt_bias, own.A_log, one.vectors, one.steps)
            left = right = None
            if tensors.steps is not None:
                left, right = entering(heads_of, maps_of, tensors.steps)
                left, right = (left, right) if number == 0 else (address(left), address(right))
            mix(
                one.c, one.B_f, one.C_f, one.B_b, one.C_b, one.vectors, one.d, own.D, left, right, one.m,
            )  # fmt: skip
            gate(one.m, one.p, own.gate, one.g)
            torch.mm(tensors.g, W_out, out=tensors.o)
        torch.add(x if len(blocks) == 1 else tensors.total, tensors.o.view(x.shape), out=tensors.total)
    return tensors.total


@torch.library.register_fake("ssm::hydra_blocks_triton")
def _(
    x: Tensor, weights: list[Tensor], headdim: int, d_state: int, eps: float, gate_eps: float, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape)


def entering(x: Tensor, maps: tuple[Tensor, ...], steps: Tensor) -> tuple[Tensor, Tensor]:
    """States that enter each piece from the left and from the right, (b, h, pieces, p, n)."""
    B_f, _, B_b, _ = maps
    chosen = tiles("sweep", *padded(x, B_f.shape[3]), x.dtype)
    sweeps = Sweep(x, B_f, steps[0], steps[2], None, 0), Sweep(x, B_b, steps[1], steps[3], None, DESCENDING)
    borders, _ = run_sweeps(sweeps, None, chosen, LONGEST // chosen.chunk, 0)
    return borders[0], borders[1]


def _conv_tile(batch: int, length: int, channels: int, device: torch.device) -> tuple[dict[str, int], int]:
    """That of the convolution; short rows in even parts of about 98 positions, where these still fill the device."""
    options, part = conv_tile(channels, 2, length, False)
    even = cdiv(length, max(1, length // 98))
    programs = batch * cdiv(length, even) * cdiv(channels, options["BLOCK_C"])
    return options, even if part < even <= 2 * part and programs >= 8 * multiprocessors(device) else part


def narrow(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights (rows, columns) of linear maps, transposed and rounded by one launch for all.

    Columns of zeros are added up to a multiple of 8: products of other widths run at a fraction of the speed.
    """
    sizes = [(cdiv(one.shape[0], 8) * 8, one.shape[1]) for one in weights]
    buffer = torch.zeros(sum(rows * columns for rows, columns in sizes), dtype=dtype, device=weights[0].device)
    targets, found, place = [], [], 0
    for one, (rows, columns) in zip(weights, sizes, strict=True):
        targets.append(buffer.as_strided(one.shape, (columns, 1), place))
        found.append(buffer.as_strided((columns, rows), (1, columns), place))
        place += rows * columns
    torch._foreach_copy_(targets, weights)
    return found


def _aligned(weight: Tensor) -> Tensor:
    """A contiguous tensor at an address that is a multiple of 16, so that one compiled kernel serves all blocks."""
    weight = weight.contiguous()
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _itself(tensor: Tensor | None) -> Tensor | None:
    return tensor
