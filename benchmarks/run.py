"""Time the ops of `omnissm.kernels` at the sizes of their `spec.py` and write one JSON file per op and device.

    python -m benchmarks.run --all [--device cpu|cuda] [--base FILE]      (or --op linear_scan ...)

An implementation is checked before it is timed; one that is wrong is reported and not timed. See README.md here.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from omnissm.kernels.testing import BenchSize

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # not there under PYTHONSAFEPATH

from op_case import Case, Timer, copy_bandwidth, read_specs

# Ops in the order in which they are timed; others follow.
ORDER = (
    "ssd", "quasiseparable", "selective_scan", "trapezoid_ssd", "ema_scan", "linear_scan", "causal_conv1d",
    "gated_norm", "fft_conv", "selective_scan2d", "cross_scan", "scan2d",
)  # fmt: skip


def describe(device: torch.device, commit: str | None) -> dict[str, Any]:
    """Where and with what the numbers were made."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": name,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device.type == "cuda"
        else None,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "python": platform.python_version(),
        "commit": commit or output_of("git", "-C", str(HERE), "rev-parse", "--short=12", "HEAD"),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return f"CPU {match.group(1)}" if match else f"CPU {platform.machine()}"


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def folder_of(device: str) -> str:
    """Name of the device's folder of results."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def report(name: str, rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> None:
    for row in rows:
        line = f"{name:18} {row['size']!s:58} {row['dtype']:9} {row['path']:24}"
        if "forward_ms" not in row:
            print(line, "skipped: " + row["skipped"] if "skipped" in row else "WRONG: " + row["wrong"], flush=True)
            continue
        for which in ("forward", "forward_backward"):
            graph = row[f"{which}_graph_ms"]
            best = row[f"{which}_ms"]["median"] if graph is None else graph["median"]
            line += f" {row[f'{which}_ms']['median']:9.3f} ms" + ("" if graph is None else f", graph {best:.3f}")
            line += f" ({row[f'{which}_floor_ms'] / best:4.0%} of the bandwidth)"
        if "required_ms" in row and row["path"] in ("triton", "chunked, torch.compile"):
            got = (row["forward_ms"]["median"], row["forward_backward_ms"]["median"])
            line += (
                " reached" if all(g <= r for g, r in zip(got, row["required_ms"])) else f" WANTED {row['required_ms']}"
            )
        if row["peak_mib"] is not None:
            line += f", {row['peak_mib']:.0f} MiB" + (f" of {row['required_mib']:g}" if "required_mib" in row else "")
        if row.get("repeatable") is False:
            line += ", NOT REPEATABLE"
        for old in base:
            if all(old.get(key) == row[key] for key in ("size", "dtype", "path")) and "forward_ms" in old:
                ratios = [row[key]["median"] / old[key]["median"] for key in ("forward_ms", "forward_backward_ms")]
                line += f"  {ratios[0]:.2f}x / {ratios[1]:.2f}x of base"
        print(line, flush=True)


def compile_all(cases: list[str], jobs: int, seconds: float) -> dict[str, float]:
    """Compile the kernels of cases `OP:INDEX`, each in a process of its own; seconds of their first calls.

    What does not compile within `seconds` for all is seen when it is timed.
    """
    end = time.monotonic() + seconds

    def one(case: str) -> float | None:
        command = [sys.executable, str(HERE / "run.py"), "--warm", case]
        left = end - time.monotonic()
        if left < 1:
            return None
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=left, check=True)
            return float(found.stdout.splitlines()[-1])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            output = getattr(error, "stderr", None) or ""
            text = output if isinstance(output, str) else output.decode(errors="replace")
            said = [line for line in text.splitlines() if "Error" in line] or [str(error)]
            print(f"{case} did not compile: {said[-1][:300]}", flush=True)
            return None

    with ThreadPoolExecutor(jobs) as pool:
        found = dict(zip(cases, pool.map(one, cases), strict=True))
    return {case: time_taken for case, time_taken in found.items() if time_taken is not None}


def different(sizes: Sequence[BenchSize]) -> list[int]:
    """Places of sizes that need kernels of their own: other widths, or a single row, which is cut into parts."""
    kinds = {}
    for index, one in enumerate(sizes):
        widths = tuple(
            (key, value) for key, value in one.size.items() if key not in ("b", "l", "h", "i", "j", "v", "e")
        )
        kinds.setdefault((widths, one.dtype, one.size.get("b") == 1), index)
    return sorted(kinds.values())


class Table:
    """Rows of all ops, written to one file per op after every step; with `resume` those of the files are kept."""

    def __init__(self, folder: Path, about: dict[str, Any], resume: bool) -> None:
        self.folder, self.about, self.resume = folder, about, resume
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def of(self, name: str) -> list[dict[str, Any]]:
        """Rows of an op so far."""
        if name not in self.rows:
            path, same = self.folder / f"{name}.json", ("device", "torch", "triton", "commit")
            old = json.loads(path.read_text()) if self.resume and path.is_file() else {}
            kept = old.get("rows", []) if all(old.get(key) == self.about[key] for key in same) else []
            self.rows[name] = [row for row in kept if "forward_ms" in row]
        return self.rows[name]

    def has(self, name: str, row: dict[str, Any]) -> bool:
        return any(all(one[key] == row[key] for key in ("size", "dtype", "path")) for one in self.of(name))

    def add(self, name: str, rows: list[dict[str, Any]], order: list[tuple[Any, str]]) -> None:
        """Add rows of one size; `order` has the places of the cases in the order of the file."""
        known = self.of(name)
        known += [row for row in rows if not self.has(name, row)]
        known.sort(key=lambda row: order.index((row["size"], row["dtype"])))
        write_json(self.folder / f"{name}.json", {**self.about, "op": name, "rows": known})


def main(argv: list[str] | None = None) -> int:
    specs = read_specs()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all ops, as without --op")
    parser.add_argument("--op", action="append", choices=sorted(specs), help="op to time (repeatable; default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--base", type=Path, help="earlier result file to compare with")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for DEVICE/OP.json")
    parser.add_argument("--seconds", type=float, default=0.3, help="time to spend on each number")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which nothing is begun")
    parser.add_argument("--resume", action="store_true", help="keep rows of the same commit, device and versions")
    parser.add_argument("--commit", help="commit to note, where the code is a copy without history")
    parser.add_argument("--warm", metavar="OP:INDEX", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.all and options.op:
        parser.error("--all and --op exclude each other")
    if options.warm:
        name, _, index = options.warm.partition(":")
        print(round(Case(specs[name], specs[name].bench_sizes[int(index)], torch.device("cuda")).warm(), 2))
        return 0

    end = time.monotonic() + options.limit
    device = torch.device(options.device)
    about = describe(device, options.commit)
    sizes = {name: specs[name].bench_sizes if device.type == "cuda" else specs[name].cpu_bench_sizes for name in specs}
    chosen = options.op or sorted(specs, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    for name in chosen:
        if not sizes[name]:
            print(f"{name}: spec.py names no sizes for {device.type}, nothing to time")
    with contextlib.ExitStack() as stack:
        cold: dict[str, float] = {}
        if device.type == "cuda":
            # An empty cache, so that the first calls are those of a new installation.
            os.environ["TRITON_CACHE_DIR"] = stack.enter_context(tempfile.TemporaryDirectory())
            in_triton = [name for name in chosen if "triton" in specs[name].implementations]
            cases = [f"{name}:{index}" for name in in_triton for index in different(sizes[name])]
            cold = compile_all(cases, options.jobs, min(300.0, options.limit / 2))
        timer = Timer(device, options.seconds)
        bandwidth = copy_bandwidth(timer)
        about["copy_gb_per_s"] = round(bandwidth / 1e9, 1)
        print(*(f"{key} {value}" for key, value in about.items() if value is not None), sep=", ", flush=True)
        base = json.loads(options.base.read_text())["rows"] if options.base else []
        table = Table(options.out / folder_of(about["device"]), about, options.resume)
        left_out = 0
        for stage, name in itertools.product(range(3), chosen):
            of_op = [Case(specs[name], one, device) for one in sizes[name]]
            order = [case.place for case in of_op]
            for index, case in enumerate(of_op):
                if all(table.has(name, case.row(path)) for path in case.paths(stage)):
                    continue
                if time.monotonic() > end:
                    left_out += 1
                    continue
                rows = case.rows(stage, timer, bandwidth)
                if stage == 0 and f"{name}:{index}" in cold:
                    rows = [row | {"cold_s": cold[f"{name}:{index}"]} for row in rows]
                report(name, rows, base)
                table.add(name, rows, order)
    if left_out:
        print(f"out of time, {left_out} steps are left; go on with --resume")
    return int(any("wrong" in row for rows in table.rows.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
