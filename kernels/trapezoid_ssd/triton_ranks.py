"""Several ranks in the Triton path of `trapezoid_ssd`: what the ranks of one position make of each other.

With r ranks `ssd` scans (position, rank) pairs, of which the first one of a position decays. There rank i reads the
inputs of the ranks j <= i of its own position with the weight gamma + beta of the next position, and those of later
ranks not at all; all of them have the weight gamma. The kernels below add the difference,

    y_i += sum_j c_ij v_j,    c_ij = (q_i.k_j) a_ij,    a_ij = -beta of the next position (j <= i), gamma (j > i),

to the outputs. Products of keys and queries do not depend on their turn. Tiles are [T positions, n or p], one rank
after another; nothing here is a matrix product of the tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ssd.triton_outputs import strides
from ..triton_utils import INTERPRETED, cdiv, next_power_of_2, quick
from .triton_kernels import _weights


@quick
@triton.jit(do_not_specialize=["length", "nheads"])
def _ranks_inputs_kernel(
    x_ptr, x_rank_ptr, out_ptr, length, nheads, x_stride_b, x_stride_t,
    P: tl.constexpr, RANKS: tl.constexpr, T: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The inputs of all ranks, v, of one head for T positions, (b, l, r, h, p)."""
    head = tl.program_id(0) % nheads
    blocks = tl.cdiv(length, T)
    begin = (tl.program_id(0) // nheads % blocks).to(tl.int64) * T
    row = (tl.program_id(0) // nheads // blocks).to(tl.int64)
    steps = tl.arange(0, T)
    columns = tl.arange(0, BLOCK_P)
    ok, columns_ok = steps < length - begin, columns < P
    tile_ok = ok[:, None] & columns_ok[None, :]
    x_tile = x_ptr + row * x_stride_b + begin * x_stride_t + head * P
    x = tl.load(x_tile + steps[:, None] * x_stride_t + columns[None, :], mask=tile_ok, other=0.0).to(ACC)
    out = out_ptr + ((row * length + begin) * RANKS * nheads + head) * P
    for j in tl.static_range(RANKS):
        ranked = tl.load(x_rank_ptr + (head * RANKS + j) * P + columns, mask=columns_ok, other=0.0).to(ACC)
        tile = (steps[:, None] * RANKS + j) * (nheads * P) + columns[None, :]
        tl.store(out + tile, x * ranked[None, :], mask=tile_ok)


@quick
@triton.jit(do_not_specialize=["length", "nheads", "repeats"])
def _ranks_products_kernel(
    B_ptr, C_ptr, B_bias_ptr, C_bias_ptr, products_ptr, length, nheads, repeats,
    B_stride_b, B_stride_t, C_stride_b, C_stride_t,
    N: tl.constexpr, RANKS: tl.constexpr, T: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """q_i.k_j of one head for T positions, (b, l, r, h, r); the last is j."""
    head = tl.program_id(0) % nheads
    blocks = tl.cdiv(length, T)
    begin = (tl.program_id(0) // nheads % blocks).to(tl.int64) * T
    row = (tl.program_id(0) // nheads // blocks).to(tl.int64)
    group = head // repeats
    steps = tl.arange(0, T)
    columns = tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, RANKS)
    ok, columns_ok = steps < length - begin, columns < N
    tile_ok = ok[:, None] & columns_ok[None, :]
    B_tile = B_ptr + row * B_stride_b + begin * RANKS * B_stride_t + group * N + columns[None, :]
    C_tile = C_ptr + row * C_stride_b + begin * RANKS * C_stride_t + group * N + columns[None, :]
    out = products_ptr + (row * length + begin) * (RANKS * RANKS) * nheads + head * RANKS
    for i in range(RANKS):
        q = tl.load(C_tile + (steps[:, None] * RANKS + i) * C_stride_t, mask=tile_ok, other=0.0).to(ACC)
        q += tl.load(C_bias_ptr + (head * RANKS + i) * N + columns, mask=columns_ok, other=0.0).to(ACC)[None, :]
        found = tl.zeros([T, RANKS], ACC)
        for j in tl.static_range(RANKS):
            k = tl.load(B_tile + (steps[:, None] * RANKS + j) * B_stride_t, mask=tile_ok, other=0.0).to(ACC)
            k += tl.load(B_bias_ptr + (head * RANKS + j) * N + columns, mask=columns_ok, other=0.0).to(ACC)[None, :]
            found += tl.where((ranks == j)[None, :], tl.sum(q * k, 1)[:, None], 0.0)
        tile = out + (steps[:, None] * RANKS + i) * (nheads * RANKS) + ranks[None, :]
        tl.store(tile, found, mask=ok[:, None])


@quick
@triton.jit(do_not_specialize=["length", "nheads"])
def _ranks_outputs_kernel(
    x_ptr, x_rank_ptr, products_ptr, gamma_ptr, beta_ptr, seq_ptr, y_ptr, out_ptr, length, nheads,
    x_stride_b, x_stride_t,
    P: tl.constexpr, RANKS: tl.constexpr, T: tl.constexpr, BLOCK_P: tl.constexpr, PACKED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Outputs of one head for T positions, (b, l, r, h, p), from those of `ssd`."""
    head = tl.program_id(0) % nheads
    blocks = tl.cdiv(length, T)
    begin = (tl.program_id(0) // nheads % blocks).to(tl.int64) * T
    row = (tl.program_id(0) // nheads // blocks).to(tl.int64)
    steps = tl.arange(0, T)
    columns = tl.arange(0, BLOCK_P)
    ok, columns_ok = steps < length - begin, columns < P
    tile_ok = ok[:, None] & columns_ok[None, :]
    vectors = row * length * nheads + head
    seq_row = seq_ptr
    if PACKED:
        seq_row = seq_ptr + row * length
    gamma, _, following = _weights(gamma_ptr, beta_ptr, seq_row, vectors, begin, length, nheads, PACKED, T, ACC, 1)
    x_tile = x_ptr + row * x_stride_b + begin * x_stride_t + head * P
    x = tl.load(x_tile + steps[:, None] * x_stride_t + columns[None, :], mask=tile_ok, other=0.0).to(ACC)
    first = (row * length + begin) * RANKS * nheads + head  # of the position's first rank
    for i in range(RANKS):
        at = (steps * RANKS + i) * nheads
        total = tl.zeros([T, BLOCK_P], ACC)
        for j in tl.static_range(RANKS):
            product = tl.load(products_ptr + first * RANKS + at * RANKS + j, mask=ok, other=0.0)
            factor = product * tl.where(j <= i, -following, gamma)
            ranked = tl.load(x_rank_ptr + (head * RANKS + j) * P + columns, mask=columns_ok, other=0.0).to(ACC)
            total += factor[:, None] * ranked[None, :]
        tile = first * P + at[:, None] * P + columns[None, :]
        y = tl.load(y_ptr + tile, mask=tile_ok, other=0.0).to(ACC) + total * x
        tl.store(out_ptr + tile, y, mask=tile_ok)


def _positions(width: int, numbers: int) -> int:
    """Positions of a tile so wide that it has about so many numbers."""
    return 64 if INTERPRETED else max(4, min(32, numbers // width))


def _accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def inputs_of_ranks(x: Tensor, x_rank: Tensor) -> Tensor:
    """v, (b, l * r, h, p) in the dtype of x, from x (b, l, h, p) and x_rank (h, r, p)."""
    (batch, length, nheads, headdim), ranks = x.shape, x_rank.shape[1]
    block_p = next_power_of_2(headdim)
    count = _positions(block_p, 2048)
    v = x.new_empty(batch, length * ranks, nheads, headdim)
    _ranks_inputs_kernel[(batch * cdiv(length, count) * nheads,)](
        x, x_rank, v, length, nheads, *strides(x),
        P=headdim, RANKS=ranks, T=count, BLOCK_P=block_p, ACC=_accumulator(x_rank.dtype),
    )  # fmt: skip
    return v


def products_of_ranks(B: Tensor, C: Tensor, B_bias: Tensor, C_bias: Tensor) -> Tensor:
    """q_i.k_j of the ranks of each position, (b, l * r, h, r): at rank i, for all j.

    Args:
        B: With dense rows, (b, l * r, g, n).
        C: With dense rows, (b, l * r, g, n).
        B_bias: (h, r, n).
        C_bias: (h, r, n).
    """
    (batch, rows, groups, n), (nheads, ranks, _) = B.shape, B_bias.shape
    length, block_n = rows // ranks, next_power_of_2(n)
    count = _positions(block_n, 2048)
    products = B_bias.new_empty(batch, rows, nheads, ranks)
    _ranks_products_kernel[(batch * cdiv(length, count) * nheads,)](
        B, C, B_bias, C_bias, products, length, nheads, nheads // groups, *strides(B, C),
        N=n, RANKS=ranks, T=count, BLOCK_N=block_n, ACC=_accumulator(products.dtype),
    )  # fmt: skip
    return products


def outputs_of_ranks(
    x: Tensor,
    x_rank: Tensor,
    products: Tensor,
    gamma: Tensor,
    beta: Tensor,
    seq_idx: Tensor | None,
    partial: Tensor,
    y: Tensor,
) -> None:
    """Write y from the outputs of `ssd`, `partial`; both are (b, l * r, h, p) and contiguous, and may be the same."""
    (batch, length, nheads, headdim), ranks = x.shape, x_rank.shape[1]
    block_p = next_power_of_2(headdim)
    count = _positions(block_p, 1024)
    _ranks_outputs_kernel[(batch * cdiv(length, count) * nheads,)](
        x, x_rank, products, gamma, beta, seq_idx, partial, y, length, nheads, *strides(x),
        P=headdim, RANKS=ranks, T=count, BLOCK_P=block_p, PACKED=seq_idx is not None, ACC=_accumulator(products.dtype),
    )  # fmt: skip
