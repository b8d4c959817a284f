"""The selective scan in Triton: time-serial, channel-parallel. The states live in registers and nothing is scanned.

    forward    h_t = a_t h_{t-1} + dt_t u_t B_t,    a_t = exp(dt_t A),    y_t = sum_n C_tn h_tn
    backward   G_t = C_t dy_t + a_{t+1} G_{t+1},    X_t = a_t G_t h_{t-1}
               dC = sum_d dy h,  dB = sum_d dt u G,  du = dt sum_n B G,  dA = sum_t dt X,  ddt = u sum_n B G + sum_n A X

A lane holds K neighbouring states of one channel, SUB lanes hold all n of them, and a program BLOCK_D channels: vectors
have BLOCK_D * SUB entries, channel after channel. The rows of TIME positions are fetched together, one stretch ahead of
their use, then used one after the other. For 16-bit inputs the decay is one exp2; for float32 it is held as a - 1, by a
polynomial where it is small, so that slow decays lose nothing over thousands of steps.

Every 64th state is kept for the backward pass, which walks these chunks from the last to the first: a sweep through the
chunk leaves the state before each stretch in a scratch buffer, then each stretch forms its states again, in registers,
and goes back over them. Where rows and channels give too few programs, the sequence is cut into parts: a first kernel
finds (decay, end state) of each part, the second folds those before its own, in order. Sums over programs go through
buffers that are added in a fixed order: no atomics.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..replay import replayed
from ..transforms import FirstDerivative, apply, call, one_by_one, operator
from ..triton_utils import INTERPRETED, cdiv, last_contiguous, multiprocessors, next_power_of_2, on_device
from .chunked import _segments
from .triton_backward import (
    _selective_scan_bwd_kernel,
    _selective_scan_bwd_part_kernel,
    _selective_scan_sums_kernel,
)
from .triton_kernels import (
    _selective_scan_fwd_kernel,
    _selective_scan_part_kernel,
)

_SAVED = 64  # every 64th state is saved


def selective_scan_triton(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """See `selective_scan_reference`; real tensors only, B and C (b, l, n) or (b, l, g, n)."""
    save = torch.is_grad_enabled()
    if window is None or window <= 1:
        y, final, _ = apply(_Scan, u, dt, A, B, C, D, z, initial_state, seq_idx, save, False)
        return y, final
    B, C = _grouped(B), _grouped(C)
    y, final, _ = apply(_Scan, u, dt, A, B, C, D, None, initial_state, seq_idx, save, True)
    segments = _segments(u, seq_idx, window).flip(1)
    turned = (x.flip(1) for x in (u, dt, B, C))
    later = apply(_Scan, *_with(A, *turned), None, None, None, segments, save, True)[0].flip(1)
    once = (B.to(A.dtype) * C.to(A.dtype)).sum(-1)  # (b, l, g): both scans have the position itself
    own = (dt.to(y.dtype) * u.to(y.dtype)).unflatten(2, (B.shape[2], -1)) * once[..., None]
    y = y + (later - own.flatten(2))
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(y.dtype))
    return y.to(u.dtype), final


def _with(A: Tensor, u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
    return u, dt, A, B, C


@operator("selective_scan_triton_fwd")
@replayed
def _forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    save: bool,
    wide: bool,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, in the dtype of the states if `wide`; the final state; with `save` every 64th state.

    `parts` is the number of parts to cut the sequence into, 0 to choose.
    """
    u, dt, A, B, C = (x.contiguous() for x in (u, dt, A, B, C))
    D, initial_state, seq_idx = (None if x is None else x.contiguous() for x in (D, initial_state, seq_idx))
    z = u if z is None else last_contiguous(z)
    y, final, saved = _empty_outputs(u, A, save, wide)
    options = _options(u, A, B, seq_idx, backward=False)
    grid, part_length = _grid(u, B, options, parts, 8)
    length = u.shape[1]
    with on_device(u):
        products, ends = A, A  # not read with a single part
        if grid[1] > 1:
            products, ends = (A.new_empty(u.shape[0], grid[1], *A.shape) for _ in range(2))
            _selective_scan_part_kernel[grid](
                u, dt, A, B, _or(seq_idx, u), products, ends, length, part_length, **options
            )
        _selective_scan_fwd_kernel[grid](
            u, dt, A, B, C, _or(D, u), z, _or(initial_state, A), _or(seq_idx, u), products, ends, y, final, saved,
            length, part_length, z.stride(0), z.stride(1),
            HAS_D=D is not None, HAS_Z=z is not u, HAS_INITIAL=initial_state is not None, SAVE=save,
            SAVED=_SAVED, **options,
        )  # fmt: skip
    return y, final, saved


