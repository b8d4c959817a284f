"""Where the time of each Triton kernel goes: counters of Nsight Compute at the sizes of the ops' `spec.py`.

    python -m benchmarks.kernel_profile [--ncu PATH] [--out FOLDER] [--case OP:INDEX ...] [--seconds S]

Writes DEVICE/profile.json. INDEX counts the `bench_sizes` of an op. Every case runs once to compile, several at a time,
then under ncu, all launches of an output and its gradients; those of one kernel are one row. Where ncu cannot count,
times come from torch's profiler and occupancy from registers and shared memory; the file says so.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import leave
from benchmarks.op_case import read_specs, training_step
from benchmarks.run import HERE, describe, folder_of, write_json

CASES = (
    "ssd:0", "ssd:1", "quasiseparable:0", "trapezoid_ssd:0", "selective_scan:0", "causal_conv1d:0", "gated_norm:0",
    "ema_scan:0", "linear_scan:0",
)  # fmt: skip
STALLED = "smsp__average_warps_issue_stalled_"
STALLS = (
    "barrier", "branch_resolving", "dispatch_stall", "drain", "gmma", "imc_miss", "lg_throttle", "long_scoreboard",
    "math_pipe_throttle", "membar", "mio_throttle", "no_instruction", "short_scoreboard", "sleeping", "tex_throttle",
    "wait",
)  # fmt: skip
TENSOR = ("sm__pipe_tensor_cycles_active", "sm__pipe_tensor_op_hmma_cycles_active", "sm__inst_executed_pipe_tensor")
MULTIPROCESSOR = {"registers": 65536, "shared": 228 * 1024, "warps": 64, "programs": 32}  # of Hopper


def run_case(case: str, profile: str | None) -> dict[str, Any]:
    """Compile and run a case, then once more for ncu or torch's profiler; what the compiled kernels need, by name."""
    import triton

    name, _, index = case.partition(":")
    spec = read_specs()[name]
    bench = spec.bench_sizes[int(index)]
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = spec.make_inputs(**bench.size, dtype=bench.dtype, device="cuda", generator=generator)
    needs: dict[str, dict[str, Any]] = {}
    run = triton.runtime.jit.JITFunction.run

    def noted(self: Any, *arguments: Any, **options: Any) -> Any:
        kernel = run(self, *arguments, **options)
        with contextlib.suppress(AttributeError):
            needs[kernel.name] = {
                "warps": kernel.metadata.num_warps,
                "registers": kernel.n_regs,
                "spilled": kernel.n_spills,
                "shared": kernel.metadata.shared,
            }
        return kernel

    triton.runtime.jit.JITFunction.run = noted
    with torch.no_grad():
        found = spec.op(**inputs, backend="triton")
    first = found[0] if isinstance(found, tuple) else found
    step = training_step(lambda **given: spec.op(**given, backend="triton"), inputs, torch.randn_like(first))
    step()
    torch.cuda.synchronize()
    times: dict[str, float] = {}
    if profile == "ncu":
        torch.cuda.cudart().cudaProfilerStart()
        step()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
    elif profile == "torch":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found_times:
            step()
            torch.cuda.synchronize()
        times = {one.key: one.device_time_total / 1e3 for one in found_times.key_averages()}
    return {
        "size": dict(bench.size),
        "dtype": str(bench.dtype).removeprefix("torch."),
        "needs": needs,
        "ms": {kernel: times[kernel] for kernel in needs if kernel in times},
    }


def known_metrics(ncu: str) -> set[str] | None:
    """Base names of the counters of this GPU, None if ncu does not say."""
    found = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True, check=False)
    names = set(re.findall(r"^(\w+__\w+)\s", found.stdout, re.MULTILINE))
    return names or None


def counters(known: set[str] | None) -> list[str]:
    """What ncu is asked for."""
    bases = [f"{STALLED}{reason}_per_issue_active" for reason in STALLS]
    stalls = [f"{base}.ratio" for base in bases if known is None or base in known]
    tensor = [f"{base}.avg.pct_of_peak_sustained_elapsed" for base in TENSOR if known is None or base in known]
    return [
        "gpu__time_duration.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "sm__throughput.avg.pct_of_peak_sustained_elapsed", "sm__warps_active.avg.pct_of_peak_sustained_active",
        "launch__registers_per_thread", *tensor, *stalls,
    ]  # fmt: skip


