"""`graph_resolvent`: the state-space fixed point on graphs with cycles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from ..checks import check_devices, check_floating, check_shapes
from ..dag_scan.op import dag_scan
from ..dispatch import Backend, choose
from .dense import dense, series
from .edges import LARGEST_DENSE, GraphEdges
from .iterative import iterative
from .reference import graph_resolvent_reference

Method = Literal["auto", "dag", "dense", "series", "iterative"]


def graph_resolvent(
    x: Tensor,
    edge_decay: Tensor,
    B: Tensor,
    C: Tensor,
    edge_index: Tensor,
    edges: GraphEdges,
    *,
    method: Method = "auto",
    signed: bool = False,
    tol: float = 1e-5,
    max_iter: int | None = None,
    spectral_bound: float | None = None,
    terms: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """State-space model on any graph: states are the fixed point of adding up the neighbours' weighted states.

        S_v = x_v B_v^T + sum_{u->v} a_uv S_u,   y_v = S_v C_v,   a = exp(edge_decay);   y = ((I - A)^{-1} * (C B^T)) x

    Args:
        x: Input of each node, (v, h, p).
        edge_decay: Logarithm of each edge's weight, (e, h); the weight itself if `signed`.
        B: Input map of each node, (v, g, n); h is a multiple of g, and the heads of a group share it.
        C: Output map of each node, (v, g, n).
        edge_index: Source and target of each edge, (2, e) integers; parallel edges add up.
        edges: `graph_edges(edge_index, v, ptr=...)`, on the same device.
        method: "auto" (see `choose_method`); "dag": `dag_scan`, for graphs without cycles; "dense": exact, by
            dense matrices of the graphs' sizes; "series": the first terms of sum A^k; "iterative": fixed-point
            iteration, whose error is at most `tol` times the norm of the graph's x B^T.
        signed: `edge_decay` is the weight, of any sign.
        tol: Tolerance of the iteration.
        max_iter: Most iterations; None: as many as weights that sum to this much can need, at most 2,000.
        spectral_bound: For the iteration, where the spectral norm of the weights is known to be at most this, below 1,
            and their sums may be larger: norms are Euclidean, and symmetric weights (a_uv = a_vu) are solved by
            conjugate gradients. None: the sums bound the weights.
        terms: Terms of the series, rounded up to a power of two; None: as many as each graph's diameter (its longest
            path if it has no cycle) asks for.
        backend: "auto", "reference" or "chunked"; see `omnissm.kernels.use_backend`. The reference is the dense
            inverse, whatever the method.

    Returns:
        y, (v, h, p) in the dtype of `x`.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if shapes or devices disagree, an option is unknown, `edges` are those of another graph, the method
            is "dag" and there is a cycle, or the weights of an iteration do not sum to less than 1 (do not keep
            `spectral_bound`).
        ConvergenceError: if the iteration does not reach `tol`.
        BackendError: if `backend` is named explicitly and cannot run here, or a second derivative of an iteration is
            asked for.

    Solves run in float32 (float64 for float64 inputs), never in TF32 or 16 bit, under autocast too. Differentiable in
    x, edge_decay, B and C. A graph's result does not depend on its neighbours in the batch.
    Source: Lahoti, Marwah, Puduppully & Gu (2025), "Chimera: State Space Models Beyond Sequences", section 3.
    """
    check_floating(x=x, edge_decay=edge_decay, B=B, C=C)
    sizes = check_shapes(
        x=(x, "v h p"), edge_decay=(edge_decay, "e h"), B=(B, "v g n"), C=(C, "v g n"), edge_index=(edge_index, "2 e")
    )
    if edge_index.is_floating_point():
        raise TypeError(f"`edge_index` must be an integer tensor, got {edge_index.dtype}.")
    if not isinstance(edges, GraphEdges):
        raise TypeError(f"`edges` must be GraphEdges from graph_edges(edge_index, v), got {type(edges).__name__}.")
    check_devices(x=x, edge_decay=edge_decay, B=B, C=C, edge_index=edge_index, edges=edges.src)
    heads, groups = sizes["h"], sizes["g"]
    if (edges.num_nodes, edges.num_edges) != (sizes["v"], sizes["e"]):
        raise ValueError(
            f"`edges` has {edges.num_nodes} nodes and {edges.num_edges} edges, expected {sizes['v']} and {sizes['e']}; "
            "make it with graph_edges(edge_index, v) from the same graph."
        )
    if groups == 0 or heads % groups:
        raise ValueError(f"`B` has g={groups}, expected a divisor of h={heads} (from `x`).")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}.")
    if tol <= 0 or (max_iter is not None and max_iter < 1) or (terms is not None and terms < 1):
        raise ValueError(f"tol, max_iter and terms must be positive, got {tol}, {max_iter} and {terms}.")
    if spectral_bound is not None and not 0 < spectral_bound < 1:
        raise ValueError(f"spectral_bound must lie between 0 and 1, got {spectral_bound}.")
    if x.numel() == 0 or sizes["n"] == 0:
        return torch.zeros_like(x)
    by_size = method == "auto"
    method = choose_method(edges)[0] if by_size else method
    if method == "dag" and edges.order is None:
        raise ValueError("method='dag' needs graphs without cycles; use 'dense' or 'iterative'.")
    implementation = choose(backend, x, op="graph_resolvent", implementations=("reference", "chunked"))
    with _full_precision(x):
        if method == "dag" and implementation != "reference":
            assert edges.order is not None
            return dag_scan(x, edge_decay, B, C, edge_index, edges.order, signed=signed, backend=backend)
        dtype = torch.float32
        for tensor in (x, edge_decay, B, C):
            dtype = torch.promote_types(dtype, tensor.dtype)
        weight = edge_decay.to(dtype)
        weight = weight if signed else weight.exp()
        if implementation == "reference":
            return graph_resolvent_reference(x, weight, B, C, edges)
        values, B, C = x.to(dtype), B.to(dtype), C.to(dtype)
        match method:
            case "dense":
                y = dense(values, weight, B, C, edges)
            case "series":
                y = series(values, weight, B, C, edges, terms)
            case _:
                nodes = edges.ptr.diff()
                large = nodes > LARGEST_DENSE
                mixed = by_size and bool((~large & (nodes > 0)).any())
                y = iterative(values, weight, B, C, edges, tol, max_iter, spectral_bound, large if mixed else None)
                if mixed:  # a small graph is solved as it would be alone
                    y = y + dense(values, weight, B, C, edges, LARGEST_DENSE)
        return y.to(x.dtype)


def choose_method(edges: GraphEdges) -> tuple[Method, str]:
    """The method that "auto" takes for a batch of graphs, and why; with "iterative", small graphs are still solved
    densely."""
    if edges.order is not None:
        return "dag", "no graph has a cycle"
    if edges.largest <= LARGEST_DENSE:
        return "dense", f"the largest graph has {edges.largest} nodes, at most {LARGEST_DENSE}"
    return "iterative", f"the largest graph has {edges.largest} nodes, more than {LARGEST_DENSE}"


@contextlib.contextmanager
def _full_precision(x: Tensor) -> Iterator[None]:
    """No autocast and no TF32: the solve loses what they round."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    with torch.autocast(x.device.type, enabled=False):
        if not before:
            yield
            return
        matmul.allow_tf32 = False
        try:
            yield
        finally:
            matmul.allow_tf32 = before
