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

from omnissm.kernels.testing import BenchSize, OpSpec

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # not there under PYTHONSAFEPATH

from command import leave
from op_case import COMPILED, Case, Timer, autograd_thread, copy_bandwidth, read_specs, smaller
from tables import missed

# Ops in the order in which they are timed; others follow.
ORDER = (
    "ssd", "quasiseparable", "selective_scan", "trapezoid_ssd", "ema_scan", "linear_scan", "causal_conv1d",
    "gated_norm", "fft_conv", "selective_scan2d", "cross_scan", "scan2d",
)  # fmt: skip
# Ops whose kernels take longest to compile.
SLOW = "grid_scan", "selective_scan2d", "trapezoid_ssd", "quasiseparable", "ssd"


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


def report(name: str, rows: list[dict[str, Any]], base: list[dict[str, Any]], seconds: float) -> None:
    """Print rows that were there after so many seconds."""
    for row in rows:
        line = f"[{seconds:5.1f}] {name:18} {row['size']!s:58} {row['dtype']:9} {row['path']:24}"
        if "forward_ms" not in row:
            print(line, "skipped: " + row["skipped"] if "skipped" in row else "WRONG: " + row["wrong"], flush=True)
            continue
        for which in ("forward", "forward_backward"):
            graph = row[f"{which}_graph_ms"]
            best = row[f"{which}_ms"]["median"] if graph is None else graph["median"]
            line += f" {row[f'{which}_ms']['median']:9.3f} ms" + ("" if graph is None else f", graph {best:.3f}")
            line += f" ({row[f'{which}_floor_ms'] / best:4.0%} of the bandwidth)"
        if "required_ms" in row and row["path"] == "triton":
            wanted = [name for name in missed(row) if name in ("graph", "eager")]
            line += f" WANTED {row['required_ms']} ({' and '.join(wanted)})" if wanted else " reached"
        if row["peak_mib"] is not None:
            line += f", {row['peak_mib']:.0f} MiB" + (f" of {row['required_mib']:g}" if "required_mib" in row else "")
        if row.get("repeatable") is False:
            line += ", NOT REPEATABLE"
        for old in base:
            if all(old.get(key) == row[key] for key in ("size", "dtype", "path")) and "forward_ms" in old:
                ratios = [row[key]["median"] / old[key]["median"] for key in ("forward_ms", "forward_backward_ms")]
                line += f"  {ratios[0]:.2f}x / {ratios[1]:.2f}x of base"
        print(line, flush=True)


def prepare(specs: dict[str, OpSpec], chosen: Sequence[str], jobs: int, seconds: float) -> dict[str, Any]:
    """Do what needs no quiet GPU, each task in a process of its own, the slowest first; what each task found.

    Tasks are `first:OP:INDEX`, the first call of our fastest path, in seconds; `compiled:OP:0`, of the chunked path
    under torch.compile; and `check:OP:INDEX:PATH`, a comparison with the float64 reference, None or the error. What
    does not end within `seconds` for all is left out, and done when it is timed.
    """
    end = time.monotonic() + seconds

    def one(task: str) -> Any:
        left = end - time.monotonic()
        if left < 1:
            return LookupError("no time was left")
        command = [sys.executable, str(HERE / "run.py"), "--task", task]
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=left, check=True)
            return json.loads(found.stdout.splitlines()[-1])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            output = getattr(error, "stderr", None) or ""
            text = output if isinstance(output, str) else output.decode(errors="replace")
            said = [line for line in text.splitlines() if "Error" in line] or [str(error)]
            return LookupError(said[-1][:300])

    tasks = tasks_of(specs, chosen)
    with ThreadPoolExecutor(jobs) as pool:
        found = dict(zip(tasks, pool.map(one, tasks), strict=True))
    for task, result in found.items():
        if isinstance(result, LookupError):
            print(f"{task}: {result}", flush=True)
    return {task: result for task, result in found.items() if not isinstance(result, LookupError)}