def read_counters(text: str) -> list[dict[str, Any]]:
    """Rows of the table that ncu prints with `--csv --page raw --print-units base`."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    table = list(csv.reader(io.StringIO("\n".join(lines))))
    if len(table) < 3:
        raise ValueError(f"expected a table of ncu with a row per kernel, got {text[-300:]!r}")
    names, units = table[0], table[1]
    return [_row(dict(zip(names, one, strict=True)), dict(zip(names, units, strict=True))) for one in table[2:]]


def _row(found: dict[str, str], units: dict[str, str]) -> dict[str, Any]:
    def number(name: str) -> float:
        try:
            return float(found[name].replace(",", ""))
        except (KeyError, ValueError):
            return float("nan")

    seconds = {"s": 1.0, "second": 1.0, "ms": 1e-3, "us": 1e-6, "usecond": 1e-6, "ns": 1e-9, "nsecond": 1e-9}
    stalls = {
        name.removeprefix(STALLED).removesuffix("_per_issue_active.ratio"): number(name)
        for name in found
        if name.startswith(STALLED)
    }
    worst = sorted((name for name in stalls if stalls[name] > 0), key=lambda name: -stalls[name])[:3]
    tensor = [number(name) for name in found if name.startswith(TENSOR)]
    row = {
        "kernel": found["Kernel Name"],
        "ms": number("gpu__time_duration.sum") * seconds[units["gpu__time_duration.sum"]] * 1e3,
        "dram_pct": number("dram__throughput.avg.pct_of_peak_sustained_elapsed"),
        "sm_pct": number("sm__throughput.avg.pct_of_peak_sustained_elapsed"),
        "tensor_pct": max((one for one in tensor if one == one), default=None),
        "occupancy": number("sm__warps_active.avg.pct_of_peak_sustained_active"),
        "registers": int(number("launch__registers_per_thread")),
    }
    return {name: round(one, 4) if isinstance(one, float) else one for name, one in row.items()} | {
        "limits_by": limits(row, [f"{name} {stalls[name]:.1f}" for name in worst])
    }


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for all launches of a kernel: their number, and the one of median time."""
    of_kernel: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of_kernel.setdefault(row["kernel"], []).append(row)
    return [
        sorted(some, key=lambda row: row["ms"])[len(some) // 2] | {"launches": len(some)} for some in of_kernel.values()
    ]


def limits(row: dict[str, Any], stalls: list[str]) -> str:
    """What holds a kernel back: a unit that is busy most of the time, else what its warps wait for, in cycles."""
    busy = [name for name, share in (("DRAM", row["dram_pct"]), ("tensor cores", row["tensor_pct"] or 0)) if share > 60]
    return ", ".join(busy) or "waits: " + ", ".join(stalls)


def occupancy(needs: dict[str, Any]) -> tuple[float, str]:
    """Share of a multiprocessor's warps that fit, in percent, and what allows no more."""
    warps = needs["warps"]
    fits = {
        "registers": MULTIPROCESSOR["registers"] // (-(-needs["registers"] * 32 // 256) * 256 * warps),
        "shared memory": MULTIPROCESSOR["shared"] // (needs["shared"] + 1024),
        "warps": MULTIPROCESSOR["warps"] // warps,
        "programs": MULTIPROCESSOR["programs"],
    }
    scarce = min(fits, key=lambda name: fits[name])
    return 100 * fits[scarce] * warps / MULTIPROCESSOR["warps"], scarce


def child(case: str, profile: str | None, *before: str) -> dict[str, Any]:
    """Arguments of a process that runs one case."""
    chosen = ["--profile", profile] if profile else []
    command = [*before, sys.executable, "-m", "benchmarks.kernel_profile", "--run", case, *chosen]
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"args": command, "env": os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, "text": True}


