"""Inputs and sizes of `ema_scan` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ..testing import BenchSize, OpSpec
from .op import ema_scan


def make_inputs(
    b: int,
    l: int,  # noqa: E741
    d: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
    state: bool = False,
    packed: bool = False,
) -> dict[str, Any]:
    """Normal inputs and weights uniform in (0, 1), in float32 beside 16-bit inputs."""
    like: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    wide = like | {"dtype": torch.promote_types(dtype, torch.float32)}
    inputs: dict[str, Any] = {"x": torch.randn(b, l, d, **like), "p": torch.rand(b, l, **wide)}
    if state:
        inputs["initial_state"] = torch.randn(b, d, **wide)
    if packed:
        starts = torch.rand(b, l, device=generator.device, generator=generator) < 0.2
        inputs["seq_idx"] = starts.cumsum(1).to(torch.int32)
    return inputs


SPEC = OpSpec(
    op=ema_scan,
    make_inputs=make_inputs,
    outputs=("means", "final_state"),
    test_sizes=(
        {"b": 1, "l": 1, "d": 1},
        {"b": 2, "l": 63, "d": 5, "state": True},
        {"b": 2, "l": 64, "d": 16, "state": True, "packed": True},
        {"b": 1, "l": 129, "d": 33},
        {"b": 5, "l": 40, "d": 3, "packed": True},
    ),
    bench_sizes=(
        BenchSize({"b": 8, "l": 1024, "d": 1024}, torch.bfloat16, (0.12, 0.4), (0.02, 0.05)),
        BenchSize({"b": 1, "l": 32768, "d": 1024}, torch.bfloat16, (0.15, 0.5), (0.07, 0.2)),
    ),
    cpu_bench_sizes=(BenchSize({"b": 2, "l": 1024, "d": 256}),),
)
