"""Inputs and sizes of `quasiseparable` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ..ssd.spec import make_inputs as make_ssd_inputs
from ..testing import BenchSize, OpSpec
from .op import quasiseparable


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
    state: bool = True,
    shift: bool = True,
    packed: bool = False,
    chunk_size: int | None = None,
) -> dict[str, Any]:
    """Inputs of `ssd` for both sides, with its regimes of decays, and a normal diagonal."""
    wide: dict[str, Any] = {"dtype": torch.promote_types(dtype, torch.float32), "device": device}
    inputs: dict[str, Any] = {}
    for side in ("f", "b"):
        one = make_ssd_inputs(
            b, l, h, p, n, g, dtype=dtype, device=device, generator=generator, regime=regime, weight=weight, D=None,
            state=False, packed=packed,
        )  # fmt: skip
        inputs |= {f"{name}_{side}": one.get(name) for name in ("log_decay", "weight", "B", "C")}
        inputs |= {name: one[name] for name in ("x", "seq_idx") if name in one}
    inputs["diag"] = torch.randn(b, l, h, generator=generator, **wide)
    if state:
        inputs["initial_state"] = torch.randn(2, b, h, p, n, generator=generator, **wide)
    return inputs | {"shift": shift, "chunk_size": chunk_size}


def _bench(
    required_ms: tuple[float, float], stretch_ms: tuple[float, float], required_mib: float | None = None, **size: int
) -> BenchSize:
    return BenchSize(size | {"state": False}, torch.bfloat16, required_ms, stretch_ms, required_mib)


SPEC = OpSpec(
    op=quasiseparable,
    make_inputs=make_inputs,
    outputs=("y", "final_state"),
    test_sizes=(
        {"b": 1, "l": 1, "h": 1, "p": 1, "n": 1},
        {"b": 2, "l": 63, "h": 2, "p": 3, "n": 2, "chunk_size": 16},
        {"b": 2, "l": 64, "h": 4, "p": 8, "n": 16, "g": 2},
        {"b": 1, "l": 65, "h": 3, "p": 5, "n": 7, "weight": False, "shift": False, "state": False},
        {"b": 2, "l": 70, "h": 3, "p": 4, "n": 3, "g": 3, "packed": True, "chunk_size": 16},
        {"b": 2, "l": 70, "h": 1, "p": 4, "n": 3, "packed": True, "shift": False},
        {"b": 1, "l": 130, "h": 2, "p": 8, "n": 16, "regime": "strong", "state": False},
    ),
    bench_sizes=(
        _bench((0.10, 0.6), (0.05, 0.30), b=64, l=196, h=12, p=64, n=64),
        _bench((0.40, 1.8), (0.22, 1.0), b=64, l=784, h=12, p=64, n=64),
        _bench((0.9, 3.7), (0.5, 2.2), 747, b=8, l=4096, h=32, p=64, n=128),
        _bench((1.8, 7.0), (1.0, 4.0), 1498, b=1, l=131072, h=16, p=64, n=64),
        _bench((8.0, 32.0), (5.0, 20.0), 7629, b=1, l=1048576, h=8, p=64, n=64),
    ),
    cpu_bench_sizes=(
        BenchSize({"b": 2, "l": 1024, "h": 4, "p": 64, "n": 64, "state": False}),
        BenchSize({"b": 8, "l": 196, "h": 3, "p": 64, "n": 64, "state": False}),
    ),
)
