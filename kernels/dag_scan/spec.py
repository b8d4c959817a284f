"""Inputs and sizes of `dag_scan` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ..testing import BenchSize, OpSpec
from .op import dag_scan
from .order import dag_order


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
    span: int | None = None,
    reverse: bool = False,
    signed: bool = False,
    max_state_bytes: int | None = None,
) -> dict[str, Any]:
    """A random DAG with numbered edges from lower to higher nodes (at most `span` apart), shuffled; weights below 1."""
    like: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    wide = like | {"dtype": torch.promote_types(dtype, torch.float32)}
    count = e if v > 1 else 0
    source = torch.randint(0, max(v - 1, 1), (count,), device=device, generator=generator)
    reach = torch.rand(count, device=device, generator=generator)
    distance = 1 + (reach * (v - 1 - source).clamp(max=span or v)).long()
    names = torch.randperm(v, device=device, generator=generator)
    edge_index = names[torch.stack([source, (source + distance).clamp(max=v - 1)])] if count else source.new_zeros(2, 0)
    weights = torch.rand(count, h, **wide) * 0.9 + 0.05
    return {
        "x": torch.randn(v, h, p, **like),
        "edge_decay": (weights - 0.5) if signed else weights.log(),
        "B": torch.randn(v, g, n, **like),
        "C": torch.randn(v, g, n, **like),
        "edge_index": edge_index,
        "order": dag_order(edge_index, v),
        "reverse": reverse,
        "signed": signed,
        "max_state_bytes": max_state_bytes,
    }


SPEC = OpSpec(
    op=dag_scan,
    make_inputs=make_inputs,
    outputs=("y",),
    test_sizes=(
        {"v": 1, "e": 0, "h": 1, "p": 1, "n": 1},
        {"v": 63, "e": 90, "h": 2, "p": 3, "n": 2},
        {"v": 64, "e": 120, "h": 4, "p": 4, "n": 8, "g": 2, "reverse": True},
        {"v": 64, "e": 100, "h": 2, "p": 2, "n": 5, "signed": True, "max_state_bytes": 2048},
        {"v": 40, "e": 0, "h": 2, "p": 3, "n": 2},
        {"v": 2, "e": 5, "h": 3, "p": 1, "n": 4, "g": 3},
    ),
    # Required: six times what moving every byte once takes.
    bench_sizes=(
        BenchSize({"v": 131072, "e": 262144, "h": 4, "p": 64, "n": 1}, required_ms=(0.55, 1.4)),
        BenchSize({"v": 1048576, "e": 1048576, "h": 1, "p": 64, "n": 1}, required_ms=(1.13, 2.86)),
        BenchSize({"v": 65536, "e": 131072, "h": 8, "p": 64, "n": 64, "span": 4096}),
        BenchSize({"v": 16384, "e": 31395, "h": 4, "p": 16, "n": 16}),
        BenchSize({"v": 8192, "e": 8192, "h": 4, "p": 64, "n": 1, "span": 64}),  # narrow levels: what one takes
    ),
    cpu_bench_sizes=(
        BenchSize({"v": 1024, "e": 1992, "h": 4, "p": 16, "n": 16}),
        BenchSize({"v": 4096, "e": 7505, "h": 4, "p": 16, "n": 16}),
    ),
    twice_differentiable=False,
    free=("x",),
)
