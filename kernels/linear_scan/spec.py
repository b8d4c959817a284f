"""Inputs and sizes of `linear_scan` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..testing import BenchSize, OpSpec
from .op import linear_scan


def make_inputs(
    b: int,
    l: int,  # noqa: E741
    d: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
    decay: str = "full",
    reverse: bool = False,
    packed: bool = False,
    state: bool = True,
) -> dict[str, Any]:
    """Decays in (0, 1), normal inputs; `decay` is "full" (b, l, d), "position" (b, l, 1) or "channel" (d,)."""
    like: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    a = torch.rand(*{"full": (b, l, d), "position": (b, l, 1), "channel": (d,)}[decay], **like)
    inputs: dict[str, Any] = {"a": a, "b": torch.randn(b, l, d, **like), "reverse": reverse}
    if state:
        inputs["initial_state"] = torch.randn(b, d, **like)
    if packed:
        inputs["seq_idx"] = packed_rows(b, l, generator)
    return inputs


def packed_rows(b: int, l: int, generator: torch.Generator) -> Tensor:  # noqa: E741
    """Random sequence numbers (b, l), about one new sequence in five positions."""
    starts = torch.rand(b, l, device=generator.device, generator=generator) < 0.2
    return starts.cumsum(1).to(torch.int32)


SPEC = OpSpec(
    op=linear_scan,
    make_inputs=make_inputs,
    outputs=("states", "final"),
    test_sizes=(
        {"b": 1, "l": 1, "d": 1},
        {"b": 2, "l": 63, "d": 5, "reverse": True},
        {"b": 2, "l": 64, "d": 16, "state": False},
        {"b": 1, "l": 129, "d": 2},
        {"b": 1, "l": 9, "d": 33},
        {"b": 3, "l": 1, "d": 4, "decay": "channel"},
        {"b": 3, "l": 40, "d": 7, "decay": "position"},
        {"b": 2, "l": 65, "d": 7, "decay": "channel", "reverse": True},
        {"b": 2, "l": 70, "d": 3, "packed": True},
    ),
    bench_sizes=(
        BenchSize({"b": 8, "l": 4096, "d": 1536, "state": False}, torch.float32, (0.25, 0.67), (0.21, 0.56)),
        BenchSize({"b": 8, "l": 4096, "d": 1536, "state": False}, torch.bfloat16),
        BenchSize({"b": 1, "l": 131072, "d": 512, "state": False}, torch.float32),
    ),
    cpu_bench_sizes=(
        BenchSize({"b": 2, "l": 1024, "d": 256, "state": False}),
        BenchSize({"b": 32, "l": 96, "d": 512, "state": False}),
    ),
)
