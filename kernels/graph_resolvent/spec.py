"""Inputs and sizes of `graph_resolvent` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ..testing import BenchSize, OpSpec
from .edges import graph_edges
from .op import graph_resolvent


def make_inputs(
    v: int,
    e: int,
    h: int,
    p: int,
    n: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
    g: int = 1,
    graphs: int = 1,
    gamma: float = 0.9,
    signed: bool = False,
    method: str = "dense",
    tol: float = 3e-6,
) -> dict[str, Any]:
    """A random directed graph (or several of equal size); the weights that leave a node sum to `gamma` at most."""
    like: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    wide = like | {"dtype": torch.promote_types(dtype, torch.float32)}
    size = v // graphs
    offset = torch.randint(0, graphs, (e,), device=device, generator=generator) * size
    edge_index = offset + torch.randint(0, size, (2, e), device=device, generator=generator)
    weight = torch.rand(e, h, **wide) + 0.1
    sums = weight.new_zeros(v, h).index_add(0, edge_index[0], weight)[edge_index[0]]
    weight = gamma * weight / sums
    sign = torch.where(torch.rand(e, 1, **wide) < 0.5, -1.0, 1.0)
    starts = torch.arange(graphs + 1) * size
    starts[-1] = v
    return {
        "x": torch.randn(v, h, p, **like),
        "edge_decay": weight * sign if signed else weight.log(),
        "B": torch.randn(v, g, n, **like),
        "C": torch.randn(v, g, n, **like),
        "edge_index": edge_index,
        "edges": graph_edges(edge_index, v, ptr=starts),
        "signed": signed,
        "method": method,
        "tol": tol,
    }


SPEC = OpSpec(
    op=graph_resolvent,
    make_inputs=make_inputs,
    outputs=("y",),
    test_sizes=(
        {"v": 1, "e": 0, "h": 1, "p": 1, "n": 1},
        {"v": 60, "e": 90, "h": 2, "p": 3, "n": 2, "graphs": 3},
        {"v": 61, "e": 120, "h": 4, "p": 4, "n": 8, "g": 2, "graphs": 2, "method": "iterative"},
        {"v": 40, "e": 100, "h": 2, "p": 2, "n": 5, "signed": True},
        {"v": 40, "e": 0, "h": 2, "p": 3, "n": 2, "method": "iterative"},
    ),
    bench_sizes=(
        BenchSize({"v": 4096, "e": 16384, "h": 4, "p": 16, "n": 16, "graphs": 32}),
        BenchSize({"v": 2708, "e": 10556, "h": 4, "p": 16, "n": 16, "method": "iterative", "tol": 1e-5}),
    ),
    cpu_bench_sizes=(
        BenchSize({"v": 512, "e": 2048, "h": 4, "p": 16, "n": 16, "graphs": 8}),
        BenchSize({"v": 2708, "e": 10556, "h": 1, "p": 8, "n": 8, "method": "iterative", "tol": 1e-5}),
    ),
    implementations=("reference", "chunked"),
    free=("x",),
)
