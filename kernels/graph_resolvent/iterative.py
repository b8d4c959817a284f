"""The fixed point by iteration, for graphs too large for dense matrices, with implicit gradients.

    S <- x B^T + A S      until the change is below tol (1 - gamma) |x B^T|, so that the error is below tol |x B^T|
    G <- dy C^T + A^T G   the same against the edges, then the gradients of `dag_scan`

gamma, the largest sum of |A| over a node's outgoing (or incoming) edges, must be below 1; norms are those in which it
bounds A. Memory does not depend on the number of iterations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dag_scan.chunked import node_outer, node_over_heads, node_over_state
from ..dispatch import BackendError
from .edges import GraphEdges

_EDGES_AT_ONCE = 65536


class ConvergenceError(RuntimeError):
    """An iteration did not reach its tolerance; the message gives residual, bound and number of iterations."""


def iterative(x: Tensor, weight: Tensor, B: Tensor, C: Tensor, edges: GraphEdges, tol: float, max_iter: int) -> Tensor:
    """See the module; `weight` (e, h)."""
    y: Tensor = _Iterative.apply(x, weight[edges.edge_perm], B, C, edges, tol, max_iter)
    return y


class _Solver:
    """S = b + A S or S = b + A^T S for weights of sorted edges."""

    def __init__(self, weight: Tensor, edges: GraphEdges, tol: float, max_iter: int) -> None:
        self.weight, self.edges, self.tol, self.max_iter = weight, edges, tol, max_iter
        size = weight.detach().abs()
        zeros = size.new_zeros(edges.num_nodes, size.shape[1])
        columns = _largest(zeros.index_add(0, edges.src, size))
        rows = _largest(zeros.index_add(0, edges.dst, size))
        self.by_columns, self.gamma = columns <= rows, min(columns, rows)
        if not self.gamma < 1:
            raise ValueError(
                f"The iteration needs edge weights that sum to less than 1 over the edges that leave (or that enter) "
                f"each node; the largest sums are {columns:.4g} and {rows:.4g}. Normalise the weights, or use "
                "method='dense'."
            )

    def solve(self, b: Tensor, transposed: bool) -> Tensor:
        """Fixed point for a right-hand side (v, h, p, n)."""
        e = self.edges
        source, target, row_ptr, weight = e.src, e.dst, e.row_ptr, self.weight[..., None, None]
        if transposed:
            source, target = e.dst[e.out_perm], e.src[e.out_perm]
            row_ptr, weight = e.out_row_ptr, weight[e.out_perm]
        by_columns = self.by_columns is not transposed  # the sums over columns of A^T are those over rows of A
        bound = self.tol * (1 - self.gamma) * _norm(b, by_columns)
        states = b
        for _ in range(self.max_iter):
            moved = states[source] * weight
            if b.device.type == "cpu":
                new = b.index_add(0, target, moved)
            else:  # in a fixed order, which index_add has on a CPU only
                new = b + torch.segment_reduce(moved, "sum", offsets=row_ptr, axis=0, initial=0)
            change = _norm(new - states, by_columns)
            states = new
            if not bool((change > bound).any()):
                return states
        raise ConvergenceError(
            f"No fixed point within {self.max_iter} iterations: the last change is {float(change.max()):.2e}, "
            f"allowed {float(bound[change.argmax()]):.2e}, gamma {self.gamma:.4g}. Raise max_iter or tol, or use "
            "method='dense'."
        )


def _largest(sums: Tensor) -> float:
    return float(sums.max()) if sums.numel() else 0.0


def _norm(states: Tensor, by_columns: bool) -> Tensor:
    """Of each head, (h,): largest sum over the nodes of a state number, or largest state number."""
    size = states.abs()
    return (size.sum(0) if by_columns else size.amax(0)).flatten(1).amax(1)


class _Iterative(torch.autograd.Function):
    """Fixed point and its implicit gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, B: Tensor, C: Tensor, edges: GraphEdges, tol: float, max_iter: int
    ) -> Tensor:
        solver = _Solver(weight, edges, tol, max_iter)
        states = solver.solve(node_outer(x, B), False)
        ctx.save_for_backward(x, B, C, states)
        ctx.solver = solver
        return node_over_state(states, C)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise BackendError("graph_resolvent has no second derivative by iteration; use method='dense'.")
        x, B, C, states = ctx.saved_tensors
        solver: _Solver = ctx.solver
        gradients = solver.solve(node_outer(dy.contiguous(), C), True)
        e, groups = solver.edges, B.shape[1]
        pieces = [
            (states[e.src[i : i + _EDGES_AT_ONCE]] * gradients[e.dst[i : i + _EDGES_AT_ONCE]]).flatten(2).sum(2)
            for i in range(0, e.num_edges, _EDGES_AT_ONCE)
        ]
        dweight = torch.cat(pieces) if pieces else torch.zeros_like(solver.weight)
        dB, dC = node_over_heads(gradients, x, groups), node_over_heads(states, dy, groups)
        return node_over_state(gradients, B), dweight, dB, dC, None, None, None
