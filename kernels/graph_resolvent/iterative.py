"""The fixed point by iteration, for graphs too large for dense matrices, with implicit gradients.

    R <- A R, S <- S + R    from R = S = x B^T until |R| is below tol (1 - gamma) |x B^T|, so that the error is below
                            tol |x B^T|; the same from dy C^T against the edges, then the gradients of `dag_scan`

gamma, the largest sum of |A| over a node's outgoing (or incoming) edges, must be below 1; norms are those in which it
bounds A. With a given bound of the spectral norm they are Euclidean, and symmetric weights are solved by conjugate
gradients. Each graph of a batch has its own gamma and stops by itself. Memory does not depend on the number of
iterations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..dag_scan.chunked import node_outer, node_over_heads, node_over_state
from ..dispatch import BackendError
from .edges import GraphEdges

_EDGES_AT_ONCE = 65536
_MOST_ITERATIONS = 2000


class ConvergenceError(RuntimeError):
    """An iteration did not reach its tolerance; the message gives residual, bound and number of iterations."""


def iterative(
    x: Tensor,
    weight: Tensor,
    B: Tensor,
    C: Tensor,
    edges: GraphEdges,
    tol: float,
    max_iter: int | None,
    spectral_bound: float | None = None,
    wanted: Tensor | None = None,
) -> Tensor:
    """See the module; `weight` (e, h). Graphs that are not `wanted`, (graphs,), have zeros for an answer."""
    settings = edges, tol, max_iter, spectral_bound, wanted
    if wanted is None:
        y: Tensor = _Iterative.apply(x, weight[edges.edge_perm], B, C, settings)
        return y
    mask = wanted.to(x.device)[_graph_of(edges)].to(x.dtype)[:, None, None]
    return mask * _Iterative.apply(mask * x, weight[edges.edge_perm], B, C, settings)


class _Solver:
    """S = b + A S or S = b + A^T S for weights of sorted edges."""

    def __init__(
        self,
        weight: Tensor,
        edges: GraphEdges,
        tol: float,
        max_iter: int | None,
        spectral_bound: float | None,
        wanted: Tensor | None,
    ) -> None:
        self.weight, self.edges, self.tol, self.max_iter = weight, edges, tol, max_iter
        self.graph, self.ptr = _graph_of(edges), edges.ptr.to(weight.device)
        self.spectral = spectral_bound is not None
        if spectral_bound is not None:
            self.gamma = weight.new_full((len(edges.ptr) - 1,), spectral_bound)
            self.symmetric = _is_symmetric(weight, edges)
            return
        size = weight.detach().abs()
        zeros = size.new_zeros(edges.num_nodes, size.shape[1])
        columns = self._over_graphs(zeros.index_add(0, edges.src, size), "max").amax(1)
        rows = self._over_graphs(zeros.index_add(0, edges.dst, size), "max").amax(1)
        if wanted is not None:
            columns, rows = (torch.where(wanted.to(sums.device), sums, 0) for sums in (columns, rows))
        self.by_columns, self.gamma = columns <= rows, torch.minimum(columns, rows)
        self.alike = bool((self.by_columns == self.by_columns[:1]).all())
        worst = int(self.gamma.argmax()) if self.gamma.numel() else 0
        if self.gamma.numel() and not float(self.gamma[worst]) < 1:
            raise ValueError(
                f"The iteration needs edge weights that sum to less than 1 over the edges that leave (or that enter) "
                f"each node; the largest sums are {float(columns[worst]):.4g} and {float(rows[worst]):.4g}. Normalise "
                "the weights, or use method='dense'."
            )

    def solve(self, b: Tensor, transposed: bool) -> Tensor:
        """Fixed point for a right-hand side (v, h, p, n)."""
        gamma = float(self.gamma.max()) if self.gamma.numel() else 0.0
        if self.spectral and self.symmetric:
            return self._conjugate_gradients(b, transposed, gamma)
        by_columns = None if self.spectral else self.by_columns ^ transposed
        bound = self.tol * (1 - self.gamma)[:, None] * self._norm(b, by_columns)
        states, change, limit = b, b, self.max_iter or _needed(self.tol, gamma)
        unfinished = torch.ones_like(self.gamma, dtype=torch.bool)
        for _ in range(limit):
            # By themselves changes shrink to any bound; as differences of states they would end at their rounding.
            change = self._moved(change, transposed)
            if len(self.gamma) > 1:  # a graph that has stopped stays as it is, whatever the others need
                change = torch.where(unfinished[self.graph][:, None, None, None], change, 0)
            states = states + change
            size = self._norm(change, by_columns)
            unfinished = unfinished & (size > bound).any(1)
            if not bool(unfinished.any()):
                return states
        raise _not_converged(size, bound, gamma, limit)

    def _conjugate_gradients(self, b: Tensor, transposed: bool, gamma: float) -> Tensor:
        """For symmetric weights; each column of states of a graph is a system of its own, and stops by itself."""
        rest = self._moved(b, transposed)  # of b - (I - A) S at S = b
        states, direction, limit = b, rest, self.max_iter or _MOST_ITERATIONS
        bound = self.tol * (1 - self.gamma)[:, None, None, None] * self._norm(b, None, columns=True)
        square = self._over_graphs(rest * rest, "sum")
        for _ in range(limit):
            unfinished = square > bound * bound
            if not bool(unfinished.any()):
                return states
            image = direction - self._moved(direction, transposed)
            curvature = self._over_graphs(direction * image, "sum")
            if bool((unfinished & (curvature <= 0)).any()):
                raise ValueError(f"The spectral norm of the weights is not below spectral_bound={gamma:.4g}.")
            step = torch.where(unfinished, square / curvature, 0)[self.graph]
            states, rest = states + step * direction, rest - step * image
            before, square = square, self._over_graphs(rest * rest, "sum")
            direction = rest + torch.where(unfinished, square / before, 0)[self.graph] * direction
        raise _not_converged(square.sqrt().flatten(2).amax(2), bound.flatten(2).amin(2), gamma, limit)

    def _moved(self, states: Tensor, transposed: bool) -> Tensor:
        """A S, or A^T S."""
        e = self.edges
        source, target, row_ptr, weight = e.src, e.dst, e.row_ptr, self.weight[..., None, None]
        if transposed:
            source, target = e.dst[e.out_perm], e.src[e.out_perm]
            row_ptr, weight = e.out_row_ptr, weight[e.out_perm]
        moved = states[source] * weight
        if states.device.type == "cpu":
            return torch.zeros_like(states).index_add(0, target, moved)
        # in a fixed order, which index_add has on a CPU only
        return torch.segment_reduce(moved, "sum", offsets=row_ptr, axis=0, initial=0)

    def _over_graphs(self, values: Tensor, reduce: str) -> Tensor:
        """Sum or maximum over the nodes of each graph, (graphs, ...)."""
        return torch.segment_reduce(values, reduce, offsets=self.ptr, axis=0, initial=0)

    def _norm(self, states: Tensor, by_columns: Tensor | None, columns: bool = False) -> Tensor:
        """Of each graph and head, (graphs, h): the largest of a column of states, or with `columns` of each of them.

        The norm is the sum of sizes where `by_columns`, the largest size elsewhere, the Euclidean one for None.
        """
        if by_columns is None:
            size = self._over_graphs(states * states, "sum").sqrt()
        elif self.alike:
            size = self._over_graphs(states.abs(), "sum" if bool(by_columns[:1].all()) else "max")
        else:
            sums, largest = (self._over_graphs(states.abs(), reduce) for reduce in ("sum", "max"))
            size = torch.where(by_columns[:, None, None, None], sums, largest)
        return size if columns else size.flatten(2).amax(2)


def _graph_of(edges: GraphEdges) -> Tensor:
    """Graph of each node, (v,)."""
    sizes = edges.ptr.diff()
    graph = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    return graph.to(edges.src.device)


def _needed(tol: float, gamma: float) -> int:
    """Iterations after which a contraction by gamma is below the bound, at most 2,000."""
    if not 0 < gamma < 1:
        return 2
    return min(_MOST_ITERATIONS, 10 + math.ceil(math.log(tol * (1 - gamma)) / math.log(gamma)))


def _is_symmetric(weight: Tensor, edges: GraphEdges) -> bool:
    """Whether A equals its transpose up to rounding; parallel edges are added up."""
    mirrored = edges.out_perm
    if not (torch.equal(edges.src, edges.dst[mirrored]) and torch.equal(edges.dst, edges.src[mirrored])):
        return False
    new = (edges.src.diff() != 0) | (edges.dst.diff() != 0)
    pair = torch.cat([new.new_zeros(min(1, edges.num_edges)), new]).cumsum(0)
    zeros = torch.zeros_like(weight)
    sums, others = zeros.index_add(0, pair, weight), zeros.index_add(0, pair, weight[mirrored])
    return bool(((sums - others).abs() <= 1e-5 * sums.abs().amax(0)).all())


def _not_converged(change: Tensor, bound: Tensor, gamma: float, limit: int) -> ConvergenceError:
    worst = int((change / bound.clamp(min=torch.finfo(bound.dtype).tiny)).argmax())
    return ConvergenceError(
        f"No fixed point within {limit} iterations: the last change is {float(change.flatten()[worst]):.2e}, "
        f"allowed {float(bound.flatten()[worst]):.2e}, gamma {gamma:.4g}. Raise max_iter or tol, or use "
        "method='dense'."
    )


class _Iterative(torch.autograd.Function):
    """Fixed point and its implicit gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, B: Tensor, C: Tensor, settings: tuple[Any, ...]) -> Tensor:
        solver = _Solver(weight, *settings)
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
        return node_over_state(gradients, B), dweight, dB, dC, None