def compile_cases(cases: list[str], jobs: int, until: float) -> dict[str, dict[str, Any]]:
    """Run every case once, `jobs` at a time, so that its kernels are in Triton's cache; what each of them printed."""
    found, waiting, running = {}, list(cases), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            case = waiting.pop(0)
            running[case] = subprocess.Popen(**child(case, None), stdout=subprocess.PIPE)
        for case, process in list(running.items()):
            if process.poll() is None and time.monotonic() < until:
                continue
            process.kill()
            text = process.communicate()[0]
            del running[case]
            if process.returncode == 0:
                found[case] = json.loads(text.splitlines()[-1])
            else:
                print(f"{case}: did not run, exit code {process.returncode}", file=sys.stderr)
        time.sleep(0.05)
    return found


def rows_of(case: str, ncu: str | None, wanted: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    """A row for each kernel of a case."""
    if ncu is not None:
        options = ["--profile-from-start", "off", "--kernel-name", "regex:^_", "--clock-control", "none"]
        options += ["--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(wanted)]
        found = subprocess.run(**child(case, "ncu", ncu, *options), capture_output=True, check=False, timeout=seconds)
        if found.returncode:
            raise ValueError(f"ncu ended with {found.returncode}: {(found.stdout + found.stderr)[-300:]!r}")
        yield from read_counters(found.stdout)
        return
    done = subprocess.run(**child(case, "torch"), capture_output=True, check=True, timeout=seconds)
    result = json.loads(done.stdout.splitlines()[-1])
    for kernel, ms in result["ms"].items():
        share, scarce = occupancy(result["needs"][kernel])
        yield {
            "kernel": kernel, "ms": round(ms, 4), "dram_pct": None, "tensor_pct": None, "occupancy": round(share, 1),
            "registers": result["needs"][kernel]["registers"], "limits_by": f"occupancy: {scarce}",
        }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help=f"OP:INDEX (repeatable; default: {' '.join(CASES)})")
    parser.add_argument("--ncu", help="Nsight Compute; default: the one on the path, or /usr/local/cuda/bin/ncu")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for DEVICE/profile.json")
    parser.add_argument("--seconds", type=float, default=900, help="stop after so many seconds with what is there")
    parser.add_argument("--jobs", type=int, default=4, help="cases that compile at a time")
    parser.add_argument("--commit", help="commit to note, where the code is a copy without history")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--profile", choices=("ncu", "torch"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.run:
        print(json.dumps(run_case(options.run, options.profile)))
        return 0
    until = time.monotonic() + options.seconds
    cases = options.case or list(CASES)
    compiled = compile_cases(cases, options.jobs, until)
    ncu = options.ncu or shutil.which("ncu", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin")
    wanted = counters(known_metrics(ncu)) if ncu else []
    about = describe(torch.device("cuda"), options.commit)
    content: dict[str, Any] = {**about, "command": "python -m benchmarks.kernel_profile"}
    notes: list[str] = []
    rows: list[dict[str, Any]] = []
    for case in cases:
        left = until - time.monotonic()
        if case not in compiled or left < 5:
            notes.append(f"{case} was not profiled: {'out of time' if left < 5 else 'it did not run'}")
            continue
        here = compiled[case]
        label = {"op": case.partition(":")[0], "dtype": here["dtype"], "size": here["size"]}
        try:
            found = list(rows_of(case, ncu, wanted, left))
        except (ValueError, subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            notes.append(f"{case}: {error}")
            if ncu is None or isinstance(error, subprocess.TimeoutExpired):
                continue
            ncu = None
            notes.append("ncu could not count: times of torch's profiler, occupancy that fits")
            found = list(rows_of(case, None, [], left))
        for row in merged(found):
            spilled = here["needs"].get(row["kernel"], {}).get("spilled")
            rows.append(label | row | {"spilled": spilled})
            print(*(f"{value}" for value in rows[-1].values()), sep=" | ", flush=True)
        write_json(
            options.out / folder_of(about["device"]) / "profile.json",
            content | {"notes": "; ".join(notes), "rows": rows},
        )
    print(*notes, sep="\n")
    return 0 if rows else 1


if __name__ == "__main__":
    leave(main)
