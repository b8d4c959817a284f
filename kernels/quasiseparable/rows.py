"""Hydra's inner part on a CPU for short rows: convolution, mixing matrix, norm and gate of a few rows in the cache.

The matrix of a head is written out, M = S E with the scores S, which the heads of a group share, and factors E:

    S_ts = C^f_{t-1}.B^f_s,  E_ts = dt^f_s exp(sum_{s<j<t} log_decay^f_j)  (s < t);    S_tt = 1,  E_tt = diag_t
    S_ts = C^b_{t+1}.B^b_s,  E_ts = dt^b_s exp(sum_{t<j<s} log_decay^b_j)  (s > t)

Between chunks of positions E is a product of factors <= 1 of row and column; inside a chunk the sums are float64.
For the gradient only what the projection gave is kept. With dM = dy x^T, dE_ts E_ts = P_ts = dM_ts M_ts, and

    dS = sum over heads of dM E,    dlog_decay^f_j = sum_{t>j} sum_{s<j} P_ts,    ddt^f_s dt^f_s = sum_{t>s} P_ts,

likewise backward, where all sums run over the entries themselves: a difference of two sums would lose digits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..causal_conv1d.chunked import by_onednn, convolve, filter_gradients, filters_of
from ..causal_conv1d.op import causal_conv1d
from ..checks import call_kind, known, remember
from ..dispatch import autocast_enabled, choose
from ..gated_norm.op import gated_norm
from ..transforms import apply
from .from_steps import quasiseparable_from_steps

# Positions of a row, up to which its matrices are less work than the states of chunks.
_LONGEST = 256
# Numbers in the matrices of the rows that one thread works on at once: a few of these fit a second-level cache.
_NUMBERS = 1 << 19
# Below this a step softplus(x) is exp(x) to the last digit.
_SMALL = -30.0


class _Weights(NamedTuple):
    conv: Tensor
    conv_bias: Tensor
    dt_bias: Tensor
    A_log: Tensor
    from_x: Tensor
    D: Tensor
    gate: Tensor


def hydra_rows(
    projected: Tensor,
    conv: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    from_x: Tensor,
    D: Tensor,
    gate: Tensor,
    *,
    d_state: int,
    eps: float,
) -> Tensor | None:
    """Mix what the first projection of a Hydra layer gives, up to what the last one takes.

    Args:
        projected: z, x, B_f, C_f, B_b, C_b, dt_f and dt_b side by side, (b, l, 2 d_inner + 4 g n + 2 h).
        conv: Centred filters of x and the four maps, (d_inner + 4 g n, 1, k).
        conv_bias: (d_inner + 4 g n,).
        dt_bias: (h,).
        A_log: Logarithm of the decay rates, (h,).
        from_x: To what positions add to the diagonal, (h, d_inner).
        D: Diagonal of all positions, (h,).
        gate: Weight of the norm before the gate, (d_inner,).
        d_state: States n per channel and direction.
        eps: Added to the mean square in that norm.

    Returns:
        norm(mix) silu(z), (b, l, d_inner); None where the parts are to be called: everywhere but for float32 rows of up
        to 256 positions on a CPU in eager mode.

    Raises:
        ValueError: if shapes disagree.

    Differentiable, also twice.
    """
    tensors = projected, conv, conv_bias, dt_bias, A_log, from_x, D, gate
    classes = Tensor, torch.nn.Parameter
    if any(type(one) not in classes or one.dtype != torch.float32 for one in tensors):
        return None
    if not by_onednn(projected, conv) or autocast_enabled("cpu"):
        return None
    if (
        projected.numel() == 0
        or projected.shape[1] > _LONGEST
        or choose("auto", projected, op="hydra_rows") != "chunked"
    ):
        return None
    kind = call_kind("hydra_rows", *tensors, d_state)
    if not known(kind):
        _check(d_state, *tensors)
        remember(kind)
    return apply(_Rows, *tensors, d_state, eps)


def _check(states: int, projected: Tensor, *weights: Tensor) -> None:
    named = _Weights(*weights)
    heads, inner = named.from_x.shape
    mixed, _, k = named.conv.shape
    groups = (mixed - inner) // (4 * states)
    shapes = (mixed, 1, k), (mixed,), (heads,), (heads,), (heads, inner), (heads,), (inner,)
    for name, weight, shape in zip(named._fields, named, shapes, strict=True):
        if weight.shape != shape:
            raise ValueError(f"`{name}` has shape {tuple(weight.shape)}, expected {shape}.")
    if groups < 1 or mixed != inner + 4 * groups * states or heads % groups or inner % heads or k % 2 == 0:
        raise ValueError(
            f"{heads} heads, maps of {states} states and filters of width {k} do not make up {inner} inner channels and"
            f" {mixed} channels of a centred convolution."
        )
    width = inner + mixed + 2 * heads
    if projected.dim() != 3 or projected.shape[2] != width:
        raise ValueError(f"`projected` has shape {tuple(projected.shape)}, expected (b, l, {width}).")


class _Sizes(NamedTuple):
    batch: int
    length: int
    inner: int
    mixed: int  # channels of the convolution
    heads: int
    groups: int
    states: int
    chunks: int
    q: int  # positions of a chunk

    @property
    def padded(self) -> int:
        return self.chunks * self.q

    @property
    def together(self) -> int:
        """Rows worked on at once."""
        return max(1, _NUMBERS * torch.get_num_threads() // (self.heads * self.padded**2))


def _sizes(projected: Tensor, weights: _Weights, states: int) -> _Sizes:
    batch, length, _ = projected.shape
    heads, inner = weights.from_x.shape
    mixed = weights.conv.shape[0]
    chunks = max(1, round(length / 28))
    q = max(2, -(-length // chunks))
    return _Sizes(batch, length, inner, mixed, heads, (mixed - inner) // (4 * states), states, chunks, q)


class _Steps(NamedTuple):
    """Of both directions, (2, s, h, k, q), zero behind the end of a row."""

    raw: Tensor  # dt + dt_bias
    dt: Tensor
    log_decay: Tensor


def _steps(projected: Tensor, weights: _Weights, sizes: _Sizes) -> _Steps:
    raw = projected[..., sizes.inner + sizes.mixed :].unflatten(-1, (2, -1)) + weights.dt_bias
    raw = raw.permute(2, 0, 3, 1)  # (2, s, h, l)
    dt = F.softplus(raw)
    parts = raw, dt, dt * -weights.A_log.exp()[:, None]
    behind = sizes.padded - sizes.length
    return _Steps(*(F.pad(part, (0, behind)).unflatten(-1, (sizes.chunks, sizes.q)) for part in parts))


def _strictly(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Ones below and above the diagonal."""
    ones = like.new_ones(count, count)
    return ones.tril(-1), ones.triu(1)


