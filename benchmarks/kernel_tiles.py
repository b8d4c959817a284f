"""Times of ops with other tiles of one kernel than those of its table, on a GPU: what the choice is worth.

    python -m benchmarks.kernel_tiles [--op OP ...] [--out FOLDER] [--seconds S] [--jobs N]

Writes DEVICE/tiles.json: a row for each choice, milliseconds of the output, or of output and gradients where the kernel
is one of the gradient, replayed from a CUDA graph. Choices are first compiled, N at a time, each in its own process.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.command import leave
from benchmarks.op_case import Timer, read_specs, training_step
from benchmarks.run import HERE, describe, folder_of, write_json
from omnissm.kernels.replay import forget


class Choice(NamedTuple):
    """One kernel of an op at one of its `bench_sizes`, and what replaces entries of its table: none for the table's."""

    op: str
    index: int
    kernel: str
    changed: dict[str, int]


def grid(op: str, index: int, kernel: str, *changes: dict[str, int]) -> list[Choice]:
    return [Choice(op, index, kernel, changed) for changed in ({}, *changes)]


CHOICES = [
    *grid("ssd", 0, "fwd", *({"chunk": c, "warps": w, "stages": s} for c, w, s in (
        (64, 4, 1), (64, 4, 3), (64, 8, 2), (32, 4, 2),
    ))),
    *grid("ssd", 0, "links", *({"warps": w, "stages": s} for w, s in ((4, 1), (4, 3), (8, 2)))),
    *grid("ssd", 0, "maps", *({"warps": w, "stages": s} for w, s in ((4, 1), (4, 3), (8, 2)))),
    *grid("ssd", 0, "sweep", *({"warps": w, "stages": s} for w, s in ((4, 1), (4, 3), (8, 2)))),
    *grid("ssd", 1, "fwd in halves", {"chunk": 16}, {"chunk": 16, "stages": 1}, {"stages": 1}),
    *grid("ssd", 1, "links", {"warps": 8}),
    *grid("ssd", 1, "maps", {"stages": 1}, {"warps": 8, "stages": 1}),
    *grid("ssd", 3, "fwd", {"stages": 1}, {"stages": 2}),
    *grid("ssd", 3, "links", {"stages": 1}, {"stages": 2}),
    *grid("ssd", 3, "maps", {"stages": 1}, {"stages": 2}),
    *grid("quasiseparable", 0, "two-sided", *({"chunk": c, "warps": w, "stages": s} for c, w, s in (
        (64, 4, 1), (64, 4, 2), (64, 8, 2), (32, 4, 2), (128, 8, 2),
    ))),
    *grid("quasiseparable", 2, "two-sided", {"stages": 2}, {"warps": 8}),
    *grid("selective_scan", 0, "fwd", {"TIME": 4}, {"TIME": 16}, {"BLOCK_D": 64, "num_warps": 4}),
    *grid("selective_scan", 0, "bwd", {"TIME": 2}, {"TIME": 8}, {"BLOCK_D": 64, "num_warps": 4}),
]  # fmt: skip
OUTPUTS = ("fwd", "fwd in halves", "two-sided")


@contextlib.contextmanager
def chosen(choice: Choice) -> Iterator[None]:
    """The kernel with other entries than its table's, for the time of the context."""
    if choice.op == "selective_scan":
        module, name = import_module("omnissm.kernels.selective_scan.triton_impl"), "_cached_options"
        places, caches = [(module, name)], []
    else:
        tables = import_module("omnissm.kernels.ssd.triton_tiles")
        users = "ssd.triton_tiles", "ssd.triton_outputs", "quasiseparable.triton_impl"
        places = [(import_module(f"omnissm.kernels.{user}"), "tiles") for user in users]
        caches = [tables.alternatives, tables._gradient_tiles, tables._gradient_alternatives]
    table = getattr(*places[0])

    def changed(*sizes: Any) -> Any:
        found = table(*sizes)
        if choice.op == "selective_scan":
            return found | choice.changed if sizes[-1] == (choice.kernel == "bwd") else found
        return found._replace(**choice.changed) if sizes[0] == choice.kernel else found

    for module, name in places:
        setattr(module, name, changed)
    for cache in caches:
        cache.cache_clear()
    forget()
    try:
        yield
    finally:
        for module, name in places:
            setattr(module, name, table)
        for cache in caches:
            cache.cache_clear()
        forget()


def run_of(choice: Choice) -> tuple[dict[str, Any], Any]:
    """What is to be noted of a choice, and what is to be timed."""
    spec = read_specs()[choice.op]
    bench = spec.bench_sizes[choice.index]
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = spec.make_inputs(**bench.size, dtype=bench.dtype, device="cuda", generator=generator)
    row = {
        "op": choice.op,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "size": dict(bench.size),
        "kernel": choice.kernel,
        "tiles": ", ".join(f"{name} {value}" for name, value in choice.changed.items()) or "those of the table",
    }
    if choice.kernel not in OUTPUTS:
        return row, training_step(lambda **given: spec.op(**given, backend="triton"), inputs)

    def outputs() -> Any:
        with torch.no_grad():
            return spec.op(**inputs, backend="triton")

    return row, outputs


def compiles(number: int, until: float) -> str:
    """Compile a choice in another process; why it failed, or nothing."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "benchmarks.kernel_tiles", "--run", str(number)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    left = until - time.monotonic()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=max(1.0, left)
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "did not compile in time"
    return "" if done.returncode == 0 else (done.stderr.splitlines() or ["did not run"])[-1][:160]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="only these ops (repeatable)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for DEVICE/tiles.json")
    parser.add_argument("--seconds", type=float, default=900, help="stop after so many seconds with what is there")
    parser.add_argument("--jobs", type=int, default=4, help="choices that compile at a time")
    parser.add_argument("--commit", help="commit to note, where the code is a copy without history")
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.run is not None:
        with chosen(CHOICES[options.run]):
            run_of(CHOICES[options.run])[1]()
            torch.cuda.synchronize()
        return 0
    until = time.monotonic() + options.seconds
    numbers = [number for number, choice in enumerate(CHOICES) if not options.op or choice.op in options.op]
    with ThreadPoolExecutor(options.jobs) as pool:
        failed = list(pool.map(lambda number: compiles(number, until - 0.3 * options.seconds), numbers))
    device = torch.device("cuda")
    content = {**describe(device, options.commit), "command": "python -m benchmarks.kernel_tiles"}
    timer = Timer(device, 0.03)
    rows: list[dict[str, Any]] = []
    for number, failure in zip(numbers, failed, strict=True):
        if time.monotonic() > until:
            print(f"{CHOICES[number]}: out of time")
            continue
        with chosen(CHOICES[number]):
            row, run = run_of(CHOICES[number])
            if not failure:
                eager = timer(run)
                row["ms"] = (timer.graph(run, eager) or eager)["median"]
        rows.append(row if not failure else row | {"skipped": failure})
        print(*rows[-1].values(), sep=" | ", flush=True)
        write_json(options.out / folder_of(content["device"]) / "tiles.json", content | {"rows": rows})
    return 0 if rows else 1


if __name__ == "__main__":
    leave(main)
