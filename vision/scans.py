"""The state-space recurrences of vision models, each as one function that tracing tools take as a single node.

torch.fx leaves them alone and TorchScript calls them as they are, so that mixers built on them pass both.
"""

# No postponed annotations here: TorchScript reads those of the functions that it leaves alone.

import contextlib
import itertools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor

from ..kernels import (
    add_rounded_layer_norm,
    autocast_enabled,
    causal_conv1d,
    cross_scan,
    gated_norm,
    quasiseparable_from_steps,
    rounded_layer_norm,
    selective_scan,
)

__all__ = [
    "LayerNormForProduct",
    "PlainBlocks",
    "at_least_float32",
    "cross_mix",
    "gate_norm",
    "hooked",
    "norm_for_product",
    "plain_scans",
    "quasiseparable_mix",
    "scans_are_plain",
    "selective_mix",
    "short_conv",
]

_PLAIN: ContextVar[bool] = ContextVar("plain", default=False)


@contextlib.contextmanager
def plain_scans() -> Iterator[None]:
    """Inside, selective scans are written in torch's own functions, so that a graph traced there needs no other.

    They take memory for all states, and log2(l) steps that double the stretch of the sequence that is summed up.
    """
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def scans_are_plain() -> bool:
    """Whether `plain_scans` is at work."""
    return _PLAIN.get()


def at_least_float32(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of rates, step biases and skips in a model of `dtype`: 16 bits are too few for them."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


@register_notrace_function
@torch.jit.ignore
def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, symmetric: bool) -> Tensor:
    """silu of a depthwise convolution along dim 1, causal or centred; x (b, l, d), weight (d, k) or (d, 1, k)."""
    return causal_conv1d(x, weight.flatten(1), bias, symmetric=symmetric)[0]