def _factors(steps: _Steps, diag: Tensor, sizes: _Sizes) -> Tensor:
    """E, (s, h, k, q, k, q); diag (s, h, k, q)."""
    dtype, decays = steps.dt.dtype, steps.log_decay.double()
    upto = decays.cumsum(-1)
    before, total = upto - decays, upto[..., -1]
    after = total[..., None] - upto
    # Sums from the chunk's border to the position of a row, and from that of a column to the next border.
    of_row = torch.stack([before[0], after[1]]).to(dtype).exp()
    of_column = torch.stack([after[0], before[1]]).to(dtype).exp().mul_(steps.dt)
    ends = total.cumsum(-1)
    starts = ends - total
    between_f = (starts[0, ..., :, None] - ends[0, ..., None, :]).to(dtype).exp().tril(-1)  # (s, h, k, k)
    between_b = (starts[1, ..., None, :] - ends[1, ..., :, None]).to(dtype).exp().triu(1)
    rows = of_row[0, ..., None] * between_f[..., None, :]
    rows.addcmul_(of_row[1, ..., None], between_b[..., None, :])  # (s, h, k, q, k)
    lower = upto.new_ones(sizes.chunks, sizes.chunks, dtype=torch.bool).tril(-1)
    columns = torch.where(lower[..., None], of_column[0, :, :, None], of_column[1, :, :, None])  # (s, h, k, k, q)
    factors = rows[..., None] * columns[:, :, :, None]

    # Of the two sums the one that is meant is negative, the other one positive.
    inside_f = before[0, ..., :, None] - upto[0, ..., None, :]
    inside_b = before[1, ..., None, :] - upto[1, ..., :, None]
    inside = torch.minimum(inside_f, inside_b, out=inside_f).to(dtype).exp_()
    below = upto.new_ones(sizes.q, sizes.q, dtype=torch.bool).tril()
    inside *= torch.where(below, steps.dt[0, ..., None, :], steps.dt[1, ..., None, :])
    inside.diagonal(dim1=-2, dim2=-1).copy_(diag)
    factors.diagonal(dim1=2, dim2=4).copy_(inside.movedim(2, -1))
    return factors


