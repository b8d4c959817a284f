"""Inputs and sizes of `causal_conv1d` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ..testing import BenchSize, OpSpec
from .op import causal_conv1d


def make_inputs(
    b: int,
    l: int,  # noqa: E741
    c: int,
    k: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
    state: bool = False,
    bias: bool = True,
    symmetric: bool = False,
    packed: bool = False,
    activation: str | None = "silu",
) -> dict[str, Any]:
    """Normal inputs, weights of the usual initial size; parameters are float32 beside 16-bit inputs."""
    like: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    wide = like | {"dtype": torch.promote_types(dtype, torch.float32)}
    inputs: dict[str, Any] = {
        "x": torch.randn(b, l, c, **like),
        "weight": torch.randn(c, k, **wide) * k**-0.5,
        "symmetric": symmetric,
        "activation": activation,
    }
    if bias:
        inputs["bias"] = torch.randn(c, **wide)
    if state:
        inputs["initial_state"] = torch.randn(b, c, k - 1, **like)
    if packed:
        starts = torch.rand(b, l, device=generator.device, generator=generator) < 0.2
        inputs["seq_idx"] = starts.cumsum(1).to(torch.int32)
    return inputs


SPEC = OpSpec(
    op=causal_conv1d,
    make_inputs=make_inputs,
    outputs=("y", "final_state"),
    test_sizes=(
        {"b": 1, "l": 1, "c": 1, "k": 1},
        {"b": 2, "l": 63, "c": 5, "k": 4},
        {"b": 2, "l": 64, "c": 16, "k": 4, "state": True},
        {"b": 1, "l": 65, "c": 33, "k": 2, "bias": False, "activation": None},
        {"b": 2, "l": 37, "c": 6, "k": 7, "symmetric": True, "packed": True},
        {"b": 2, "l": 3, "c": 4, "k": 8, "state": True},
        {"b": 2, "l": 50, "c": 3, "k": 4, "state": True, "packed": True},
    ),
    bench_sizes=(
        BenchSize({"b": 8, "l": 4096, "c": 2304, "k": 4}, torch.bfloat16, (0.14, 0.48), (0.11, 0.33)),
        BenchSize({"b": 8, "l": 4096, "c": 2304, "k": 4}, torch.float32),
    ),
    cpu_bench_sizes=(BenchSize({"b": 2, "l": 1024, "c": 256, "k": 4}),),
)