@register_notrace_function
@torch.jit.ignore
def raw_steps(low: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """low weight^T + bias in at least float32: a narrow product is widened before the bias comes to it.

    Args:
        low: Steps of low rank, (b, l, r).
        weight: (d, r).
        bias: (d,).
    """
    wide = torch.promote_types(low.dtype, torch.float32)
    if low.dtype == wide and not autocast_enabled(low.device.type):
        return F.linear(low, weight, bias)
    return F.linear(low, weight).to(wide) + bias.to(wide)


@register_notrace_function
@torch.jit.ignore
def selective_mix(
    x: Tensor, dt: Tensor, dt_bias: Tensor | None, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, window: int
) -> Tensor:
    """Selective scan along dim 1 with float32 steps, rates and states.

    Args:
        x: Input, (b, l, d).
        dt: Steps before bias and softplus, (b, l, d).
        dt_bias: (d,); None where `dt` has it already.
        A_log: Logarithm of the decay rates, (d, n).
        B: Input maps, (b, l, n) or (b, l, g, n).
        C: Output maps, like `B`.
        D: Skip, (d,).
        window: Segment of the local backward scan; 0 for none.

    Returns:
        (b, l, d) in float32, so that directions are summed before rounding.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    dt = F.softplus(dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide))
    A = -A_log.to(wide).exp()
    if _PLAIN.get():
        if window:
            raise ValueError("a scan that looks back locally has no plain form; build the model with segment=None.")
        return _doubled_scan(x.to(wide), dt, A, B.to(wide), C.to(wide), D.to(wide))
    return selective_scan(x, dt, A, B, C, D.to(wide), window=window or None)[0].to(wide)


def cross_mix(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`omnissm.kernels.cross_scan`, or inside `plain_scans` the same in torch's own functions; (b, i, j, d)."""
    if not _PLAIN.get():
        return cross_scan(x, dt, A, B, C, D)
    total = torch.zeros((), dtype=dt.dtype, device=dt.device)
    for k in range(4):  # rows, columns, and both backwards

        def ordered(grid: Tensor, k: int = k) -> Tensor:
            line = (grid.transpose(1, 2) if k % 2 else grid).flatten(1, 2)
            return line.flip(1) if k > 1 else line

        y = _doubled_scan(ordered(x.to(dt.dtype)), ordered(dt[:, k]), A[k], ordered(B[:, k]), ordered(C[:, k]), D[k])
        y = y.flip(1) if k > 1 else y
        total = total + (y.unflatten(1, (x.shape[2], x.shape[1])).transpose(1, 2) if k % 2 else y.view(x.shape))
    return total


def _doubled_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """y of h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t + D x_t; shapes as in `selective_mix`."""
    if B.dim() == 3:
        B, C = B[:, :, None], C[:, :, None]
    length, groups = x.shape[1], B.shape[2]
    decay = torch.exp(dt[..., None] * A).unflatten(2, (groups, -1))  # (b, l, g, d / g, n)
    state = (dt * x)[..., None].unflatten(2, (groups, -1)) * B[:, :, :, None]
    reach = 1
    while reach < length:
        state = state + decay * F.pad(state[:, :-reach], [0, 0, 0, 0, 0, 0, reach, 0])
        decay = decay * F.pad(decay[:, :-reach], [0, 0, 0, 0, 0, 0, reach, 0])
        reach *= 2
    return (state * C[:, :, :, None]).sum(-1).flatten(2) + D * x


@register_notrace_function
@torch.jit.ignore
def quasiseparable_mix(
    x: Tensor,
    dt_f: Tensor,
    dt_b: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    maps: list[Tensor],
    diag: Tensor,
    D: Tensor,
    chunk_size: int,
) -> Tensor:
    """Hydra's two recurrences and diagonal.

    Args:
        x: Input, (b, l, h, p).
        dt_f: Forward steps before bias and softplus, (b, l, h).
        dt_b: Backward ones.
        dt_bias: (h,).
        A_log: Logarithm of the decay rates, (h,).
        maps: B and C forward, B and C backward, each (b, l, g, n).
        diag: Diagonal but for what all positions share, (b, l, h).
        D: That, (h,).
        chunk_size: Positions per chunk; 0 chooses by the length.

    Returns:
        (b, l, h, p).
    """
    B_f, C_f, B_b, C_b = maps
    chunk = chunk_size or image_chunk(x)
    return quasiseparable_from_steps(x, dt_f, dt_b, dt_bias, A_log, B_f, C_f, B_b, C_b, diag, D, chunk_size=chunk)


@register_notrace_function
@torch.jit.ignore
def norm_for_product(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension, in the dtype in which a linear map takes it."""
    return rounded_layer_norm(x, weight, bias, eps)


class LayerNormForProduct(torch.nn.LayerNorm):
    """LayerNorm whose output goes to linear maps only: under autocast it may be rounded already."""

    def forward(self, x: Tensor) -> Tensor:
        """Norm (..., d)."""
        return norm_for_product(x, self.weight, self.bias, self.eps)


class PlainBlocks(torch.nn.Sequential):
    """Blocks x + mixer(norm(x)); without gradients each sum is made together with the norm of the next block.

    Attributes:
        whole: Whether `joined` is worth it in compiled code, which joins sums and norms by itself.
    """

    whole = False

    def forward(self, x: Tensor) -> Tensor:
        """Pass the stream through all blocks."""
        if not torch.jit.is_scripting() and self.joinable(x):
            return self.joined(x)
        for block in self:
            x = block(x)
        return x

    @torch.jit.ignore
    def joinable(self, x: Tensor) -> bool:
        """Whether nothing comes between one block's sum and the next one's norm, and its products are narrow."""
        if not isinstance(x, Tensor) or torch.is_grad_enabled() or self.training:
            return False
        if torch.compiler.is_compiling() and not self.whole:
            return False
        blocks: list[Any] = list(self)
        return self.plain(x) and not any(block.drop_path.training for block in blocks)

    @torch.jit.ignore
    def plain(self, x: Tensor) -> bool:
        """Whether blocks are sums of a branch of narrow products, and nobody looks at what is inside of them."""
        blocks: list[Any] = list(self)
        if not autocast_enabled(x.device.type) or not blocks or torch.nn.modules.module._has_any_global_hook():
            return False
        return all(
            isinstance(block.norm, LayerNormForProduct)
            and not block.has_mlp
            and isinstance(block.scale, torch.nn.Identity)
            and not any(map(hooked, (block, block.norm, block.scale, block.drop_path)))
            for block in blocks
        )

    @torch.jit.ignore
    def joined(self, x: Tensor) -> Tensor:
        """The blocks one after another with joined sums and norms."""
        blocks: list[Any] = list(self)
        inner = blocks[0].norm(x)
        for block, following in itertools.pairwise(blocks):
            norm = following.norm
            x, inner = add_rounded_layer_norm(x, block.mixer(inner), norm.weight, norm.bias, norm.eps)
        return x + blocks[-1].mixer(inner)


def hooked(module: Any) -> bool:
    """Whether somebody looks at what enters or leaves a module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def image_chunk(x: Tensor) -> int | None:
    """Chunk length for (b, l, ...): on a CPU an even cut of short sequences, 196 as 7 times 28; else the op's own."""
    length = x.shape[1]
    if x.device.type != "cpu":
        return None
    return -(-length // max(1, round(length / 28)))


@register_notrace_function
@torch.jit.ignore
def gate_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm(y) * silu(z) over the last dimension."""
    return gated_norm(y, z, weight, eps=eps, norm_before_gate=True)