def _scores(maps: list[Tensor]) -> Tensor:
    """S, (s, g, l, l), of B and C forward, B and C backward, each (s, g, l, n)."""
    B_f, C_f, B_b, C_b = maps
    forward, backward = C_f @ B_f.mT, C_b @ B_b.mT
    length = forward.shape[-1]
    scores = torch.empty_like(forward)
    scores[..., 0, :], scores[..., -1, :] = backward[..., 1, :], forward[..., -2, :]
    lower = scores.new_ones(length, length, dtype=torch.bool).tril()[1:-1]
    scores[..., 1:-1, :] = torch.where(lower, forward[..., :-2, :], backward[..., 2:, :])
    scores.diagonal(dim1=-2, dim2=-1).fill_(1)
    return scores


class _Mixed:
    """Some rows up to the product with their matrices.

    Attributes:
        wide: Input of the convolution with zeros around, (s, l + k - 1, c).
        before: What it gives before silu, (s, l, c); None if it may be overwritten.
        steps: Of the recurrences.
        maps: B and C forward, B and C backward, each (s, g, l, n).
        factors: E, (s, h, l, l).
        scores: S, (s, g, 1, l, l).
        x: Input of the product, (s, h, l, p).
        y: Its output, (s, l, d_inner) without padding.
    """

    def __init__(self, projected: Tensor, weights: _Weights, filters: Tensor, sizes: _Sizes, keep: bool) -> None:
        inner, groups = sizes.inner, sizes.groups
        half = filters.shape[2] // 2
        self.wide = F.pad(projected[..., inner : inner + sizes.mixed], (0, 0, half, half))
        self.before = convolve(self.wide, filters, weights.conv_bias)
        mixed = F.pad(F.silu(self.before, inplace=not keep), (0, 0, 0, sizes.padded - sizes.length))
        self.flat = mixed[..., :inner]
        self.x = self.flat.unflatten(-1, (sizes.heads, -1)).transpose(1, 2)
        maps = mixed[..., inner:].unflatten(-1, (4, groups, sizes.states))
        self.maps = [one.transpose(1, 2) for one in maps.unbind(2)]
        diag = (self.flat @ weights.from_x.mT).add_(weights.D).mT
        self.steps = _steps(projected, weights, sizes)
        factors = _factors(self.steps, diag.unflatten(-1, (sizes.chunks, sizes.q)), sizes)
        self.factors = factors.flatten(4, 5).flatten(2, 3)
        self.scores = _scores(self.maps)[:, :, None]
        by_group = self.factors.unflatten(1, (groups, -1))
        matrix = torch.mul(by_group, self.scores, out=None if keep else by_group)
        self.matrix = matrix.flatten(1, 2)
        self.y = (self.matrix @ self.x).transpose(1, 2).flatten(2)[:, : sizes.length]


