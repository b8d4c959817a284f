"""The inner part of a Vim layer on a CPU: convolution, steps, maps and scan of both directions, their sum and the gate.

    u = silu(conv(x));    [low | B | C] = x_proj u;    dt = softplus(dt_proj low + dt_bias)
    y = scan(u, dt, -exp(A_log), B, C) + D u;    out = (y forward + y backward, read from the end) silu(z)

For the gradient what was projected is kept, the sum of the two outputs and every 32nd state; one direction after the
other is formed again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..causal_conv1d.chunked import by_onednn, conv_gradients, convolved
from ..causal_conv1d.op import causal_conv1d
from ..dispatch import autocast_enabled, choose
from ..transforms import apply
from .chunked import _backward as scan_gradients
from .chunked import _forward as scan_forward
from .op import selective_scan


class VimWeights(NamedTuple):
    """Parameters of one direction of a Vim layer.

    Attributes:
        conv: Causal filters, (d, k).
        conv_bias: (d,).
        x_proj: To steps of low rank, B and C, (r + 2 n, d).
        dt_proj: (d, r).
        dt_bias: (d,).
        A_log: Logarithm of the decay rates, (d, n).
        D: Skip, (d,).
    """

    conv: Tensor
    conv_bias: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor


def vim_rows(projected: Tensor, forward: VimWeights, backward: VimWeights) -> Tensor | None:
    """Scan what the first projection of a Vim layer gives from both ends, up to what the last projection takes.

    Args:
        projected: x and z side by side, (b, l, 2 d).
        forward: Parameters of the scan from the start.
        backward: Those of the scan from the end.

    Returns:
        (y_f + y_b) silu(z), (b, l, d); None where the parts are to be called: everywhere but in float32 on a CPU in
        eager mode.

    Raises:
        ValueError: if shapes disagree.

    Differentiable, also twice.
    """
    tensors = projected, *forward, *backward
    classes = Tensor, torch.nn.Parameter
    if any(type(one) not in classes or one.dtype != torch.float32 for one in tensors):
        return None
    if projected.numel() == 0 or not by_onednn(projected, forward.conv) or autocast_enabled("cpu"):
        return None
    if choose("auto", projected, op="vim_rows") != "chunked":
        return None
    _check(projected, forward)
    _check(projected, backward)
    return apply(_Rows, *tensors)[0]


def _check(projected: Tensor, weights: VimWeights) -> None:
    channels, states = weights.A_log.shape
    rank = weights.dt_proj.shape[-1]
    vector, k = (channels,), weights.conv.shape[-1]
    shapes = (channels, k), vector, (rank + 2 * states, channels), (channels, rank), vector, (channels, states), vector
    for name, weight, shape in zip(weights._fields, weights, shapes, strict=True):
        if weight.shape != shape:
            raise ValueError(f"`{name}` has shape {tuple(weight.shape)}, expected {shape}.")
    if projected.dim() != 3 or projected.shape[2] != 2 * channels:
        raise ValueError(f"`projected` has shape {tuple(projected.shape)}, expected (b, l, {2 * channels}).")


class _Side:
    """One direction up to its scan."""

    def __init__(self, x: Tensor, weights: VimWeights) -> None:
        self.x, self.weights = x, weights
        self.left, self.length = weights.conv.shape[1] - 1, x.shape[1]
        self.u = convolved(x, weights.conv, weights.conv_bias, self.left, self.length, True)
        rank, states = weights.dt_proj.shape[1], weights.A_log.shape[1]
        self.low, B, C = F.linear(self.u, weights.x_proj).split([rank, states, states], dim=-1)
        self.raw = F.linear(self.low, weights.dt_proj, weights.dt_bias)
        self.dt = F.softplus(self.raw)
        self.A, self.B, self.C = -weights.A_log.exp(), B[:, :, None], C[:, :, None]

    def scan(self) -> tuple[Tensor, Tensor]:
        """Output, and the states that its gradient needs."""
        y, _, saved = scan_forward(self.u, self.dt, self.A, self.B, self.C, None, None)
        return y.addcmul_(self.weights.D, self.u), saved

    def gradients(self, saved: Tensor, dy: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Those of x and of the weights."""
        own = self.weights
        du, ddt, dA, dB, dC, _ = scan_gradients(
            self.u, self.dt, self.A, self.B, self.C, None, saved, dy, torch.zeros_like(saved[0])
        )
        dD = (dy * self.u).sum((0, 1))
        draw = ddt.mul_(self.raw.sigmoid_()).flatten(0, 1)
        maps = torch.cat([draw @ own.dt_proj, dB[:, :, 0].flatten(0, 1), dC[:, :, 0].flatten(0, 1)], dim=1)
        du.addcmul_(own.D, dy)
        du.flatten(0, 1).addmm_(maps, own.x_proj)
        dx_proj, ddt_proj = maps.mT @ self.u.flatten(0, 1), draw.mT @ self.low.flatten(0, 1)
        dx, dconv, dconv_bias = conv_gradients(self.x, own.conv, own.conv_bias, self.left, self.length, True, du)
        return dx, (dconv, dconv_bias, dx_proj, ddt_proj, draw.sum(0), dA * self.A, dD)


class _Rows(torch.autograd.Function):
    """Both directions; returns the states and the sum before the gate too."""

    @staticmethod
    def forward(projected: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, z = projected.chunk(2, dim=-1)
        half = len(weights) // 2
        y, saved_f = _Side(x, VimWeights(*weights[:half])).scan()
        later, saved_b = _Side(x.flip(1), VimWeights(*weights[half:])).scan()
        y += later.flip(1)
        return F.silu(z).mul_(y), y, saved_f, saved_b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        projected, *weights, y, saved_f, saved_b = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates the gradient
            found: tuple[Tensor, ...] = torch.func.vjp(_written_out, projected, *weights)[1](dout)
            return found
        x, z = projected.chunk(2, dim=-1)
        half = len(weights) // 2
        dprojected = torch.empty_like(projected, memory_format=torch.contiguous_format)
        dx, dz = dprojected.chunk(2, dim=-1)
        dz.copy_(torch.ops.aten.silu_backward(dout * y, z))
        dy = F.silu(z).mul_(dout)
        once, dforward = _Side(x, VimWeights(*weights[:half])).gradients(saved_f, dy)
        later, dbackward = _Side(x.flip(1), VimWeights(*weights[half:])).gradients(saved_b, dy.flip(1))
        torch.add(once, later.flip(1), out=dx)
        return dprojected, *dforward, *dbackward


def _written_out(projected: Tensor, *weights: Tensor) -> Tensor:
    """The same from the parts, differentiable any number of times."""
    x, z = projected.chunk(2, dim=-1)
    half = len(weights) // 2
    total: Any = 0
    for number, part in enumerate((weights[:half], weights[half:])):
        own = VimWeights(*part)
        u, _ = causal_conv1d(x.flip(1) if number else x, own.conv, own.conv_bias, backend="chunked")
        states = own.A_log.shape[1]
        low, B, C = F.linear(u, own.x_proj).split([own.dt_proj.shape[1], states, states], dim=-1)
        dt = F.softplus(F.linear(low, own.dt_proj, own.dt_bias))
        y, _ = selective_scan(u, dt, -own.A_log.exp(), B, C, own.D, backend="chunked")
        total = total + (y.flip(1) if number else y)
    return total * F.silu(z)
