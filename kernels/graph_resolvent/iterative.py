"""The fixed point by iteration, for graphs too large for dense matrices, with implicit gradients.

    R <- A R, S <- S + R    from R = S = x B^T until |R| is below tol (1 - gamma) |x B^T|, so that the error is below
                            tol |x B^T|; the same from dy C^T against the edges, then the gradients of `dag_scan`

gamma, the largest sum of |A| over a node's outgoing (or incoming) edges, must be below 1; norms are those in which it
bounds A. With a given bound of the spectral norm they are Euclidean, and graphs of symmetric weights are solved by
conjugate gradients. Each graph of a batch has its own gamma and stops by itself. A NaN or an infinity makes its column
of states NaN in all of its graph. Memory does not depend on the number of iterations.
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
        self.edges, self.tol, self.max_iter = edges, tol, max_iter
        self.graph, self.ptr = _graph_of(edges), edges.ptr.to(weight.device)
        self.spectral = spectral_bound is not None
        wrong = ~weight.isfinite() if self.spectral else weight.isnan()
        self.broken = _over_edges(wrong, edges)
        self.weight = torch.where(wrong, 0, weight)
        if spectral_bound is not None:
            self.gamma = weight.new_full((len(edges.ptr) - 1,), spectral_bound)
            self.symmetric = _are_symmetric(self.weight, edges)
            return
        size = self.weight.abs()
        columns = torch.segment_reduce(size[edges.out_perm], "sum", offsets=edges.out_row_ptr, axis=0, initial=0)
        rows = torch.segment_reduce(size, "sum", offsets=edges.row_ptr, axis=0, initial=0)
        columns, rows = (self._over_graphs(sums, "max").amax(1) for sums in (columns, rows))
        if wanted is not None:
            columns, rows = (torch.where(wanted.to(sums.device), sums, 0) for sums in (columns, rows))
        self.by_columns, self.gamma = columns <= rows, torch.minimum(columns, rows)
        choices = self.by_columns.unique().tolist()
        self.all_by_columns = choices[0] if len(choices) == 1 else None
        worst = int(self.gamma.argmax()) if self.gamma.numel() else 0
        if self.gamma.numel() and not float(self.gamma[worst]) < 1:
            raise ValueError(
                f"The iteration needs edge weights that sum to less than 1 over the edges that leave (or that enter) "
                f"each node; the largest sums are {float(columns[worst]):.4g} and {float(rows[worst]):.4g}. Normalise "
                "the weights, or use method='dense'."
            )

    def solve(self, b: Tensor, transposed: bool) -> Tensor:
        """Fixed point for a right-hand side (v, h, p, n)."""
        largest = self._over_graphs(b.abs(), "max")
        broken = (~largest.isfinite() | self.broken[..., None, None])[self.graph]
        b = torch.where(broken, 0, b)  # a NaN would end the iteration of all columns, since it is above no bound
        if not self.spectral:
            states = self._steps(b, transposed)
        else:  # of sizes near 1, whose squares are numbers
            size = torch.where(largest.isfinite(), largest, 0).amax((2, 3), keepdim=True)
            size = torch.where(size == 0, 1, size)[self.graph]
            chosen = self.symmetric[self.graph][:, None, None, None]
            states = b = b / size
            if bool(self.symmetric.any()):
                states = self._conjugate_gradients(torch.where(chosen, b, 0), transposed)
            if not bool(self.symmetric.all()):
                states = torch.where(chosen, states, self._steps(torch.where(chosen, 0, b), transposed))
            states = states * size
        return torch.where(broken, math.nan, states)

    def _steps(self, b: Tensor, transposed: bool) -> Tensor:
        """By adding up R <- A R."""
        gamma = float(self.gamma.max()) if self.gamma.numel() else 0.0
        bound = self.tol * (1 - self.gamma)[:, None] * self._norm(b, transposed).flatten(2).amax(2)
        states, change, limit = b, b, self.max_iter or _needed(self.tol, gamma)
        unfinished = torch.ones_like(self.gamma, dtype=torch.bool)
        for _ in range(limit):
            # By themselves changes shrink to any bound; as differences of states they would end at their rounding.
            change = self._moved(change, transposed)
            if len(self.gamma) > 1:  # a graph that has stopped stays as it is, whatever the others need
                change = torch.where(unfinished[self.graph][:, None, None, None], change, 0)
            states = states + change
            size = self._norm(change, transposed).flatten(2).amax(2)
            unfinished = unfinished & (size > bound).any(1)
            if not bool(unfinished.any()):
                return states
        raise _not_converged(size, bound, gamma, limit)

    def _conjugate_gradients(self, b: Tensor, transposed: bool) -> Tensor:
        """For symmetric weights; each column of states of a graph is a system of its own, and stops by itself."""
        gamma = float(self.gamma.max())
        rest = self._moved(b, transposed)  # of b - (I - A) S at S = b
        states, direction, limit = b, rest, self.max_iter or _MOST_ITERATIONS
        bound = self.tol * (1 - self.gamma)[:, None, None, None] * self._norm(b, transposed)
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

    def _norm(self, states: Tensor, transposed: bool) -> Tensor:
        """Of each column of states, (graphs, h, p, n), in the norm that bounds A or A^T."""
        if self.spectral:
            return self._over_graphs(states * states, "sum").sqrt()
        if self.all_by_columns is not None:
            return self._over_graphs(states.abs(), "sum" if self.all_by_columns ^ transposed else "max")
        sums, largest = (self._over_graphs(states.abs(), reduce) for reduce in ("sum", "max"))
        return torch.where((self.by_columns ^ transposed)[:, None, None, None], sums, largest)


def _graph_of(edges: GraphEdges) -> Tensor:
    """Graph of each node, (v,)."""
    sizes = edges.ptr.diff()
    graph = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    return graph.to(edges.src.device)


def _needed(tol: float, gamma: float) -> int:
    """Iterations after which a contraction by gamma is below the bound, at most 2,000."""
    if not 0 < gamma < 1:
        return 2
    return min(_MOST_ITERATIONS, 10 + max(0, math.ceil(math.log(tol * (1 - gamma)) / math.log(gamma))))


def _over_edges(marks: Tensor, edges: GraphEdges) -> Tensor:
    """Whether any of a graph's edges is marked, (graphs, ...)."""
    ends = edges.row_ptr[edges.ptr.to(edges.row_ptr.device)]
    return torch.segment_reduce(marks.float(), "max", offsets=ends, axis=0, initial=0) > 0


def _are_symmetric(weight: Tensor, edges: GraphEdges) -> Tensor:
    """Whether A of a graph equals its transpose up to rounding, (graphs,); parallel edges are added up."""
    mirrored = edges.out_perm
    astray = (edges.src != edges.dst[mirrored]) | (edges.dst != edges.src[mirrored])
    new = (edges.src.diff() != 0) | (edges.dst.diff() != 0)
    pair = torch.cat([new.new_zeros(min(1, edges.num_edges)), new]).cumsum(0)
    zeros = torch.zeros_like(weight)
    sums, others = (zeros.index_add(0, pair, one)[pair] for one in (weight, weight[mirrored]))
    astray = astray | ((sums - others).abs() > 1e-5 * torch.maximum(sums, others).abs()).any(1)
    return ~_over_edges(astray, edges)


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
