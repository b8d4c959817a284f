"""Compile-time choices of the kernels of `ssd`: tiles by size and dtype, and what a search for faster ones tries."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..triton_utils import INTERPRETED, next_power_of_2


class Tiles(NamedTuple):
    """Compile-time choices of one kernel."""

    chunk: int
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most


def narrow(headdim: int, state: int) -> bool:
    """Whether a kernel must do without wgmma: wherever padded p or n is below 64. It then has one or two warps.

    On tiles of fewer columns ptxas 12.8 mistakes registers when it addresses the operands of wgmma, which then reads
    other numbers or beyond its memory, and Triton 3.6 reads beyond what it reserved. Triton emits wgmma for four warps
    and more only.
    """
    return min(headdim, state) < 64


@functools.cache
def tiles(kernel: str, headdim: int, state: int, dtype: torch.dtype) -> Tiles:
    """Chunk, warps, stages of a kernel: "fwd", "fwd in halves", "two-sided", "sweep", "links", "short links" or "maps".

    For padded p and n; "short links" are those of shorter chunks than the table has, and those of `trapezoid_ssd` are
    "turned".

    Registers and shared memory are what limits them; float32 operands take twice the space, in two parts.
    """
    if INTERPRETED:
        return Tiles(128, 4, 1)
    if dtype == torch.float64:
        return Tiles(16, 4, 1)
    exact = dtype == torch.float32
    if narrow(headdim, state):
        return Tiles(16 if exact and state > 128 else 32, 2, 1 if exact else 2)
    if headdim * state > 64 * 128:
        return Tiles(16 if exact else 32, 8, 1)
    wide = headdim * state > 64 * 64
    if exact:
        of_kernel = {"sweep": Tiles(64, 4, 1), "maps": Tiles(64, 4, 1), "fwd": Tiles(64, 8, 1)}
        if wide:
            of_kernel |= {"fwd": Tiles(16, 4, 2), "fwd in halves": Tiles(32, 4, 2), "links": Tiles(64, 4, 1)}
            if kernel == "maps":
                return Tiles(64, 4, 2)
        return of_kernel.get(kernel.removeprefix("turned "), Tiles(64, 8, 1))
    if kernel == "sweep" and not wide:
        return Tiles(64, 4, 2, 128)  # four programs a multiprocessor
    # Operands of the next turns are loaded ahead as far as two programs have room for them in shared memory.
    if wide:
        return Tiles(64, 4, 1 if kernel == "two-sided" or (kernel.endswith("links") and kernel != "links") else 2)
    return Tiles(64, 4, 3 if kernel in ("fwd", "two-sided", "links", "maps") else 2)


def _choices(headdim: int, state: int) -> tuple[int, int]:
    """Numbers of warps that a search tries."""
    return (2, 1) if narrow(headdim, state) else (4, 8)


@functools.cache
def alternatives(kernel: str, headdim: int, state: int, dtype: torch.dtype) -> tuple[Tiles, ...]:
    """What a search for tiles tries, see `autotune`: first the tiles of the table."""
    first = tiles(kernel, headdim, state, dtype)
    if INTERPRETED or dtype == torch.float64:
        return (first,)
    warps = _choices(headdim, state)
    others = [Tiles(chunk, count, stages) for chunk in (32, 64) for count in warps for stages in (1, 2, 3)]
    return first, *(one for one in others if one != first)


class GradientTiles(NamedTuple):
    """Tiles of the kernels of a gradient, one border per chunk of theirs."""

    links: Tiles
    maps: Tiles
    sweep: Tiles
    subs: int  # chunks of the sweep per border


def gradient_tiles(x: Tensor, n: int, chunk: int = 0, of: str = "") -> GradientTiles:
    """Those of the tables, or with another chunk; `of` stands before the names of the kernels."""
    return _gradient_tiles(*padded(x, n), x.dtype, chunk, of)


@functools.cache
def _gradient_tiles(headdim: int, state: int, dtype: torch.dtype, chunk: int, of: str) -> GradientTiles:
    names = f"{of}short links" if chunk else f"{of}links", f"{of}maps", "sweep"
    links, maps, sweep = (tiles(kernel, headdim, state, dtype) for kernel in names)
    if not (of or chunk or INTERPRETED) and dtype == torch.float32 and (headdim, state) == (64, 128):
        sweep = Tiles(32, 4, 2)  # shared memory has room for short chunks, with the next ones loaded ahead
    chunk = chunk or links.chunk
    of_sweep = min(sweep.chunk, chunk)
    return GradientTiles(
        links._replace(chunk=chunk), maps._replace(chunk=chunk), sweep._replace(chunk=of_sweep), chunk // of_sweep
    )


def gradient_alternatives(first: GradientTiles, x: Tensor, n: int) -> tuple[GradientTiles, ...]:
    """What a search tries: first the tiles of the tables."""
    return _gradient_alternatives(first, *padded(x, n), x.dtype)


@functools.cache
def _gradient_alternatives(
    first: GradientTiles, headdim: int, state: int, dtype: torch.dtype
) -> tuple[GradientTiles, ...]:
    if INTERPRETED or dtype == torch.float64:
        return (first,)
    some = _choices(headdim, state)
    others = [
        GradientTiles(Tiles(chunk, warps, stages), Tiles(chunk, some[0], of_maps), Tiles(chunk, of_sweep, 2), 1)
        for chunk in (32, 64)
        for warps in some
        for stages in (1, 2)
        for of_maps in (1, 2)
        for of_sweep in some
    ]
    return first, *(one for one in others if one != first)


def map_columns(x: Tensor, n: int) -> int:
    """Columns of dC that are made at a time: all, but for float32, which takes twice the registers."""
    columns = padded(x, n)[1]
    return 64 if x.dtype == torch.float32 and n % 64 == 0 and not INTERPRETED else columns


def in_halves(x: Tensor, n: int) -> bool:
    """Whether the outputs' kernel holds the state in halves: large ones in float32, where it is the faster one."""
    return x.dtype == torch.float32 and (x.shape[3], n) == (64, 128) and precision(x.dtype) != "tf32"


