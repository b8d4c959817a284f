"""Inputs and sizes of `scan2d`, `selective_scan2d` and `grid_scan` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..testing import BenchSize, OpSpec
from .grid import grid_scan
from .op import scan2d, selective_scan2d

GRIDS = ((1, 1), (1, 7), (7, 1), (5, 9), (7, 12), (21, 64))
SMALL_GRIDS = ((1, 1), (2, 3), (9, 1), (2, 5), (3, 2))  # what the interpreter of Triton can do


def make_state_inputs(
    b: int,
    i: int,
    j: int,
    d: int,
    n: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
    broadcast: bool = False,
) -> dict[str, Any]:
    """Contractions (|a1| + |a2| < 1, |a3| + |a4| < 1) and normal inputs; `broadcast`: the a's have n = 1."""
    like: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    shape = (b, i, j, d, 1 if broadcast else n)
    inputs: dict[str, Any] = {}
    for own, other in (("a1", "a2"), ("a4", "a3")):
        inputs[own] = torch.rand(shape, **like)
        inputs[other] = 0.9 * (1 - inputs[own]) * (2 * torch.rand(shape, **like) - 1)
    return {name: inputs[name] for name in ("a1", "a2", "a3", "a4")} | {
        name: torch.randn(b, i, j, d, n, **like) for name in ("b1", "b2")
    }


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
    g: int = 1,
    gap: bool = False,
    coupling: str = "full",
    input_discretization: str = "euler",
) -> dict[str, Any]:
    """Steps around 0.1 to 1 with decay rates around 1, so that neither state is trivial; `b` counts all groups."""
    like: dict[str, Any] = {"device": device, "generator": generator}

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, **like)

    inputs = {
        "x": normal(b, i, j, d),
        "dt1": F.softplus(normal(b, i, j, d) - 1),
        "dt2": F.softplus(normal(b, i, j, d) - 1),
        **{name: 0.5 * normal(g, d, n) for name in ("A1_log", "A4_log")},
        **{name: normal(g, d, n) for name in ("theta2", "theta3")},
        **{name: normal(b, i, j, n) for name in ("B1", "B2", "C1", "C2")},
        "D": normal(g, d),
    }
    if gap:
        inputs["time_gap"] = 1 + 3 * torch.rand(b // g, j, **like)
    options = {"coupling": coupling, "input_discretization": input_discretization}
    return {name: tensor.to(dtype) for name, tensor in inputs.items()} | options


def make_grid_inputs(
    b: int,
    i: int,
    j: int,
    d: int,
    n: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
    rule: str = "mean",
    flip: tuple[str, ...] = (),
    skip: bool = True,
) -> dict[str, Any]:
    """Steps around 0.1 to 1 with decay rates around 1; parameters and steps in float32 at least."""
    like: dict[str, Any] = {"device": device, "generator": generator}
    wide = torch.promote_types(dtype, torch.float32)
    inputs: dict[str, Any] = {"x": torch.randn(b, i, j, d, **like).to(dtype)}
    for axis in ("1", "2") if rule == "mean" else ("1",):
        inputs[f"dt{axis}"] = F.softplus(torch.randn(b, i, j, d, **like) - 1).to(dtype)
        inputs[f"A{axis}"] = -(0.5 * torch.randn(d, n, **like)).exp().to(wide)
        inputs[f"B{axis}"] = torch.randn(b, i, j, n, **like).to(dtype)
    inputs["C"] = torch.randn(b, i, j, n, **like).to(dtype)
    if skip:
        inputs["D"] = torch.randn(d, **like).to(wide)
    return inputs | {"rule": rule, "flip": flip}


GRID_SPEC = OpSpec(
    op=grid_scan,
    make_inputs=make_grid_inputs,
    outputs=("y",),
    test_sizes=(
        {"b": 1, "i": 1, "j": 1, "d": 1, "n": 1},
        {"b": 1, "i": 2, "j": 3, "d": 3, "n": 2, "flip": ("j",)},
        {"b": 1, "i": 3, "j": 5, "d": 5, "n": 3, "rule": "separable"},
        {"b": 1, "i": 1, "j": 9, "d": 2, "n": 2, "flip": ("i",), "rule": "separable", "skip": False},
        {"b": 1, "i": 9, "j": 1, "d": 3, "n": 5, "flip": ("i", "j")},
    ),
    bench_sizes=(
        BenchSize({"b": 64, "i": 14, "j": 14, "d": 384, "n": 16}, torch.bfloat16, (0.30, 1.2), (0.12, 0.45), 247),
        BenchSize({"b": 16, "i": 56, "j": 56, "d": 96, "n": 16}, torch.bfloat16, (0.35, 1.3), (0.15, 0.55)),
        BenchSize({"b": 64, "i": 14, "j": 14, "d": 384, "n": 16, "rule": "separable"}, torch.bfloat16),
    ),
    cpu_bench_sizes=(BenchSize({"b": 8, "i": 14, "j": 14, "d": 64, "n": 16}),),
)

STATE_SPEC = OpSpec(
    op=scan2d,
    make_inputs=make_state_inputs,
    outputs=("h1", "h2"),
    test_sizes=tuple(
        {"b": 2, "i": i, "j": j, "d": 3, "n": n, "broadcast": n == 4} for (i, j), n in zip(GRIDS, (1, 4, 16, 4, 1, 2))
    ),
    bench_sizes=(BenchSize({"b": 128, "i": 7, "j": 12, "d": 64, "n": 8}),),
    cpu_bench_sizes=(BenchSize({"b": 32, "i": 7, "j": 12, "d": 32, "n": 4}),),
    implementations=("reference", "chunked"),
    twice_differentiable=False,
)

SPEC = OpSpec(
    op=selective_scan2d,
    make_inputs=make_inputs,
    outputs=("y",),
    test_sizes=tuple(
        {"b": g, "i": i, "j": j, "d": 3, "n": n, "g": g, "gap": g == 3}
        for (i, j), n, g in zip(SMALL_GRIDS, (1, 2, 5, 4, 1), (1, 2, 1, 3, 2))
    ),
    bench_sizes=(
        BenchSize({"b": 128, "i": 7, "j": 12, "d": 64, "n": 8, "g": 4}),
        BenchSize({"b": 32, "i": 321, "j": 96, "d": 16, "n": 16}, torch.bfloat16, (1.6, 6), (0.9, 3.5)),
    ),
    cpu_bench_sizes=(
        BenchSize({"b": 128, "i": 7, "j": 12, "d": 32, "n": 4, "g": 4}),
        BenchSize({"b": 8, "i": 7, "j": 96, "d": 32, "n": 4, "g": 4}),
    ),
    twice_differentiable=False,
)
