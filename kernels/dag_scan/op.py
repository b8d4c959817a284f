"""`dag_scan`: the state-space recurrence over the nodes of directed acyclic graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import call_kind, check_devices, check_floating, check_shapes, known, remember
from ..dispatch import Backend, cast_for_autocast, choose
from .chains import dag_scan_of_chains
from .chunked import dag_scan_chunked
from .order import DagOrder
from .reference import dag_scan_reference

_LARGEST_STATE = 256
_LONG = 64


def dag_scan(
    x: Tensor,
    edge_decay: Tensor,
    B: Tensor,
    C: Tensor,
    edge_index: Tensor,
    order: DagOrder,
    *,
    reverse: bool = False,
    signed: bool = False,
    max_state_bytes: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Scan a batch of DAGs: every node adds up the states of its parents, each times the weight of its edge.

        S_v = x_v B_v^T + sum_{u->v} a_uv S_u,      y_v = S_v C_v,      a = exp(edge_decay)

    A path is the scan `ssd`; the result is that of the resolvent (I - A)^{-1}, with A[v, u] = a_uv, in time linear in
    nodes and edges.

    Args:
        x: Input of each node, (v, h, p).
        edge_decay: Logarithm of each edge's weight, (e, h); the weight itself if `signed`.
        B: Input map of each node, (v, g, n); h is a multiple of g, and the heads of a group share it.
        C: Output map of each node, (v, g, n).
        edge_index: Source and target of each edge, (2, e) integers; parallel edges add up.
        order: `dag_order(edge_index, v)`, on the same device.
        reverse: Scan against the edges: states flow from targets to sources.
        signed: `edge_decay` is the weight, of any sign.
        max_state_bytes: States are kept for backward if they fit this many bytes, and else computed again in blocks of
            this size. None: 64 MiB on a CPU, whose caches small blocks suit, and 1 GiB elsewhere, where each block
            launches its levels anew.
        backend: "auto", "reference", "chunked" or "triton"; see `omnissm.kernels.use_backend`.

    Returns:
        y, (v, h, p) in the dtype of `x`.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if shapes or devices disagree, or `order` is that of another graph.
        BackendError: if `backend` is named explicitly and cannot run here; Triton takes n <= 256.

    Sums are float32 (float64 for float64 inputs). Under autocast x, B and C are cast, weights are not. Differentiable
    in x, edge_decay, B and C; the reference also twice. A graph's result does not depend on its neighbours in the
    batch.
    Source: Lahoti, Marwah, Puduppully & Gu (2025), "Chimera: State Space Models Beyond Sequences", section 3.
    """
    if not isinstance(order, DagOrder):
        raise TypeError(f"`order` must be a DagOrder from dag_order(edge_index, v), got {type(order).__name__}.")
    kind = call_kind("dag_scan", x, edge_decay, B, C, edge_index, order.perm, order.num_nodes, order.num_edges)
    if not known(kind):
        _check(x, edge_decay, B, C, edge_index, order)
        remember(kind)
    x, B, C = cast_for_autocast(x, B, C)
    dtype = torch.float32
    for tensor in (x, edge_decay, B, C):
        dtype = torch.promote_types(dtype, tensor.dtype)
    weight = edge_decay if edge_decay.dtype == dtype else edge_decay.to(dtype)
    if not signed:
        weight = weight.exp()
    n = B.shape[2]
    if x.numel() == 0 or n == 0:
        return torch.zeros_like(x)
    if max_state_bytes is None:
        max_state_bytes = 2**26 if x.device.type == "cpu" else 2**30
    obstacle = None if n <= _LARGEST_STATE else f"Triton takes n up to {_LARGEST_STATE}, got n={n}"
    match choose(backend, x, op="dag_scan", obstacle=obstacle):
        case "reference":
            return dag_scan_reference(x, weight, B, C, edge_index, order, reverse)
        case "triton":
            from .triton_impl import dag_scan_triton

            return dag_scan_triton(x, weight, B, C, order, reverse, max_state_bytes)
        case _:
            if not signed and _is_long_line(edge_decay, order):
                return dag_scan_of_chains(x, edge_decay.to(dtype), B, C, edge_index, order, reverse)
            return dag_scan_chunked(x, weight, B, C, order, reverse, max_state_bytes)


def _check(x: Tensor, edge_decay: Tensor, B: Tensor, C: Tensor, edge_index: Tensor, order: DagOrder) -> None:
    check_floating(x=x, edge_decay=edge_decay, B=B, C=C)
    sizes = check_shapes(
        x=(x, "v h p"), edge_decay=(edge_decay, "e h"), B=(B, "v g n"), C=(C, "v g n"), edge_index=(edge_index, "2 e")
    )
    if edge_index.is_floating_point():
        raise TypeError(f"`edge_index` must be an integer tensor, got {edge_index.dtype}.")
    check_devices(x=x, edge_decay=edge_decay, B=B, C=C, edge_index=edge_index, order=order.perm)
    nodes, heads, groups = sizes["v"], sizes["h"], sizes["g"]
    if (order.num_nodes, order.num_edges) != (nodes, sizes["e"]):
        raise ValueError(
            f"`order` has {order.num_nodes} nodes and {order.num_edges} edges, expected {nodes} and {sizes['e']}; "
            "make it with dag_order(edge_index, v) from the same graph."
        )
    if groups == 0 or heads % groups:
        raise ValueError(f"`B` has g={groups}, expected a divisor of h={heads} (from `x`).")


def _is_long_line(edge_decay: Tensor, order: DagOrder) -> bool:
    """Whether to scan chains as sequences: the host would wait for a level of one node after the other."""
    if order.kind != "chains" or order.num_levels < _LONG or torch.compiler.is_compiling():
        return False
    return edge_decay.device.type == "cpu" and bool((edge_decay <= 0).all())