def tasks_of(specs: dict[str, OpSpec], chosen: Sequence[str]) -> list[str]:
    """Tasks of `prepare`; comparisons that would be the same come once."""
    first, later = [], []
    for name in sorted(chosen, key=lambda name: SLOW.index(name) if name in SLOW else len(SLOW)):
        spec, seen = specs[name], []
        fastest = "triton" if "triton" in spec.implementations else "chunked"
        kinds = different(spec.bench_sizes)
        for index, one in enumerate(spec.bench_sizes):
            if fastest == "triton":
                (first if index in kinds else later).append(f"first:{name}:{index}")
            for path in {fastest: None, "chunked": None} if index == 0 else (fastest,):
                check = path, one.dtype, smaller(spec, one.size)
                if check not in seen:
                    seen.append(check)
                    first.append(f"check:{name}:{index}:{path}")
        later.append(f"compiled:{name}:0")
    return first + later


def do(task: str, specs: dict[str, OpSpec]) -> float | str | None:
    """One task of `prepare`."""
    kind, name, index, *path = task.split(":")
    case = Case(specs[name], specs[name].bench_sizes[int(index)], torch.device("cuda"))
    return case.check(*path) if kind == "check" else case.first_call(kind == "compiled")


def tell(case: Case, index: int, done: dict[str, Any]) -> None:
    """Tell a case what `prepare` found of it."""
    name = case.spec.name
    for path in case.spec.implementations:
        for other, one in enumerate(case.spec.bench_sizes):
            same = one.dtype == case.bench.dtype and smaller(case.spec, one.size) == smaller(case.spec, case.bench.size)
            if same and (task := f"check:{name}:{other}:{path}") in done:
                case.checked[path] = done[task]
    if index == 0 and f"compiled:{name}:0" not in done:
        case.checked[COMPILED] = "did not compile in time"


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
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.all and options.op:
        parser.error("--all and --op exclude each other")
    if options.task:
        print(json.dumps(do(options.task, specs)))
        return 0

    begin = time.monotonic()
    end = begin + options.limit
    device = torch.device(options.device)
    about = describe(device, options.commit)
    sizes = {name: specs[name].bench_sizes if device.type == "cuda" else specs[name].cpu_bench_sizes for name in specs}
    chosen = options.op or sorted(specs, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    for name in chosen:
        if not sizes[name]:
            print(f"{name}: spec.py names no sizes for {device.type}, nothing to time")
    with contextlib.ExitStack() as stack:
        done: dict[str, Any] = {}
        if device.type == "cuda":
            # Empty caches, so that the first calls are those of a new installation.
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            os.environ |= {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
            os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the processes below are many enough
            done = prepare(specs, chosen, options.jobs, min(300.0, 0.6 * options.limit))
            print(f"{len(done)} tasks done beforehand in {time.monotonic() - begin:.0f} s", flush=True)
        timer = Timer(device, options.seconds)
        bandwidth = copy_bandwidth(timer)
        about["copy_gb_per_s"] = round(bandwidth / 1e9, 1)
        if device.type == "cuda":
            about["autograd_thread_ms"] = round(autograd_thread(device), 3)
        print(*(f"{key} {value}" for key, value in about.items() if value is not None), sep=", ", flush=True)
        base = json.loads(options.base.read_text())["rows"] if options.base else []
        table = Table(options.out / folder_of(about["device"]), about, options.resume)
        left_out = 0
        for stage, name in itertools.product(range(2), chosen):
            of_op = [Case(specs[name], one, device) for one in sizes[name]]
            order = [case.place for case in of_op]
            for index, case in enumerate(of_op):
                if device.type == "cuda":
                    tell(case, index, done)
                if all(table.has(name, case.row(path)) for path in case.paths(stage)):
                    continue
                if time.monotonic() > end:
                    left_out += 1
                    continue
                rows = case.rows(stage, timer, bandwidth)
                if stage == 0 and index in different(sizes[name]) and f"first:{name}:{index}" in done:
                    rows = [row | {"cold_s": done[f"first:{name}:{index}"]} for row in rows]
                report(name, rows, base, time.monotonic() - begin)
                table.add(name, rows, order)
    if left_out:
        print(f"out of time, {left_out} steps are left; go on with --resume")
    for name, row in ((name, row) for name, rows in table.rows.items() for row in rows):
        if limits := missed(row):
            print(f"missed ({', '.join(limits)}): {name} {row['size']} {row['dtype']}")
    return int(any("wrong" in row for rows in table.rows.values() for row in rows))


if __name__ == "__main__":
    leave(main)
