"""The scan level by level: all nodes of a level at once, states in blocks of the state dimension.

    forward    S_v = x_v B_v^T + sum_{u->v} a_uv S_u,    y_v = S_v C_v
    backward   G_v = dy_v C_v^T + sum_{v->w} a_vw G_w,   dx_v = G_v B_v,  dB_v = G_v^T x_v,  dC_v = S_v^T dy_v,
               da_uv = <S_u, G_v>

The adjoint is the same scan against the edges. States are kept for backward only if all of them fit the budget, else
they are computed again block by block, so that memory stays linear in the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..transforms import FirstDerivative, apply, operator
from .order import DagOrder

_EDGES_AT_ONCE = 65536
_WIDE = 32  # edges per level from which on the gradients of weights are formed level by level


def dag_scan_chunked(
    x: Tensor, weight: Tensor, B: Tensor, C: Tensor, order: DagOrder, reverse: bool, max_state_bytes: int
) -> Tensor:
    """See `dag_scan`; `weight` (e, h) in the dtype of the sums is what an edge multiplies a state with."""
    y, _ = apply(DagScan, x, weight, B, C, order.tensors(), reverse, max_state_bytes)
    return y


class _Levels:
    """Edges by level, in the direction in which states flow, and against it."""

    def __init__(self, topology: list[Tensor]) -> None:
        (self.perm, self.inverse, level_ptr, self.edge_perm, self.src, self.dst, self.row_ptr, edge_ptr, self.out_perm,
         self.out_row_ptr, self.out_dst, self.out_edge, out_ptr, *_) = topology  # fmt: skip
        self.level_ptr: list[int] = level_ptr.tolist()
        self.edge_ptr: list[int] = edge_ptr.tolist()
        self.out_ptr: list[int] = out_ptr.tolist()

    def propagate_(self, states: Tensor, weight: Tensor, backwards: bool, others: Tensor | None = None) -> Tensor:
        """Add to each row the weighted rows before it (behind it, if backwards); `weight` (e, h) by scan edge.

        Returns:
            (e, h), by scan edge, the product of the row that an edge moves and the row of `others` that it moves to;
            empty without `others`.
        """
        products = weight.new_empty(weight.shape if others is not None else 0)
        order = self.out_perm if backwards else slice(None)
        levels = range(len(self.level_ptr) - 1)
        source, target, row_ptr, edge_ptr = self.src, self.dst, self.row_ptr, self.edge_ptr
        if backwards:
            source, target, weight = self.dst[self.out_perm], self.src[self.out_perm], weight[self.out_perm]
            row_ptr, edge_ptr, levels = self.out_row_ptr, self.out_ptr, levels[::-1]
        weight = weight[..., None, None]
        for level in levels:
            begin, end = edge_ptr[level], edge_ptr[level + 1]
            if begin == end:
                continue
            first, last = self.level_ptr[level], self.level_ptr[level + 1]
            moved = states[source[begin:end]]
            if others is not None:
                products[begin:end] = (moved * others[target[begin:end]]).flatten(2).sum(2)
            moved *= weight[begin:end]
            if states.device.type == "cpu":
                states[first:last].index_add_(0, target[begin:end] - first, moved)
            else:  # the same sum in a fixed order, which index_add_ has on a CPU only
                offsets = row_ptr[first : last + 1] - begin
                states[first:last] += torch.segment_reduce(moved, "sum", offsets=offsets, axis=0, initial=0)
        if others is None:
            return products
        found = torch.empty_like(products)
        found[order] = products
        return found


def node_outer(values: Tensor, vectors: Tensor) -> Tensor:
    """(v, h, p) and (v, g, n) -> (v, h, p, n); the heads of a group share its vector."""
    nodes, heads, headdim = values.shape
    grouped = values.view(nodes, vectors.shape[1], -1, headdim, 1)
    return (grouped * vectors[:, :, None, None]).view(nodes, heads, headdim, -1)


def node_over_state(states: Tensor, vectors: Tensor) -> Tensor:
    """(v, h, p, n) and (v, g, n) -> (v, h, p)."""
    nodes, heads, headdim, size = states.shape
    grouped = states.view(nodes, vectors.shape[1], -1, size)
    return (grouped @ vectors[..., None]).view(nodes, heads, headdim)


def node_over_heads(states: Tensor, values: Tensor, groups: int) -> Tensor:
    """(v, h, p, n) and (v, h, p) -> (v, g, n), summed over the heads of a group."""
    nodes, _, _, size = states.shape
    return (values.reshape(nodes, groups, 1, -1) @ states.view(nodes, groups, -1, size))[:, :, 0]


def state_block(x: Tensor, weight: Tensor, size: int, budget: int) -> int:
    """States of one node that are worked on at once: as many as fit the budget, a power of two below all of them."""
    fitting = budget // max(1, x.numel() * weight.element_size())
    return size if fitting >= size else 1 << max(0, fitting.bit_length() - 1)


@operator("dag_scan_chunked_fwd")
def _forward(
    x: Tensor, weight: Tensor, B: Tensor, C: Tensor, topology: list[Tensor], reverse: bool, max_state_bytes: int
) -> tuple[Tensor, Tensor]:
    """Outputs (v, h, p) in the order of the nodes, and the states by position if they fit, else nothing."""
    levels, wide = _Levels(topology), weight.dtype
    inputs, keys, readers = (tensor[levels.perm].to(wide).contiguous() for tensor in (x, B, C))
    weight = weight[levels.edge_perm]
    size = B.shape[2]
    block = state_block(x, weight, size, max_state_bytes)
    y, states = torch.zeros_like(inputs), weight.new_empty(0)
    for n in range(0, size, block):
        part = slice(n, n + block)
        states = node_outer(inputs, keys[..., part])
        levels.propagate_(states, weight, reverse)
        y += node_over_state(states, readers[..., part])
    return y[levels.inverse].to(x.dtype), states if block == size else weight.new_empty(0)


@torch.library.register_fake("ssm::dag_scan_chunked_fwd")
def fake_forward(
    x: Tensor, weight: Tensor, B: Tensor, C: Tensor, topology: list[Tensor], reverse: bool, max_state_bytes: int
) -> tuple[Tensor, Tensor]:
    """What compilers are told of the forward op, in whatever implementation."""
    block = state_block(x, weight, B.shape[2], max_state_bytes)
    states = weight.new_empty(*x.shape, B.shape[2]) if block == B.shape[2] else weight.new_empty(0)
    return torch.empty_like(x, memory_format=torch.contiguous_format), states


@operator("dag_scan_chunked_bwd")
def _backward(
    x: Tensor,
    weight: Tensor,
    B: Tensor,
    C: Tensor,
    kept: Tensor,
    dy: Tensor,
    topology: list[Tensor],
    reverse: bool,
    max_state_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    levels, wide = _Levels(topology), weight.dtype
    inputs, keys, readers, outer = (tensor[levels.perm].to(wide).contiguous() for tensor in (x, B, C, dy))
    by_scan = weight[levels.edge_perm]
    source, target = (levels.dst, levels.src) if reverse else (levels.src, levels.dst)
    wide_levels = len(source) >= _WIDE * (len(levels.level_ptr) - 1)
    groups, size = B.shape[1:]
    block = size if kept.numel() else state_block(x, weight, size, max_state_bytes)
    dx, dweight = torch.zeros_like(inputs), torch.zeros_like(by_scan)
    dB, dC = torch.empty_like(keys), torch.empty_like(readers)
    for n in range(0, size, block):
        part = slice(n, n + block)
        states = kept
        if not kept.numel():
            states = node_outer(inputs, keys[..., part])
            levels.propagate_(states, by_scan, reverse)
        gradients = node_outer(outer, readers[..., part])
        products = levels.propagate_(gradients, by_scan, not reverse, states if wide_levels else None)
        dx += node_over_state(gradients, keys[..., part])
        dB[..., part] = node_over_heads(gradients, inputs, groups)
        dC[..., part] = node_over_heads(states, outer, groups)
        if wide_levels:
            dweight += products
            continue
        for e in range(0, len(source), _EDGES_AT_ONCE):
            edges = slice(e, e + _EDGES_AT_ONCE)
            dweight[edges] += (states[source[edges]] * gradients[target[edges]]).flatten(2).sum(2)
    dedges = torch.empty_like(dweight)
    dedges[levels.edge_perm] = dweight
    places = levels.inverse
    return dx[places].to(x.dtype), dedges, dB[places].to(B.dtype), dC[places].to(C.dtype)


@torch.library.register_fake("ssm::dag_scan_chunked_bwd")
def fake_backward(
    x: Tensor,
    weight: Tensor,
    B: Tensor,
    C: Tensor,
    kept: Tensor,
    dy: Tensor,
    topology: list[Tensor],
    reverse: bool,
    max_state_bytes: int,
) -> tuple[Tensor, ...]:
    """What they are told of the backward op."""
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, weight, B, C))


class DagScan(torch.autograd.Function):
    """The forward op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, B: Tensor, C: Tensor, topology: list[Tensor], reverse: bool, max_state_bytes: int
    ) -> tuple[Tensor, Tensor]:
        return _forward(x, weight, B, C, topology, reverse, max_state_bytes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, B, C, ctx.topology, ctx.reverse, ctx.max_state_bytes = inputs
        ctx.save_for_backward(x, weight, B, C, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dstates: Tensor | None) -> tuple[Any, ...]:
        return DagScan.gradients(DagScanGradient, ctx, dy)

    @staticmethod
    def gradients(function: type[FirstDerivative], ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        """What `backward` returns, from the function that computes it."""
        x, weight, B, C, kept = ctx.saved_tensors
        if dy is None:
            return None, None, None, None, None, None, None
        found = apply(function, x, weight, B, C, kept, dy, ctx.topology, ctx.reverse, ctx.max_state_bytes)
        return *found, None, None, None


class DagScanGradient(FirstDerivative):
    name = "dag_scan"

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _backward(*arguments)