def fine_products(x: Tensor, n: int) -> bool:
    """Whether float32 products can keep their last digits, for gradients that are small differences of others.

    Wide states have no room for it in shared memory.
    """
    headdim, state = padded(x, n)
    return x.dtype == torch.float32 and headdim * state <= 64 * 128


def fine_chunk(x: Tensor, n: int) -> int:
    """A short chunk where operands of products take three parts, else 0 for the tables'."""
    return 32 if fine_products(x, n) and not INTERPRETED else 0


def padded(x: Tensor, n: int) -> tuple[int, int]:
    return max(16, next_power_of_2(x.shape[3])), max(16, next_power_of_2(n))


def options(
    x: Tensor, n: int, log_decay: Tensor, seq_idx: Tensor | None, chosen: Tiles, fine: bool = False
) -> dict[str, Any]:
    """Compile-time arguments that all kernels share."""
    return _options(x.shape[3], n, x.dtype, log_decay.dtype, seq_idx is not None, chosen, precision(x.dtype, fine))


@functools.cache
def _options(
    headdim: int, n: int, dtype: torch.dtype, sums: torch.dtype, packed: bool, chosen: Tiles, multiply: str
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "P": headdim,
        "N": n,
        "Q": chosen.chunk,
        "BLOCK_P": max(16, next_power_of_2(headdim)),
        "BLOCK_N": max(16, next_power_of_2(n)),
        "PACKED": packed,
        "EXACT": dtype == torch.float32,
        "DOT": tl.float32 if INTERPRETED and dtype.itemsize < 4 else getattr(tl, str(dtype).removeprefix("torch.")),
        "ACC": tl.float64 if sums == torch.float64 else tl.float32,
        "PRECISION": multiply,
        "STAGES": chosen.stages,
    }
    if not INTERPRETED:
        found["num_warps"] = chosen.warps
        if chosen.registers is not None:
            found["maxnreg"] = chosen.registers
    return found


def precision(dtype: torch.dtype, fine: bool = False) -> str:
    """How kernels multiply: float32 as sums of two or three bfloat16 numbers, unless the user allows TensorFloat-32."""
    if INTERPRETED or dtype != torch.float32:
        return "ieee"
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "bf16x6" if fine else "bf16x3"
