"""A stack of Hydra blocks as one call, where nobody looks at what is between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import autocast_enabled, choose
from ..transforms import call, traced, transforming

# Of the kernels.
_WIDEST_HEAD, _WIDEST_STREAM = 128, 16384


class HydraWeights(NamedTuple):
    """Parameters of one block x + out_proj(norm(mix) silu(z)) with z and mix from in_proj(LayerNorm(x)).

    Attributes:
        norm: Weight of the layer norm, (d,).
        norm_bias: (d,).
        in_proj: To z, x, B_f, C_f, B_b, C_b, dt_f and dt_b, (2 d_inner + 4 g n + 2 h, d).
        conv: Centred filters of x and the four maps, (d_inner + 4 g n, 1, k).
        conv_bias: (d_inner + 4 g n,).
        dt_bias: (h,).
        A_log: Logarithm of the decay rates, (h,).
        from_x: To what positions add to the diagonal, (h, d_inner).
        D: Diagonal of all positions, (h,).
        gate: Weight of the norm before the gate, (d_inner,).
        out_proj: (d, d_inner).
    """

    norm: Tensor
    norm_bias: Tensor
    in_proj: Tensor
    conv: Tensor
    conv_bias: Tensor
    dt_bias: Tensor
    A_log: Tensor
    from_x: Tensor
    D: Tensor
    gate: Tensor
    out_proj: Tensor


def hydra_blocks(
    x: Tensor,
    blocks: Sequence[HydraWeights],
    *,
    headdim: int,
    d_state: int,
    eps: float,
    gate_eps: float,
    scale: Callable[[int], Tensor | None] | None = None,
) -> Tensor | None:
    """Pass a stream through blocks of a layer norm and a Hydra mixer, by few launches.

    Args:
        x: Stream, (b, l, d).
        blocks: Parameters of each, all of one set of shapes.
        headdim: Channels p of a head.
        d_state: States n per channel and direction.
        eps: Added to the variance in the layer norm.
        gate_eps: Added to the mean square in the norm before the gate.
        scale: Gives for the number of a block what its branch is multiplied by before it is added, (b, 1, 1) or None
            for 1; asked for each block in order, with gradients only.

    Returns:
        The stream after the last block, (b, l, d), up to rounding what the blocks give one by one under autocast; None
        where these are to be called: without 16-bit autocast on a GPU, for other than float32 streams and parameters,
        for sizes that the kernels do not take, and with gradients under `torch.func` or while something is traced.

    Raises:
        ValueError: if shapes disagree.

    Differentiable once.
    """
    kind, weights = x.device.type, [weight for block in blocks for weight in block]
    if not weights or not autocast_enabled(kind) or (not torch.compiler.is_compiling() and transforming()):
        return None
    dtype = torch.get_autocast_dtype(kind)
    if dtype.itemsize != 2 or x.dim() != 3 or x.numel() == 0 or choose("auto", x, op="hydra_blocks") != "triton":
        return None
    classes = Tensor, torch.nn.Parameter
    if any(type(one) not in classes or one.dtype != torch.float32 or one.device != x.device for one in (x, *weights)):
        return None
    if not _check(x, blocks, headdim, d_state):
        return None
    if not torch.is_grad_enabled():
        from .triton_blocks import hydra_blocks_triton

        return call(hydra_blocks_triton, x, weights, headdim, d_state, eps, gate_eps, dtype)
    if traced():
        return None
    from .triton_training import hydra_blocks_with_gradients

    return hydra_blocks_with_gradients(x, blocks, headdim, d_state, eps, gate_eps, dtype, scale)


def _check(x: Tensor, blocks: Sequence[HydraWeights], headdim: int, d_state: int) -> bool:
    """Whether the kernels take these sizes; an error if they do not fit together."""
    nheads, d_inner = blocks[0].from_x.shape
    channels, mixed, k = x.shape[2], blocks[0].conv.shape[0], blocks[0].conv.shape[-1]
    width = d_inner + mixed + 2 * nheads
    shapes = (
        *2 * [(channels,)], (width, channels), (mixed, 1, k), (mixed,), (nheads,), (nheads,), (nheads, d_inner),
        (nheads,), (d_inner,), (channels, d_inner),
    )  # fmt: skip
    for number, block in enumerate(blocks):
        for name, weight, shape in zip(block._fields, block, shapes, strict=True):
            if weight.shape != shape:
                raise ValueError(f"`{name}` of block {number} has shape {tuple(weight.shape)}, expected {shape}.")
    groups = (mixed - d_inner) // (4 * d_state)
    if d_inner != nheads * headdim or mixed != d_inner + 4 * groups * d_state or groups < 1 or nheads % groups:
        raise ValueError(
            f"{nheads} heads of {headdim} channels and maps of {d_state} states do not make up {d_inner} inner"
            f" channels and {mixed} channels of the convolution."
        )
    even = channels % 8 == 0 and d_inner % 8 == 0 and k % 2 == 1 and k <= 8
    small = headdim <= _WIDEST_HEAD and d_state <= _WIDEST_HEAD and channels <= _WIDEST_STREAM
    return even and small and x.shape[1] * (width + 8) < 2**31
