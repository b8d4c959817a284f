"""A Vim layer on a CPU: projections, convolution, steps, maps and scan of both directions, their sum and the gate.

    [x | z] = in_proj norm(input);    u = silu(conv(x));    [low | B | C] = x_proj u
    dt = softplus(dt_proj low + dt_bias);    y = scan(u, dt, -exp(A_log), B, C) + D u
    out = out_proj((y forward + y from the end) silu(z))

A row, or a few short ones, goes through all of it before the next, so that what is between two steps stays in the
cache. For the gradient the input is kept, y forward + y backward, [low | B | C] and every eighth state; the rest is
formed again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..causal_conv1d.op import causal_conv1d
from ..dispatch import autocast_enabled, choose
from ..transforms import apply, traced, transforming
from .both_ends import NUMBERS, TILE, BothEnds, BothGradients, InputGradients, Inputs
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


def vim_rows(
    x: Tensor,
    in_proj: Tensor,
    out_proj: Tensor,
    forward: VimWeights,
    backward: VimWeights,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """A Vim layer, which scans from both ends, up to its residual branch.

    Args:
        x: (b, l, m).
        in_proj: To what is scanned and the gate, (2 d, m).
        out_proj: (m, d).
        forward: Parameters of the scan from the start.
        backward: Those of the scan from the end.
        norm: Weight of an RMS norm of `x` before all else, (m,); None for none.
        eps: Added to the mean square there.

    Returns:
        out_proj((y_f + y_b) silu(z)), (b, l, m); None where the parts are to be called: everywhere but in float32 on a
        CPU in eager mode.

    Raises:
        ValueError: if shapes disagree.

    Differentiable, also twice.
    """
    tensors = x, in_proj, out_proj, *forward, *backward
    given = tensors if norm is None else (*tensors, norm)
    classes = Tensor, torch.nn.Parameter
    if any(type(one) not in classes or one.dtype != torch.float32 for one in given):
        return None
    if x.numel() == 0 or x.device.type != "cpu" or traced() or transforming() or autocast_enabled("cpu"):
        return None
    if choose("auto", x, op="vim_rows") != "chunked":
        return None
    (channels, states), (_, rank), taps = forward.A_log.shape, forward.dt_proj.shape, forward.conv.shape[-1]
    _check("x", x, (*x.shape[:2], in_proj.shape[-1]))
    _check("in_proj", in_proj, (2 * channels, in_proj.shape[-1]))
    _check("out_proj", out_proj, (out_proj.shape[0], channels))
    if norm is not None:
        _check("norm", norm, x.shape[-1:])
    vector, maps = (channels,), (rank + 2 * states, channels)
    shapes = (channels, taps), vector, maps, (channels, rank), vector, (channels, states), vector
    for side in (forward, backward):
        for name, weight, shape in zip(side._fields, side, shapes, strict=True):
            _check(name, weight, shape)
    kept = torch.is_grad_enabled() and any(one.requires_grad for one in given)
    return apply(_Rows, kept, eps, norm, *tensors)[0]


def _check(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"`{name}` has shape {tuple(x.shape)}, expected {shape}.")


class _Layer:
    """Weights, (2, ...) where both directions have them, and the buffers of blocks of rows."""

    def __init__(
        self, x: Tensor, norm: Tensor | None, eps: float, weights: tuple[Tensor, ...], backward: bool = False
    ) -> None:
        self.norm, self.eps = norm, eps
        self.in_proj, self.out_proj, *sides = weights
        half = len(sides) // 2
        self.sides = VimWeights(*sides[:half]), VimWeights(*sides[half:])
        self.A = torch.stack([-side.A_log.exp().mT for side in self.sides])  # (2, n, d)
        self.taps = torch.stack([side.conv.mT for side in self.sides], 1)  # (k, 2, d)
        self.conv_bias = torch.stack([side.conv_bias for side in self.sides])
        self.D = torch.stack([side.D for side in self.sides])
        self.length, self.backward = x.shape[1], backward
        # Filters of the convolution but the last, which stays in place, and the places that each takes to others.
        reaches = [min(reach, self.length) for reach in range(len(self.taps) - 1, 0, -1)]
        self.shifts = [(k, slice(0, self.length - r), slice(r, None)) for k, r in enumerate(reaches)]
        together = max(1, NUMBERS // (TILE * self.A.numel()))
        self.rows = [slice(row, min(len(x), row + together)) for row in range(0, len(x), together)]
        self.blocks: dict[int, _Block] = {}

    def block(self, x: Tensor, maps: Tensor | None = None) -> _Block:
        """Buffers filled from the rows (b, l, m), and from their maps where these are known."""
        if len(x) not in self.blocks:
            self.blocks[len(x)] = _Block(self, len(x))
        block = self.blocks[len(x)]
        block.fill(self, x, maps)
        return block


class _Block:
    """So many rows up to their scan; time is in front, as the scans go. Buffers are reused, so that they stay in the
    cache."""

    def __init__(self, layer: _Layer, batch: int) -> None:
        _, states, channels = layer.A.shape
        rank = layer.sides[0].dt_proj.shape[1]
        new, wide = layer.A.new_empty, (layer.length, batch, 2, channels)
        if layer.norm is not None:
            self.unit = new(layer.length * batch, len(layer.norm))
            self.normed = torch.empty_like(self.unit) if layer.backward else self.unit
        self.projected = new(layer.length, batch, 2 * channels)
        self.x, self.z = self.projected.chunk(2, dim=-1)
        self.line, self.before, self.dt, weighted = (new(wide) for _ in range(4))
        # The gradient needs what came before an activation.
        self.u, self.raw = (new(wide), new(wide)) if layer.backward else (self.before, self.dt)
        self.maps = new(*wide[:3], rank + 2 * states)
        self.low, B, C = self.maps.split([rank, states, states], dim=-1)
        self.inputs = Inputs(self.dt, weighted, B, C)
        if layer.backward:
            self.dy, du, ddt = (new(wide) for _ in range(3))
            self.found = InputGradients(du, ddt, *(new(*wide[:3], states) for _ in "BC"))
            self.gradients = BothGradients(layer.A, self.inputs, self.dy, self.found)
        else:
            self.scan = BothEnds(layer.A, self.inputs, weighted)

    def fill(self, layer: _Layer, x: Tensor, known: Tensor | None) -> None:
        self.flat = _in_front(x)  # (l b, m)
        if layer.norm is not None:
            squares = torch.mul(self.flat, self.flat, out=self.unit)
            self.shrink = squares.mean(-1, keepdim=True).add_(layer.eps).rsqrt_()
            torch.mul(self.flat, self.shrink, out=self.unit)
            self.flat = torch.mul(self.unit, layer.norm, out=self.normed)
        torch.mm(self.flat, layer.in_proj.mT, out=self.projected.flatten(0, 1))
        _both(self.x, self.line)
        torch.addcmul(layer.conv_bias, self.line, layer.taps[-1], out=self.before)
        for k, source, target in layer.shifts:
            self.before[target].addcmul_(self.line[source], layer.taps[k])
        torch.ops.aten.silu.out(self.before, out=self.u)
        if known is not None:
            self.maps.copy_(known)
        for k, side in enumerate(layer.sides):
            u, maps, low, raw = (one.flatten(0, 1)[:, k] for one in (self.u, self.maps, self.low, self.raw))
            if known is None:
                torch.mm(u, side.x_proj.mT, out=maps)
            torch.addmm(side.dt_bias, low, side.dt_proj.mT, out=raw)
        _softplus(self.raw, self.dt)
        torch.mul(self.dt, self.u, out=self.inputs.weighted)

    def total(self, layer: _Layer, saved: Tensor | None) -> Tensor:
        """Scan; the sum of both directions, (l, b, d)."""
        self.scan.forward(saved)
        return _sum(self.inputs.weighted.addcmul_(self.u, layer.D))


def _in_front(x: Tensor) -> Tensor:
    """(b, l, m) with time in front, (l b, m)."""
    return x.transpose(0, 1).reshape(-1, x.shape[2])


def _both(x: Tensor, out: Tensor) -> Tensor:
    """Each direction's view of (l, b, d), (l, b, 2, d)."""
    out[:, :, 0], out[:, :, 1] = x, x.flip(0)
    return out