class _Rows(torch.autograd.Function):
    """The product on a few rows at a time, formed again for its gradient."""

    @staticmethod
    def forward(projected: Tensor, *arguments: Any) -> Tensor:
        *tensors, states, eps = arguments
        weights = _Weights(*tensors)
        sizes, filters = _sizes(projected, weights, states), filters_of(weights.conv.flatten(1))
        out = projected.new_empty(sizes.batch, sizes.length, sizes.inner)
        for piece, target in zip(projected.split(sizes.together), out.split(sizes.together), strict=True):
            y = _Mixed(piece, weights, filters, sizes, keep=False).y
            scale = y.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
            torch.mul(y * scale, F.silu(piece[..., : sizes.inner]).mul_(weights.gate), out=target)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.states, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        projected, *tensors = ctx.saved_tensors
        options = ctx.states, ctx.eps
        if torch.is_grad_enabled():  # somebody differentiates the gradient

            def written_out(*tensors: Tensor) -> Tensor:
                return _written_out(tensors[0], _Weights(*tensors[1:]), *options)

            return *torch.func.vjp(written_out, projected, *tensors)[1](dout), None, None
        return *_gradients(projected, _Weights(*tensors), *options, dout), None, None


def _gradients(projected: Tensor, weights: _Weights, states: int, eps: float, dout: Tensor) -> tuple[Tensor, ...]:
    """Gradients of what was projected and of the weights."""
    sizes = _sizes(projected, weights, states)
    filters, mirrored = (filters_of(one.flatten(1)) for one in (weights.conv, weights.conv.flip(-1)))
    inner, length = sizes.inner, sizes.length
    half = filters.shape[2] // 2
    dprojected = torch.empty_like(projected, memory_format=torch.contiguous_format)
    found = _Weights(*(torch.zeros_like(one, memory_format=torch.contiguous_format) for one in weights))
    for piece, dpiece, dout_piece in zip(
        *(one.split(sizes.together) for one in (projected, dprojected, dout)), strict=True
    ):
        rows = _Mixed(piece, weights, filters, sizes, keep=True)
        z = piece[..., :inner]
        scale = rows.y.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed, gated = rows.y * scale, F.silu(z).mul_(dout_piece)
        found.gate.add_((gated * normed).sum((0, 1)))
        gated.mul_(weights.gate)  # gradient of the norm's output
        dpiece[..., :inner] = torch.ops.aten.silu_backward((dout_piece * normed).mul_(weights.gate), z)
        dy = torch.addcmul(gated, normed, (gated * normed).mean(-1, keepdim=True), value=-1).mul_(scale)
        dmixed, draw = _matrix_gradients(rows, weights, sizes, dy, found)
        dpiece[..., inner + sizes.mixed :] = draw
        dpre = torch.ops.aten.silu_backward(dmixed[:, :length], rows.before).contiguous()
        dpiece[..., inner : inner + sizes.mixed] = convolve(F.pad(dpre, (0, 0, half, half)), mirrored, None)
        dconv, dbias = filter_gradients(dpre, rows.wide, filters)
        found.conv.add_(dconv.view_as(found.conv))
        found.conv_bias.add_(dbias)
    return dprojected, *found