def _empty_outputs(u: Tensor, A: Tensor, save: bool, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = u.shape
    # One more than is used: torch.export would build a size of 1 in.
    chunks = (length + _SAVED - 1) // _SAVED + 1 if save else 0
    return (
        u.new_empty(u.shape, dtype=A.dtype if wide else u.dtype),
        A.new_empty(batch, *A.shape),
        A.new_empty(batch * chunks, channels, A.shape[1]),
    )


@torch.library.register_fake("ssm::selective_scan_triton_fwd")
def _(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    save: bool,
    wide: bool,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(u, A, save, wide)


@operator("selective_scan_triton_bwd")
@replayed
def _backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    seq_idx: Tensor | None,
    saved: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C, D, z (empty without z) and the initial state."""
    u, dt, A, B, C, dy = (x.contiguous() for x in (u, dt, A, B, C, dy))
    D, dfinal, seq_idx = (None if x is None else x.contiguous() for x in (D, dfinal, seq_idx))
    z = u if z is None else last_contiguous(z)
    (batch, length, channels), n, groups = u.shape, A.shape[1], B.shape[2]
    options = _options(u, A, B, seq_idx, backward=True)
    grid, part_length = _grid(u, B, options, parts, 9)
    lanes, blocks = options["BLOCK_D"] * options["SUB"], grid[0] // (batch * groups)
    du, ddt = torch.empty_like(u), torch.empty_like(dt)
    dz = z.new_empty(z.shape if z is not u else (0,))
    dinitial = A.new_empty(batch, *A.shape)
    dparameters = A.new_empty(batch * grid[1], channels, n + 1)
    dmaps = A.new_empty(blocks, 2, *B.shape)
    scratch = A.new_empty(grid[0] * grid[1], _SAVED // options["TIME"] * options["K"] * lanes)
    with on_device(u):
        products, ends = A, A  # not read with a single part
        has_z = z is not u
        if grid[1] > 1:
            products, ends = (A.new_empty(batch, grid[1], *A.shape) for _ in range(2))
            _selective_scan_bwd_part_kernel[grid](
                dt, A, C, z, _or(seq_idx, u), dy, products, ends, length, part_length, z.stride(0), z.stride(1),
                HAS_Z=has_z, **options,
            )  # fmt: skip
        _selective_scan_bwd_kernel[grid](
            u, dt, A, B, C, _or(D, u), z, _or(seq_idx, u), saved, dy, _or(dfinal, A), products, ends, scratch,
            du, ddt, dz, dparameters, dmaps, dinitial, length, part_length, z.stride(0), z.stride(1),
            HAS_D=D is not None, HAS_Z=has_z, HAS_FINAL=dfinal is not None, SAVED=_SAVED,
            **options, **_backward_options(options),
        )  # fmt: skip
        dA, dB, dC, dD = (x.new_empty(x.shape) for x in (A, B, C, A[:, 0]))
        sizes, block = (B.numel(), channels * (n + 1)), 4096 if INTERPRETED else 512
        _selective_scan_sums_kernel[(2 * cdiv(sizes[0], block) + cdiv(sizes[1], block),)](
            dmaps, dparameters, dB, dC, dA, dD, sizes[0], blocks, sizes[1], batch * grid[1], N=n, BLOCK=block
        )
    return du, ddt, dA, dB, dC, dD, dz, dinitial


@torch.library.register_fake("ssm::selective_scan_triton_bwd")
def _(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    seq_idx: Tensor | None,
    saved: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    du, ddt, dA, dB, dC = (x.new_empty(x.shape) for x in (u, dt, A, B, C))
    dz = u.new_empty(0) if z is None else z.new_empty(z.shape)
    return du, ddt, dA, dB, dC, A.new_empty(A.shape[0]), dz, A.new_empty(u.shape[0], *A.shape)


class _Scan(torch.autograd.Function):
    """The forward op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        initial_state: Tensor | None,
        seq_idx: Tensor | None,
        save: bool,
        wide: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, C = _grouped(B), _grouped(C)
        found: tuple[Tensor, Tensor, Tensor] = call(
            _forward, u, dt, A, B, C, D, z, initial_state, seq_idx, save, wide, 0
        )
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *scanned, initial_state, seq_idx, _, _ = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.has_initial = initial_state is not None
        ctx.save_for_backward(*scanned, seq_idx, output[2])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        *scanned, seq_idx, saved = ctx.saved_tensors
        u, dt, A, B, C, D, z = scanned
        if dy is None:
            dy = u.new_zeros(u.shape)
        gradients = list(apply(_Gradient, u, dt, A, _grouped(B), _grouped(C), D, z, seq_idx, saved, dy, dfinal))
        if B.dim() == 3:
            gradients[3:5] = gradients[3].view(B.shape), gradients[4].view(C.shape)
        for place, absent in ((5, D is None), (6, z is None), (7, not ctx.has_initial)):
            if absent:
                gradients[place] = None
        if D is not None:
            gradients[5] = gradients[5].to(D.dtype)
        return *gradients, None, None, None


class _Gradient(FirstDerivative):
    name = "selective_scan"

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return call(_backward, *arguments, 0)


# Each mapped instance has its own A and its own gradient of it, hence its own launches.
@torch.library.register_vmap("ssm::selective_scan_triton_fwd")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return one_by_one(_forward, info.batch_size, in_dims, arguments)


@torch.library.register_vmap("ssm::selective_scan_triton_bwd")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return one_by_one(_backward, info.batch_size, in_dims, arguments)


def _grouped(B: Tensor) -> Tensor:
    """B or C as (b, l, g, n)."""
    return B[:, :, None] if B.dim() == 3 else B


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A tensor to pass in the place of an absent one, which is not read."""
    return other if tensor is None else tensor


def _options(u: Tensor, A: Tensor, B: Tensor, seq_idx: Tensor | None, backward: bool) -> dict[str, Any]:
    """Compile-time sizes: four states a lane; four warps, or two where their programs fill the device forwards."""
    return _cached_options(
        *u.shape[::2], *B.shape[2:], u.element_size(), A.dtype, u.device, seq_idx is not None, backward
    )


@functools.cache
def _cached_options(
    batch: int,
    channels: int,
    groups: int,
    n: int,
    element_size: int,
    dtype: torch.dtype,
    device: torch.device,
    packed: bool,
    backward: bool,
) -> dict[str, Any]:
    padded = next_power_of_2(n)
    k = 1 if INTERPRETED and padded < 16 else min(4, padded)  # the interpreter pays per operation
    sub = padded // k
    width = channels // groups
    lanes = 512 if INTERPRETED else 128
    if not (INTERPRETED or backward) and _fills(batch * groups * cdiv(width * sub, lanes), device):
        lanes = 64
    block_d = max(1, min(next_power_of_2(width), lanes // sub))
    narrow = element_size < 4
    options: dict[str, Any] = {
        "CHANNELS": channels,
        "GROUPS": groups,
        "N": n,
        "K": k,
        "SUB": sub,
        "BLOCK_D": block_d,
        "TIME": 8 if narrow and not backward else 4,
        "PACKED": packed,
        "PRECISE": not narrow,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }
    return options if INTERPRETED else options | {"num_warps": max(1, min(4, block_d * sub // 32))}


def _fills(programs: int, device: torch.device) -> bool:
    """Whether so many programs keep a device busy, so that no sequence is cut."""
    return programs >= 2 * multiprocessors(device)


def _backward_options(options: dict[str, Any]) -> dict[str, Any]:
    """What the backward kernel needs beside `_options`.

    168 registers a thread let three programs of four warps share a multiprocessor, and suffice without spilling.
    """
    found = {"LEVELS": options["TIME"].bit_length() - 1}
    return found if INTERPRETED else found | {"maxnreg": 168, "num_stages": 1}


def _grid(u: Tensor, B: Tensor, options: dict[str, Any], parts: int, wanted: int) -> tuple[tuple[int, int], int]:
    """Grid (rows x groups x channel blocks, parts), and positions of a part, a multiple of 64.

    Parts double the exponentials, so that a sequence is cut only where whole ones would leave most of the device idle:
    then into `wanted` programs for each multiprocessor.
    """
    batch, length, channels = u.shape
    groups = B.shape[2]
    programs = batch * groups * cdiv(channels // groups, options["BLOCK_D"])
    if not parts:
        parts = 1 if _fills(programs, u.device) else min(256, max(1, wanted * multiprocessors(u.device) // programs))
    part_length = cdiv(cdiv(length, parts), _SAVED) * _SAVED
    return (programs, cdiv(length, part_length)), part_length