def _sum(x: Tensor) -> Tensor:
    """Adjoint of `_both`."""
    return x[:, :, 1].flip(0).add_(x[:, :, 0])


def _softplus(x: Tensor, out: Tensor) -> None:
    """log(1 + e^x); in half the time where nothing can overflow."""
    if not x.max() <= 20:  # a NaN, too: beside it another row may have large ones
        torch.ops.aten.softplus.out(x, out=out)
    else:
        torch.exp(x, out=out).log1p_()


class _Rows(torch.autograd.Function):
    """The layer; returns what else is kept too: the sum of both directions, maps, and states."""

    @staticmethod
    def forward(
        kept: bool, eps: float, norm: Tensor | None, x: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        layer = _Layer(x, norm, eps, weights)
        out = x.new_empty(*x.shape[:2], len(layer.out_proj))
        totals = x.new_empty(*x.shape[:2] if kept else (0, 0), layer.A.shape[2])
        maps = x.new_empty(layer.length, len(x) if kept else 0, 2, len(layer.sides[0].x_proj))
        saved = x.new_empty(-(-layer.length // TILE) if kept else 0, len(x), *layer.A.shape)
        for rows in layer.rows:
            block = layer.block(x[rows])
            total = block.total(layer, saved[:, rows] if kept else None)
            if kept:
                totals[rows] = total.transpose(0, 1)
                maps[:, rows] = block.maps
            gated = F.silu(block.z).mul_(total)
            out[rows] = (gated.flatten(0, 1) @ layer.out_proj.mT).unflatten(0, gated.shape[:2]).transpose(0, 1)
        return out, totals, maps, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.eps = inputs[1]
        ctx.save_for_backward(*inputs[2:], *output[1:])

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        norm, x, *weights, totals, maps, saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates the gradient
            if norm is None:
                return None, None, None, *torch.func.vjp(_written_out, x, *weights)[1](dout)

            def normed(norm: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
                return _written_out(F.rms_norm(x, norm.shape, norm, ctx.eps), *weights)

            return None, None, *torch.func.vjp(normed, norm, x, *weights)[1](dout)
        layer = _Layer(x, norm, ctx.eps, tuple(weights), backward=True)
        dx, sums = torch.empty_like(x), _Sums(layer)
        for rows in layer.rows:
            block = layer.block(x[rows], maps[:, rows])
            dx[rows] = sums.add(block, totals[rows].transpose(0, 1), saved[:, rows], dout[rows])
        return None, None, sums.norm, dx, *sums.of_weights()


class _Sums:
    """Gradients of the weights, over rows."""

    def __init__(self, layer: _Layer) -> None:
        self.layer = layer
        self.norm = None if layer.norm is None else torch.zeros_like(layer.norm)
        shaped = layer.in_proj, layer.out_proj, layer.A, layer.taps, layer.conv_bias, layer.D
        self.in_proj, self.out_proj, self.A_log, self.taps, self.conv_bias, self.D = map(torch.zeros_like, shaped)
        self.dt_bias = torch.zeros_like(layer.D)
        self.x_proj = [torch.zeros_like(side.x_proj) for side in layer.sides]
        self.dt_proj = [torch.zeros_like(side.dt_proj) for side in layer.sides]

    def add(self, block: _Block, total: Tensor, saved: Tensor, dout: Tensor) -> Tensor:
        """Add those of some rows, with their sums of both directions, (l, b, d), and states; returns that of x."""
        layer, u, z, shape = self.layer, block.u, block.z, block.z.shape
        dout, dy, found, scratch = _in_front(dout), block.dy, block.found, block.inputs.weighted
        dgated, gate = (dout @ layer.out_proj).view(shape), F.silu(z)
        _both(gate * dgated, dy)
        block.gradients.backward(saved, self.A_log)
        du, ddt = found.weighted, found.through
        self.D += torch.mul(dy, u, out=scratch).sum((0, 1))
        torch.ops.aten.silu_backward.grad_input(dgated.mul_(total), z, grad_input=z)
        self.out_proj.addmm_(dout.mT, gate.mul_(total).flatten(0, 1))
        ddt.addcmul_(u, du)
        draw = torch.ops.aten.softplus_backward.grad_input(ddt, block.raw, 1, 20, grad_input=ddt).flatten(0, 1)
        self.dt_bias += draw.sum(0)
        flat_du, flat_u = du.mul_(block.dt).addcmul_(layer.D, dy).flatten(0, 1), u.flatten(0, 1)
        dmaps, low = torch.cat([found.B, found.C], dim=-1).flatten(0, 1), block.low.flatten(0, 1)
        for k, side in enumerate(layer.sides):
            whole = torch.cat([draw[:, k] @ side.dt_proj, dmaps[:, k]], dim=1)
            flat_du[:, k].addmm_(whole, side.x_proj)
            self.x_proj[k].addmm_(whole.mT, flat_u[:, k])
            self.dt_proj[k].addmm_(draw[:, k].mT, low[:, k])
        dbefore = torch.ops.aten.silu_backward.grad_input(du, block.before, grad_input=du)
        self.conv_bias += dbefore.sum((0, 1))
        self.taps[-1] += torch.mul(dbefore, block.line, out=scratch).sum((0, 1))
        dline = torch.mul(dbefore, layer.taps[-1], out=ddt)
        for k, source, target in layer.shifts:
            self.taps[k] += torch.mul(dbefore[target], block.line[source], out=scratch[target]).sum((0, 1))
            dline[source].addcmul_(dbefore[target], layer.taps[k])
        torch.add(dline[:, :, 0], dline[:, :, 1].flip(0), out=block.x)
        dprojected = block.projected.flatten(0, 1)
        self.in_proj.addmm_(dprojected.mT, block.flat)
        dflat = dprojected @ layer.in_proj
        if self.norm is not None and layer.norm is not None:
            products = torch.mul(dflat, block.unit, out=block.normed)
            self.norm += products.sum(0)
            along = (products @ layer.norm)[:, None].div_(-dflat.shape[1])
            dflat.mul_(layer.norm).addcmul_(block.unit, along).mul_(block.shrink)
        return dflat.unflatten(0, shape[:2]).transpose(0, 1)

    def of_weights(self) -> tuple[Tensor, ...]:
        """In the order of the weights."""
        found = [self.in_proj, self.out_proj]
        for k in range(2):
            found += self.taps[:, k].mT, self.conv_bias[k], self.x_proj[k], self.dt_proj[k], self.dt_bias[k]
            found += self.A_log[k].mT, self.D[k]
        return tuple(found)


def _written_out(x: Tensor, in_proj: Tensor, out_proj: Tensor, *weights: Tensor) -> Tensor:
    """The same from the parts, differentiable any number of times."""
    x, z = (x @ in_proj.mT).chunk(2, dim=-1)
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
    return (total * F.silu(z)) @ out_proj.mT
