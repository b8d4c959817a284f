"""Time the ops of `omnissm.kernels` at the sizes of their `spec.py` and write one JSON file per op and device.

    python -m benchmarks.run --all [--device cpu|cuda] [--base FILE]      (or --op linear_scan ...)

An implementation is checked before it is timed; one that is wrong is reported and not timed. See README.md here.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import omnissm.kernels
from omnissm.kernels import available_backends
from omnissm.kernels.testing import BenchSize, OpSpec, check_op, relative_error

HERE = Path(__file__).resolve().parent
KERNELS = Path(omnissm.kernels.__file__).parent


def conv1d_of_torch(x: Tensor, weight: Tensor, bias: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    k = weight.shape[1]
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y = F.conv1d(F.pad(x.mT, (k - 1, 0)), weight[:, None], bias, groups=weight.shape[0])
    return F.silu(y).mT, x[:, 1 - k :].mT


def rms_norm_of_torch(x: Tensor, z: Tensor, weight: Tensor, eps: float, **_: Any) -> Tensor:
    return F.rms_norm(x * F.silu(z), (x.shape[-1],), weight.to(x.dtype), eps)


def convolution_of_torch(x: Tensor, kernel: Tensor, D: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    length = x.shape[1] + kernel.shape[1]
    wide = x.float().mT
    y = torch.fft.irfft(torch.fft.rfft(wide, length) * torch.fft.rfft(kernel, length), length)[..., : x.shape[1]]
    return (y + D[:, None] * wide).mT.to(x.dtype), x[:, x.shape[1] + 1 - kernel.shape[1] :].mT


def attention_of_torch(x: Tensor, is_causal: bool = True, **_: Any) -> Tensor:
    """Attention with as many heads of the same width; on a GPU and in 16 bit, flash attention."""
    heads = x.transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, is_causal=is_causal).transpose(1, 2)


# What torch itself offers for the same result.
PEERS: dict[str, dict[str, Callable[..., Any]]] = {
    "causal_conv1d": {"torch conv1d": conv1d_of_torch},
    "gated_norm": {"torch rms_norm": rms_norm_of_torch},
    "fft_conv": {"torch fft": convolution_of_torch},
}
# What does another thing at the same shape, for scale: not compared with ours, and left out for very long rows.
FOR_SCALE: dict[str, dict[str, Callable[..., Any]]] = {
    "ssd": {"torch attention": attention_of_torch},
    "trapezoid_ssd": {"torch attention": attention_of_torch},
    "quasiseparable": {"torch attention": functools.partial(attention_of_torch, is_causal=False)},
}
LONGEST_ATTENTION = 2**17


def read_specs() -> dict[str, OpSpec]:
    """The specs of all ops, by name."""
    found = {}
    for path in sorted(KERNELS.glob("*/spec.py")):
        module = import_module(f"omnissm.kernels.{path.parent.name}.spec")
        found.update({spec.name: spec for spec in vars(module).values() if isinstance(spec, OpSpec)})
    return found


class Timer:
    """Milliseconds of a function: median, 20th and 80th percentile."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        # Written between runs, so that nothing of the last run is left in the caches of the GPU.
        self.cache = torch.empty(64 * 2**20, device=device) if device.type == "cuda" else None

    def __call__(self, run: Callable[[], Any]) -> dict[str, float]:
        for _ in range(3):
            run()
        once = sum(self.measure(run, 3)) / 3
        times = torch.tensor(self.measure(run, max(5, min(200, int(self.seconds / once * 1e3)))), dtype=torch.float64)
        low, middle, high = torch.quantile(times, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        return {"median": round(middle, 4), "p20": round(low, 4), "p80": round(high, 4), "runs": len(times)}

    def measure(self, run: Callable[[], Any], count: int) -> list[float]:
        if self.cache is None:
            times = []
            for _ in range(count):
                start = time.perf_counter()
                run()
                times.append((time.perf_counter() - start) * 1e3)
            return times
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for begin, end in events:
            self.cache.zero_()
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]

    def graph(self, run: Callable[[], Any]) -> dict[str, float] | None:
        """The same for a replayed CUDA graph: the GPU's time without Python's. None where there is no GPU."""
        if self.cache is None:
            return None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return self(graph.replay)


