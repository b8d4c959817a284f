"""Inputs and sizes of `ssd` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ..testing import BenchSize, OpSpec
from .op import ssd


def make_inputs(
    b: int,
    l: int,  # noqa: E741
    h: int,
    p: int,
    n: int,
    g: int = 1,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
    regime: str = "initial",
    weight: bool = True,
    D: str | None = "head",
    state: bool = True,
    packed: bool = False,
    chunk_size: int | None = None,
) -> dict[str, Any]:
    """Normal inputs; decays as models start with ("initial"), half of them e^-112 ("strong"), or e^-1e-6 ("weak")."""
    like: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    wide = like | {"dtype": torch.promote_types(dtype, torch.float32)}
    dt = 10 ** (-3 + 2 * torch.rand(b, l, h, **wide))  # log-uniform in 1e-3 .. 1e-1
    rate = 1 + 15 * torch.rand(h, **wide)
    strong = torch.rand(b, l, h, **wide) < 0.5
    log_decay = {
        "initial": -dt * rate,
        "strong": torch.where(strong, -112.0, -0.04).to(dt),
        "weak": torch.full_like(dt, -1e-6),
    }[regime]
    inputs: dict[str, Any] = {
        "x": torch.randn(b, l, h, p, **like),
        "log_decay": log_decay,
        "B": torch.randn(b, l, g, n, **like),
        "C": torch.randn(b, l, g, n, **like),
    }
    if chunk_size is not None:
        inputs["chunk_size"] = chunk_size
    if weight:
        inputs["weight"] = dt
    if D is not None:
        inputs["D"] = torch.randn(*{"head": (h,), "position": (b, l, h)}[D], **wide)
    if state:
        inputs["initial_state"] = torch.randn(b, h, p, n, **wide)
    if packed:
        starts = torch.rand(b, l, device=generator.device, generator=generator) < 0.2
        inputs["seq_idx"] = starts.cumsum(1).to(torch.int32)
    return inputs


def _bench(
    required: tuple[float, float],
    stretch: tuple[float, float],
    required_mib: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **size: Any,
) -> BenchSize:
    return BenchSize(size | {"state": False}, dtype, required, stretch, required_mib)


SPEC = OpSpec(
    op=ssd,
    make_inputs=make_inputs,
    outputs=("y", "final_state"),
    test_sizes=(
        {"b": 1, "l": 1, "h": 1, "p": 1, "n": 1},
        {"b": 2, "l": 63, "h": 2, "p": 3, "n": 4, "chunk_size": 2},
        {"b": 2, "l": 64, "h": 4, "p": 8, "n": 16, "g": 2},
        {"b": 1, "l": 129, "h": 3, "p": 5, "n": 7, "weight": False, "D": None, "state": False},
        {"b": 2, "l": 70, "h": 3, "p": 4, "n": 3, "g": 3, "D": "position", "packed": True, "chunk_size": 16},
        {"b": 1, "l": 65, "h": 2, "p": 48, "n": 100, "regime": "strong", "state": False},
        {"b": 2, "l": 130, "h": 2, "p": 8, "n": 16, "regime": "strong", "packed": True, "state": False},
    ),
    bench_sizes=(
        _bench((0.30, 1.8), (0.20, 1.1), 352, b=8, l=4096, h=32, p=64, n=128),
        _bench((1.1, 4.6), (0.7, 3.0), dtype=torch.float32, b=8, l=4096, h=32, p=64, n=128),
        _bench((0.08, 0.5), (0.04, 0.25), b=64, l=196, h=12, p=64, n=64),
        _bench((0.14, 0.9), (0.09, 0.5), b=64, l=784, h=12, p=64, n=64),
        _bench((0.9, 3.6), (0.5, 2.2), 706, b=1, l=131072, h=16, p=64, n=64),
        _bench((4.8, 18.0), (2.8, 10.0), 3974, b=1, l=1048576, h=8, p=64, n=64),
    ),
    cpu_bench_sizes=(
        BenchSize({"b": 2, "l": 4096, "h": 8, "p": 64, "n": 64, "state": False}),
        BenchSize({"b": 2, "l": 1024, "h": 4, "p": 64, "n": 64, "state": False}),
        BenchSize({"b": 8, "l": 196, "h": 3, "p": 64, "n": 64, "state": False}),
    ),
)
