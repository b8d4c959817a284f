"""Inputs and sizes of `fft_conv` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ..testing import BenchSize, OpSpec
from .op import fft_conv


def make_inputs(
    b: int,
    l: int,  # noqa: E741
    c: int,
    k: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
    skip: bool = True,
    state: bool = False,
    ahead: bool = False,
    packed: bool = False,
) -> dict[str, Any]:
    """Normal inputs and kernels that fade over a third of their width; parameters are float32 beside 16-bit inputs."""
    like: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    wide = like | {"dtype": torch.promote_types(dtype, torch.float32)}
    fade = torch.exp(-3 * torch.arange(k, device=device, dtype=wide["dtype"]) / k) * k**-0.5
    inputs: dict[str, Any] = {"x": torch.randn(b, l, c, **like), "kernel": torch.randn(c, k, **wide) * fade}
    if skip:
        inputs["D"] = torch.randn(c, **wide)
    if state:
        inputs["initial_state"] = torch.randn(b, c, k - 1, **like)
    if ahead:
        inputs["kernel_ahead"] = torch.randn(c, k, **wide) * fade
    if packed:
        starts = torch.rand(b, l, device=generator.device, generator=generator) < 0.03
        inputs["seq_idx"] = starts.cumsum(1).to(torch.int32)
    return inputs


SPEC = OpSpec(
    op=fft_conv,
    make_inputs=make_inputs,
    outputs=("y", "final_state"),
    test_sizes=(
        {"b": 1, "l": 1, "c": 1, "k": 1},
        {"b": 2, "l": 63, "c": 5, "k": 63},
        {"b": 2, "l": 64, "c": 4, "k": 40, "state": True},
        {"b": 1, "l": 65, "c": 33, "k": 17, "skip": False},
        {"b": 2, "l": 37, "c": 6, "k": 37, "ahead": True},
        {"b": 2, "l": 3, "c": 4, "k": 9, "state": True},
        {"b": 2, "l": 150, "c": 3, "k": 100, "packed": True, "state": True},
        {"b": 2, "l": 131, "c": 3, "k": 131, "packed": True, "ahead": True},
    ),
    bench_sizes=(
        BenchSize({"b": 8, "l": 4096, "c": 1024, "k": 4096}, torch.float32),
        BenchSize({"b": 8, "l": 4096, "c": 1024, "k": 4096}, torch.bfloat16),
        BenchSize({"b": 1, "l": 131072, "c": 256, "k": 131072}, torch.float32),
    ),
    cpu_bench_sizes=(
        BenchSize({"b": 2, "l": 1024, "c": 128, "k": 1024}),
        BenchSize({"b": 2, "l": 1024, "c": 128, "k": 1024, "ahead": True}),
        BenchSize({"b": 2, "l": 1024, "c": 128, "k": 1024, "packed": True}),
    ),
    implementations=("reference", "chunked"),
)
