"""Inputs and sizes of `trapezoid_ssd` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..testing import BenchSize, OpSpec
from . import op
from .state import TrapezoidState


def trapezoid_ssd(**inputs: Any) -> tuple[Tensor, ...]:
    """The op (see `trapezoid_ssd`) with the parts of its states as single tensors, as tests need them."""
    parts = [inputs.pop(name, None) for name in ("phi", "ssm", "k", "v")]
    initial = None if parts[0] is None else TrapezoidState(*parts)
    y, final = op.trapezoid_ssd(**inputs, initial_state=initial)
    return y, *final


def make_inputs(
    b: int,
    l: int,  # noqa: E741
    h: int,
    p: int,
    n: int,
    r: int = 1,
    g: int = 1,
    s: int | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
    regime: str = "initial",
    parameters: bool = True,
    x_rank: bool = False,
    state: bool = True,
    packed: bool = False,
    rotation: str = "interleaved",
    chunk_size: int | None = None,
) -> dict[str, Any]:
    """Normal inputs with steps and decays as models start with ("initial"), or half the decays e^-112 ("strong")."""
    like: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    wide = like | {"dtype": torch.promote_types(dtype, torch.float32)}
    pairs = n // 4 if s is None else s
    dt = 10 ** (-3 + 2 * torch.rand(b, l, h, **wide))  # log-uniform in 1e-3 .. 1e-1
    rate = 1 + 3 * torch.rand(b, l, h, **wide)
    strong = torch.where(torch.rand(b, l, h, **wide) < 0.5, -112.0, -0.04).to(dt)
    lam = torch.rand(b, l, h, **wide)
    inputs: dict[str, Any] = {
        "x": torch.randn(b, l, h, p, **like),
        "log_decay": {"initial": -dt * rate, "strong": strong}[regime],
        "gamma": lam * dt,
        "beta": (1 - lam) * dt,
        "theta": torch.randn(b, l, pairs, **like),
        "B": torch.randn(b, l, r, g, n, **like),
        "C": torch.randn(b, l, r, g, n, **like),
        "rotation": rotation,
    }
    if chunk_size is not None:
        inputs["chunk_size"] = chunk_size
    if parameters:
        inputs["B_bias"] = torch.randn(h, r, n, **wide)
        inputs["C_bias"] = torch.randn(h, r, n, **wide)
        inputs["D"] = torch.randn(h, **wide)
    if x_rank:
        inputs["x_rank"] = torch.randn(h, r, p, **wide)
    if state:
        inputs["phi"] = 6 * torch.rand(b, h, pairs, **wide)
        inputs["ssm"] = torch.randn(b, h, p, n, **wide)
        inputs["k"] = torch.randn(b, r, h, n, **wide)
        inputs["v"] = torch.randn(b, h, p, **like)
    if packed:
        starts = torch.rand(b, l, device=generator.device, generator=generator) < 0.2
        inputs["seq_idx"] = starts.cumsum(1).to(torch.int32)
    return inputs


_LANG = {"b": 8, "l": 4096, "h": 32, "p": 64, "n": 128, "state": False}
_IMAGE = {"b": 64, "l": 784, "h": 12, "p": 64, "n": 64, "state": False}
_GENOME = {"b": 1, "l": 131072, "h": 16, "p": 64, "n": 64, "state": False}

SPEC = OpSpec(
    op=trapezoid_ssd,
    make_inputs=make_inputs,
    outputs=("y", "final_phi", "final_ssm", "final_k", "final_v"),
    test_sizes=(
        {"b": 8, "l": 1, "h": 1, "p": 1, "n": 16, "s": 3},  # each dv is a sum of 16 rounded terms, which may cancel
        {"b": 2, "l": 63, "h": 2, "p": 3, "n": 4, "s": 2, "chunk_size": 2},
        {"b": 2, "l": 64, "h": 4, "p": 8, "n": 16, "g": 2, "s": 8},
        {"b": 1, "l": 129, "h": 3, "p": 5, "n": 7, "s": 0, "parameters": False, "state": False},
        {"b": 1, "l": 50, "h": 2, "p": 6, "n": 8, "r": 3, "s": 3, "rotation": "half", "x_rank": True},
        {"b": 2, "l": 70, "h": 3, "p": 4, "n": 9, "g": 3, "s": 2, "packed": True, "chunk_size": 16},
        {"b": 2, "l": 40, "h": 2, "p": 4, "n": 8, "r": 2, "g": 2, "packed": True, "x_rank": True, "chunk_size": 8},
        {"b": 1, "l": 130, "h": 2, "p": 48, "n": 36, "regime": "strong", "packed": True, "state": False},
    ),
    bench_sizes=(
        BenchSize(_LANG, torch.bfloat16, (0.7, 2.8), (0.45, 1.8), 794),
        BenchSize(_IMAGE, torch.bfloat16, (0.35, 1.5), (0.2, 0.9)),
        BenchSize(_GENOME, torch.bfloat16, (1.4, 5.5), (0.8, 3.5)),
        BenchSize(_GENOME | {"l": 1048576, "h": 8}, torch.bfloat16, (7.0, 28.0), (4.0, 16.0)),
        BenchSize(_LANG | {"r": 4, "rotation": "half", "x_rank": True}, torch.bfloat16, (1.6, 6.0), (0.9, 3.5)),
    ),
    cpu_bench_sizes=(BenchSize({"b": 2, "l": 1024, "h": 4, "p": 64, "n": 64, "state": False}),),
)
