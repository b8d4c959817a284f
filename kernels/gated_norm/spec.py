"""Inputs and sizes of `gated_norm` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ..testing import BenchSize, OpSpec
from .op import gated_norm


def make_inputs(
    r: int,
    d: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> dict[str, Any]:
    """Normal inputs and gates, weights around 1, in float32 beside 16-bit inputs."""
    like: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    wide = like | {"dtype": torch.promote_types(dtype, torch.float32)}
    return {
        "x": torch.randn(r, d, **like),
        "z": torch.randn(r, d, **like),
        "weight": 1 + 0.1 * torch.randn(d, **wide),
        "eps": eps,
        "group_size": group_size,
        "norm_before_gate": norm_before_gate,
    }


SPEC = OpSpec(
    op=gated_norm,
    make_inputs=make_inputs,
    outputs=("y",),
    test_sizes=(
        {"r": 1, "d": 1, "eps": 0.5},  # one channel normalises itself away, all gradients stem from eps
        {"r": 7, "d": 33, "norm_before_gate": True},
        {"r": 16, "d": 64},
        {"r": 37, "d": 60, "group_size": 20},
        {"r": 65, "d": 12, "group_size": 4, "norm_before_gate": True},
    ),
    bench_sizes=(
        BenchSize({"r": 32768, "d": 2048}, torch.bfloat16, (0.15, 0.45), (0.14, 0.40)),
        BenchSize({"r": 32768, "d": 2048}, torch.float32),
    ),
    cpu_bench_sizes=(BenchSize({"r": 2048, "d": 512}),),
)
