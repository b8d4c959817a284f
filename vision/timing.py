"""Throughput and memory of models side by side, for the verb `benchmark` and the benchmark scripts."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..ssmcore.training.devices import find_device
from .registry import create_model


def time_model(
    name: str,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 8,
    image_size: int = 224,
    bf16: bool = False,
    compile: bool = False,
    training: bool = True,
    repeats: int = 3,
) -> dict[str, Any]:
    """Time one model on random images.

    On a CPU, milliseconds are of processor time, which a busy machine does not stretch; on a GPU of wall time between
    synchronised ends, of calls queued one after another. Both are the best of the repeats.

    Args:
        name: Name of a model of ours or timm's.
        device: "cpu" or "cuda".
        batch_size: Images per call.
        image_size: Side of the images, pixels.
        bf16: Autocast to bfloat16.
        compile: Use torch.compile.
        training: Time a training step too (forward, backward, AdamW).
        repeats: Measurements.

    Returns:
        The settings, parameters, `inference_ms` and `training_ms` per image, images per second, and peak megabytes of
        each (None on a CPU where the system does not tell).

    Raises:
        ValueError: for an unknown model or device, or a size or number below 1.
    """
    for what, number in (("batch_size", batch_size), ("image_size", image_size), ("repeats", repeats)):
        if number < 1:
            raise ValueError(f"{what} must be at least 1, got {number}.")
    place = find_device(device)
    torch.manual_seed(0)
    sized: dict[str, Any] = {} if image_size == 224 else {"img_size": image_size} if _fixed(name) else {}
    net: nn.Module = create_model(name, **sized).to(place)
    call: Callable[..., Any] = torch.compile(net) if compile else net
    images = torch.randn(batch_size, 3, image_size, image_size, device=place)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)

    def forward() -> Any:
        with torch.autocast(place.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            return call(images)

    def infer() -> None:
        with torch.inference_mode():
            forward()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward().float().square().mean().backward()
        optimizer.step()

    row: dict[str, Any] = {
        "model": name,
        "parameters": sum(p.numel() for p in net.parameters()),
        "batch_size": batch_size,
        "image_size": image_size,
        "bf16": bf16,
        "compile": compile,
    }
    for kind, function in (("inference", infer), ("training", step)) if training else (("inference", infer),):
        net.train(kind == "training")
        seconds, peak = _measure(function, place, repeats)
        row[f"{kind}_ms"] = round(seconds / batch_size * 1e3, 4)
        row[f"{kind}_images_per_s"] = round(batch_size / seconds, 2)
        row[f"{kind}_peak_mb"] = None if peak is None else round(peak / 2**20, 1)
    return row


def _fixed(name: str) -> bool:
    from timm.models import get_pretrained_cfg_value, is_model

    return is_model(name.partition(".")[0]) and bool(get_pretrained_cfg_value(name, "fixed_input_size"))


def _resident(field: str) -> int | None:
    """Bytes of this process in memory, now ("VmRSS") or at most ("VmHWM"); None outside Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def _give_back() -> None:
    """Return freed memory to the system, else later measurements grow into what earlier ones left; with glibc only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _measure(function: Callable[[], None], device: torch.device, repeats: int) -> tuple[float, int | None]:
    """Best seconds of a call, and its peak memory in bytes (on a CPU the growth of the process)."""
    if device.type != "cuda":
        gc.collect()
        _give_back()
        before = _resident("VmRSS")
        if before is not None:
            Path("/proc/self/clear_refs").write_text("5")  # forget the largest size of earlier models
        best = float("inf")
        for _ in range(repeats + 1):
            begin = time.process_time()
            function()
            best = min(best, time.process_time() - begin)
        largest = _resident("VmHWM")
        return best, None if before is None or largest is None else largest - before
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    best, calls = float("inf"), 10
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begin) / calls)
    return best, torch.cuda.max_memory_allocated() - held
