"""Inputs and sizes of `selective_scan` for tests and benchmarks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..linear_scan.spec import packed_rows
from ..testing import BenchSize, OpSpec
from .op import selective_scan


def make_inputs(
    b: int,
    l: int,  # noqa: E741
    d: int,
    n: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
    g: int | None = None,
    skip: bool = True,
    gate: bool = False,
    state: bool = False,
    packed: bool = False,
    window: int | None = None,
    complex_rates: bool = False,
) -> dict[str, Any]:
    """Steps log-uniform in [1e-3, 1e-1] and rates -1 to -n, as Mamba starts; dt, A, D and the state are float32."""
    like: dict[str, Any] = {"device": device, "generator": generator}
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=wide, **like)

    rates = -torch.arange(1.0, n + 1, dtype=wide, device=device).expand(d, n) * normal(d, n).mul(0.1).exp()
    if complex_rates:
        rates = torch.complex(rates, 10 * normal(d, n))
    log_dt = math.log(1e-3) + math.log(100.0) * torch.rand(b, l, d, dtype=wide, **like)
    maps = (b, l, n) if g is None else (b, l, g, n)
    inputs: dict[str, Any] = {
        "u": normal(b, l, d).to(dtype),
        "dt": log_dt.exp(),
        "A": rates,
        "B": normal(*maps).to(dtype),
        "C": normal(*maps).to(dtype),
        "window": window,
    }
    if skip:
        inputs["D"] = normal(d)
    if gate:
        inputs["z"] = normal(b, l, d).to(dtype)
    if state:
        inputs["initial_state"] = torch.complex(normal(b, d, n), normal(b, d, n)) if complex_rates else normal(b, d, n)
    if packed:
        inputs["seq_idx"] = packed_rows(b, l, generator)
    return inputs


SPEC = OpSpec(
    op=selective_scan,
    make_inputs=make_inputs,
    outputs=("y", "final_state"),
    test_sizes=(
        {"b": 1, "l": 1, "d": 1, "n": 1},
        {"b": 2, "l": 11, "d": 4, "n": 3, "g": 2, "gate": True, "state": True},
        {"b": 1, "l": 67, "d": 5, "n": 16, "skip": False, "state": True},
        {"b": 1, "l": 66, "d": 3, "n": 2, "packed": True, "state": True},
        {"b": 1, "l": 14, "d": 4, "n": 2, "g": 2, "packed": True, "window": 4},
        {"b": 2, "l": 33, "d": 3, "n": 4, "complex_rates": True, "state": True, "gate": True},
        {"b": 1, "l": 9, "d": 300, "n": 16},
        {"b": 1, "l": 11, "d": 128, "n": 32, "g": 2, "window": 8},
    ),
    bench_sizes=(
        BenchSize({"b": 8, "l": 2048, "d": 1536, "n": 16}, torch.bfloat16, (0.32, 1.6), (0.20, 1.0)),
        BenchSize({"b": 8, "l": 2048, "d": 1536, "n": 16}, torch.float32, (0.60, 2.2), (0.35, 1.4)),
        BenchSize({"b": 64, "l": 196, "d": 768, "n": 16}, torch.bfloat16, (0.20, 1.0), (0.08, 0.45)),
        BenchSize({"b": 1, "l": 131072, "d": 512, "n": 16}, torch.bfloat16, (1.1, 5.5), (0.7, 3.2)),
    ),
    cpu_bench_sizes=(
        BenchSize({"b": 2, "l": 2048, "d": 256, "n": 16}),
        BenchSize({"b": 2, "l": 1024, "d": 256, "n": 16}),
        BenchSize({"b": 1, "l": 4096, "d": 16, "n": 4}),
    ),
    not_triton=("complex_rates",),
)