def _matrix_gradients(
    rows: _Mixed, weights: _Weights, sizes: _Sizes, dy: Tensor, found: _Weights
) -> tuple[Tensor, Tensor]:
    """Gradients of what the convolution gives, (s, l, c) with padding, and of the two steps, (s, l, 2 h).

    Those of parameters are added to `found`.
    """
    dy = F.pad(dy, (0, 0, 0, sizes.padded - sizes.length)).unflatten(-1, (sizes.heads, -1)).transpose(1, 2)
    dx = rows.matrix.mT @ dy
    dmatrix = dy @ rows.x.mT  # (s, h, l, l)
    ddiag = dmatrix.diagonal(dim1=-2, dim2=-1).clone()
    found.D.add_(ddiag.sum((0, 2)))
    found.from_x.add_((ddiag @ rows.flat).sum(0))
    dmixed = dx.new_empty(dx.shape[0], sizes.padded, sizes.mixed)
    torch.matmul(ddiag.mT, weights.from_x, out=dmixed[..., : sizes.inner])
    dmixed[..., : sizes.inner].unflatten(-1, (sizes.heads, -1)).add_(dx.transpose(1, 2))

    by_group = dmatrix.mul_(rows.factors).unflatten(1, (sizes.groups, -1))
    B_f, C_f, B_b, C_b = rows.maps
    dscores = by_group.sum(2)
    of_lower, of_upper = dscores[..., 1:, :].tril(), dscores[..., :-1, :].triu(1)
    outputs = dmixed[..., sizes.inner :].unflatten(-1, (4, sizes.groups, -1)).permute(2, 0, 3, 1, 4)
    outputs[0], outputs[1, ..., :-1, :] = of_lower.mT @ C_f[..., :-1, :], of_lower @ B_f
    outputs[2], outputs[3, ..., 1:, :] = of_upper.mT @ C_b[..., 1:, :], of_upper @ B_b
    outputs[1, ..., -1, :], outputs[3, ..., 0, :] = 0, 0
    products = by_group.mul_(rows.scores).flatten(1, 2)
    products.diagonal(dim1=-2, dim2=-1).zero_()

    dlog_decay, of_columns = _sums(products, sizes)
    raw, dt, log_decay = rows.steps
    slope = raw.sigmoid()
    draw = (
        of_columns * torch.where(raw < _SMALL, 1, slope / dt) - dlog_decay * slope * weights.A_log.exp()[:, None, None]
    )
    draw = draw.flatten(3)[..., : sizes.length]  # (2, s, h, l)
    found.A_log.add_((dlog_decay * log_decay).sum((0, 1, 3, 4)))
    found.dt_bias.add_(draw.sum((0, 1, 3)))
    return dmixed, draw.permute(1, 3, 0, 2).flatten(2)


def _sums(products: Tensor, sizes: _Sizes) -> tuple[Tensor, Tensor]:
    """Sums over P, (s, h, l, l), for both directions, each (2, s, h, k, q).

    Returns:
        At j those of all entries with j between row and column, and at s those of column s.
    """
    products = products.unflatten(3, (sizes.chunks, sizes.q)).unflatten(2, (sizes.chunks, sizes.q))
    low, high = _strictly(sizes.chunks, products)
    below, above = _strictly(sizes.q, products)
    by_row, by_column = products.sum(-1), products.sum(3)  # (s, h, k, q, k), (s, h, k, k, q)
    blocks = by_column.sum(-1)
    inside = products.diagonal(dim1=2, dim2=4).movedim(-1, 2).contiguous()  # (s, h, k, q, q)
    sums, columns = [], []
    # Forward the rows lie behind the columns: `behind` has ones where the column's number is larger.
    for ahead, behind, near, far in ((low, high, below, above), (high, low, above, below)):
        of_row = (by_row * ahead[:, None]).sum(-1)
        of_column = (by_column * ahead[..., None]).sum(2)
        reached = far @ inside  # at j and s the sum over rows beyond j
        across = ((behind @ blocks) * ahead).sum(-1)
        sums.append(across[..., None] + of_row @ near + of_column @ far + (reached * near).sum(-1))
        columns.append(of_column + reached.diagonal(dim1=-2, dim2=-1))
    return torch.stack(sums), torch.stack(columns)


def _written_out(projected: Tensor, weights: _Weights, states: int, eps: float) -> Tensor:
    """The same from the parts, differentiable any number of times."""
    heads, inner = weights.from_x.shape
    mixed = weights.conv.shape[0]
    z, mix, dt_f, dt_b = projected.split([inner, mixed, heads, heads], dim=-1)
    mix, _ = causal_conv1d(mix, weights.conv.flatten(1), weights.conv_bias, symmetric=True, backend="chunked")
    groups = (mixed - inner) // (4 * states)
    x, *maps = mix.split([inner, *4 * [groups * states]], dim=-1)
    B_f, C_f, B_b, C_b = (one.unflatten(-1, (groups, states)) for one in maps)
    heads_of_x, diag, steps = x.unflatten(-1, (heads, -1)), F.linear(x, weights.from_x), (dt_f, dt_b, weights.dt_bias)
    y = quasiseparable_from_steps(
        heads_of_x, *steps, weights.A_log, B_f, C_f, B_b, C_b, diag, weights.D, backend="chunked"
    )
    return gated_norm(y.flatten(2), z, weights.gate, eps=eps, norm_before_gate=True, backend="chunked")
