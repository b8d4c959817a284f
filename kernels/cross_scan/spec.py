"""Inputs and sizes of `cross_scan` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ..testing import BenchSize, OpSpec
from .op import cross_scan


def make_inputs(
    b: int,
    i: int,
    j: int,
    d: int,
    n: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
    skip: bool = True,
) -> dict[str, Any]:
    """Steps around 0.1 to 1 and rates around -1; rates and skips in float32 at least."""
    like: dict[str, Any] = {"device": device, "generator": generator}
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {
        "x": torch.randn(b, i, j, d, **like).to(dtype),
        "dt": F.softplus(torch.randn(b, 4, i, j, d, **like) - 1).to(dtype),
        "A": -(0.5 * torch.randn(4, d, n, **like)).exp().to(wide),
        "B": torch.randn(b, 4, i, j, n, **like).to(dtype),
        "C": torch.randn(b, 4, i, j, n, **like).to(dtype),
    }
    return inputs | ({"D": torch.randn(4, d, **like).to(wide)} if skip else {})


SPEC = OpSpec(
    op=cross_scan,
    make_inputs=make_inputs,
    outputs=("y",),
    test_sizes=(
        {"b": 1, "i": 1, "j": 1, "d": 1, "n": 1},
        {"b": 2, "i": 2, "j": 3, "d": 3, "n": 2},
        {"b": 1, "i": 3, "j": 1, "d": 2, "n": 1, "skip": False},
        {"b": 1, "i": 2, "j": 3, "d": 3, "n": 5},
    ),
    bench_sizes=(
        BenchSize({"b": 64, "i": 56, "j": 56, "d": 192, "n": 1}, torch.bfloat16, (0.7, 2.6), (0.3, 1.2), 621),
        BenchSize({"b": 64, "i": 14, "j": 14, "d": 768, "n": 16}, torch.bfloat16, (0.7, 3.0), (0.35, 1.5)),
        BenchSize({"b": 64, "i": 56, "j": 56, "d": 192, "n": 16}, torch.bfloat16, (2.8, 12.0), (1.4, 6.0)),
    ),
    cpu_bench_sizes=(BenchSize({"b": 4, "i": 14, "j": 14, "d": 96, "n": 1}),),
)
