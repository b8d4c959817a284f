"""Search for the fastest tiles of a kernel on this device, on request: `SSM_AUTOTUNE=1`.

Without the variable every kernel takes the tiles of its table, so that results and times repeat. With it the first call
for sizes and a dtype times all candidates, keeps the fastest and writes it to a file that later processes read.
Imported by `triton_impl` modules only, so that Triton stays optional.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

_REPETITIONS = 7


def autotuning() -> bool:
    """Whether the environment asks for a search."""
    return os.environ.get("SSM_AUTOTUNE", "0") not in ("", "0")


def cache_file() -> Path:
    """Where found tiles are kept: `SSM_AUTOTUNE_CACHE`, or omnissm/tiles.json in the user's cache folder."""
    if given := os.environ.get("SSM_AUTOTUNE_CACHE"):
        return Path(given)
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "omnissm" / "tiles.json"


def fastest(
    name: str, candidates: Sequence[Any], run: Callable[[Any], object], device: torch.device, **key: object
) -> Any:
    """The candidate with which `run` takes the least time; the first one if the environment asks for no search.

    Args:
        name: What is tuned.
        candidates: Choices, nested tuples of numbers; the first one is the default.
        run: Does the work with a choice. It runs several times, so it must overwrite what it writes.
        device: Where it runs.
        key: What else the choice depends on.
    """
    if len(candidates) == 1 or not autotuning() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return candidates[0]
    words = {"name": name, "device": _device_name(device), **key, "candidates": candidates}
    place = json.dumps(words, default=str, sort_keys=True)
    known = _read(cache_file())
    if place not in known:
        times = [_time(functools.partial(run, choice), device) for choice in candidates]
        known = _read(cache_file())  # another process may have written meanwhile
        known[place] = times.index(min(times))
        _write(cache_file(), known)
    return candidates[known[place]]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _time(run: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds on the device; infinite for a choice that does not fit it."""
    times = []
    try:
        for _ in range(_REPETITIONS + 1):
            begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    except (OutOfResources, RuntimeError):
        return float("inf")
    return statistics.median(times[1:])  # the first one compiled


@functools.lru_cache(maxsize=8)
def _parsed(path: Path, changed: int) -> dict[str, int]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} cannot be read ({error}); searching for tiles again.", stacklevel=2)
        return {}
    return {place: choice for place, choice in found.items() if isinstance(choice, int)}


def _read(path: Path) -> dict[str, int]:
    try:
        return dict(_parsed(path, path.stat().st_mtime_ns))
    except FileNotFoundError:
        return {}


def _write(path: Path, known: dict[str, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(known, indent=1) + "\n")
    os.replace(temporary, path)