def copy_bandwidth(timer: Timer) -> float:
    """Bytes per second of a copy that is larger than any cache, read and write counted."""
    source = torch.empty((2**28 if timer.device.type == "cuda" else 2**25), device=timer.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer(lambda: target.copy_(source))["median"] * 1e3


def bench(spec: OpSpec, case: BenchSize, device: torch.device, timer: Timer, bandwidth: float) -> list[dict[str, Any]]:
    """Rows of one op at one size: one per implementation and peer."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = spec.make_inputs(**case.size, dtype=case.dtype, device=device, generator=generator)
    unavailable = available_backends(device)
    runs: dict[str, Callable[..., Any] | str] = {}
    for name in spec.implementations:
        if name == "reference" and device.type == "cuda":
            runs[name] = "a loop in Python, too slow at this size"
        elif unavailable[name]:
            runs[name] = str(unavailable[name])
        elif not spec.offers(name, case.size):
            runs[name] = "does not take this size"
        else:
            runs[name] = lambda backend=name, **arguments: spec.op(**arguments, backend=backend)
    if device.type == "cuda":
        torch.compiler.reset()  # compiled code is kept per line of source: after eight cases torch would stop compiling
        compiled = torch.compile(lambda **arguments: spec.op(**arguments, backend="chunked"))
        runs["chunked, torch.compile"] = compiled
    runs.update(PEERS.get(spec.name, {}))
    for_scale = FOR_SCALE.get(spec.name, {}) if case.size.get("l", 0) <= LONGEST_ATTENTION else {}
    runs.update(for_scale)

    with torch.no_grad():
        found = spec.op(**inputs, backend="chunked")
    expected = dict(zip(spec.outputs, found if isinstance(found, tuple) else (found,), strict=True))
    # Training uses the first output; a gradient for the state handed on would cost an extra pass in torch itself.
    cotangent = torch.randn_like(expected[spec.outputs[0]])
    floor = byte_floor(inputs, expected)
    rows = []
    for name, run in runs.items():
        row: dict[str, Any] = {"size": dict(case.size), "dtype": str(case.dtype).removeprefix("torch."), "path": name}
        rows.append(row)
        if isinstance(run, str):
            row["skipped"] = run
            continue
        if name in for_scale:
            row["for_scale"] = True
        elif problem := find_error(spec, case, name, run, inputs, expected, device):
            row["wrong"] = problem
            continue
        both = training_step(run, inputs, cotangent)
        with torch.no_grad():
            forward = functools.partial(run, **inputs)
            row["forward_ms"], row["forward_graph_ms"] = timer(forward), timer.graph(forward)
        before = reset_peak(device)
        both()
        row["peak_mib"] = None if before is None else round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
        row["forward_backward_ms"], row["forward_backward_graph_ms"] = timer(both), timer.graph(both)
        for which, bytes_moved in zip(("forward", "forward_backward"), floor):
            row[f"{which}_floor_ms"] = round(bytes_moved / bandwidth * 1e3, 4)
        for key in ("required_ms", "stretch_ms"):
            if (wanted := getattr(case, key)) is not None:
                row[key] = list(wanted)
    return rows


def training_step(run: Callable[..., Any], inputs: dict[str, Any], cotangent: Tensor) -> Callable[[], Any]:
    """Forward and backward from the first output to all floating inputs."""
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    arguments, wanted = {**inputs, **leaves}, list(leaves.values())

    def step() -> Any:
        found = run(**arguments)
        first = found[0] if isinstance(found, tuple) else found
        return torch.autograd.grad(first, wanted, cotangent.view_as(first), allow_unused=True)

    return step


def byte_floor(inputs: dict[str, Any], outputs: dict[str, Tensor]) -> tuple[int, int]:
    """Bytes of forward, and of forward and backward, if everything moves once.

    Backward reads the inputs (or as many bytes of saved states) and the gradients of the outputs and writes those of
    the inputs.
    """
    given = sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))
    made = sum(value.nbytes for value in outputs.values())
    return given + made, 3 * given + 2 * made


def find_error(
    spec: OpSpec,
    case: BenchSize,
    name: str,
    run: Callable[..., Any],
    inputs: dict[str, Any],
    expected: dict[str, Tensor],
    device: torch.device,
) -> str | None:
    """Why an implementation must not be timed: wrong at a test size, or at this size other than the chunked path."""
    try:
        if name in spec.implementations and name != "reference":
            for size in spec.test_sizes:
                if spec.offers(name, size):
                    check_op(spec, size, name, case.dtype, device)
        with torch.no_grad():
            found = run(**inputs)
        for (output, value), got in zip(expected.items(), found if isinstance(found, tuple) else (found,)):
            error, limit = relative_error(got, value), 2 * spec.limit(output, case.dtype)
            if not error <= limit:
                return f"`{output}` differs from the chunked path by {error:.1e}, allowed {limit:.0e}"
    except AssertionError as error:
        return str(error)
    return None


def reset_peak(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


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


def report(spec: OpSpec, rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> None:
    for row in rows:
        line = f"{spec.name:18} {row['size']!s:58} {row['dtype']:9} {row['path']:24}"
        if "forward_ms" not in row:
            print(line, "skipped: " + row["skipped"] if "skipped" in row else "WRONG: " + row["wrong"])
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
        for old in base:
            if all(old.get(key) == row[key] for key in ("size", "dtype", "path")) and "forward_ms" in old:
                ratios = [row[key]["median"] / old[key]["median"] for key in ("forward_ms", "forward_backward_ms")]
                line += f"  {ratios[0]:.2f}x / {ratios[1]:.2f}x of base"
        print(line, flush=True)


def main(argv: list[str] | None = None) -> int:
    specs = read_specs()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all ops, as without --op")
    parser.add_argument("--op", action="append", choices=sorted(specs), help="op to time (repeatable; default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--base", type=Path, help="earlier result file to compare with")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for DEVICE/OP.json")
    parser.add_argument("--seconds", type=float, default=0.3, help="time to spend on each number")
    parser.add_argument("--commit", help="commit to note, where the code is a copy without history")
    options = parser.parse_args(argv)
    if options.all and options.op:
        parser.error("--all and --op exclude each other")

    device = torch.device(options.device)
    timer = Timer(device, options.seconds)
    about = describe(device, options.commit)
    bandwidth = copy_bandwidth(timer)
    about["copy_gb_per_s"] = round(bandwidth / 1e9, 1)
    print(*(f"{key} {value}" for key, value in about.items() if value is not None), sep=", ")
    base = json.loads(options.base.read_text())["rows"] if options.base else []
    wrong = False
    for name in options.op or sorted(specs):
        spec = specs[name]
        rows: list[dict[str, Any]] = []
        cases = spec.bench_sizes if device.type == "cuda" else spec.cpu_bench_sizes
        if not cases:
            print(f"{name}: spec.py names no sizes for {device.type}, nothing to time")
            continue
        for case in cases:
            rows += bench(spec, case, device, timer, bandwidth)
        report(spec, rows, base)
        wrong |= any("wrong" in row for row in rows)
        write_json(options.out / folder_of(about["device"]) / f"{name}.json", {**about, "op": name, "rows": rows})
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
