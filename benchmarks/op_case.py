"""One op at one size for `run.py`: what is timed there, how it is checked first, and how long it takes."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import omnissm.kernels
from omnissm.kernels import available_backends
from omnissm.kernels.testing import BenchSize, OpSpec, check_op, relative_error

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there under PYTHONSAFEPATH

from op_peers import FOR_SCALE, LONGEST_ATTENTION, PEERS

KERNELS = Path(omnissm.kernels.__file__).parent
COMPILED = "chunked, torch.compile"
LONG = 200.0  # milliseconds; longer runs are not recorded in a CUDA graph


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
        found = self.measure(run, 1)
        if self.cache is not None or found[0] < max(LONG, 1e4 * self.seconds):  # what is longer on a CPU runs once
            found = self.measure(run, 1)  # the first one compiled and loaded
        once = found[0] / 1e3
        if once < self.seconds:
            once = sum(self.measure(run, 3)) / 3e3
        if once < 10 * self.seconds:
            found = self.measure(run, max(5 if once < self.seconds else 3, min(200, int(self.seconds / once))))
        times = torch.tensor(found, dtype=torch.float64)
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

    def graph(self, run: Callable[[], Any], eager: dict[str, float]) -> dict[str, float] | None:
        """The same for a replayed CUDA graph: the GPU's time without Python's.

        None where there is no GPU, or the run waits for it, so that it cannot be recorded, or is so long that Python's
        time is nothing beside it.
        """
        if self.cache is None or eager["median"] > LONG:
            return None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        try:
            torch.cuda.set_sync_debug_mode("error")  # what waits is not recorded
            with torch.cuda.stream(stream):
                run()
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                run()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            # A recording that failed leaves the generator's state waiting for its end: take a new one.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())
            return None
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return self(graph.replay)


def copy_bandwidth(timer: Timer) -> float:
    """Bytes per second of a copy that is larger than any cache, read and write counted."""
    source = torch.empty((2**28 if timer.device.type == "cuda" else 2**25), device=timer.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer(lambda: target.copy_(source))["median"] * 1e3


class _Busy(torch.autograd.Function):
    """Takes the host a while, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        _spin()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        _spin()
        return dy


def _spin() -> None:
    end = time.perf_counter() + 2e-4
    while time.perf_counter() < end:
        pass


def autograd_thread(device: torch.device) -> float:
    """Milliseconds that a gradient takes longer on autograd's thread for the GPU than on the caller's.

    Autograd hands every gradient to that thread; both sleep while the other one works, here 0.2 ms each.
    """
    x = torch.ones(1, device=device, requires_grad=True)
    medians = []
    for threads in (True, False):
        with torch.autograd.set_multithreading_enabled(threads):
            times = []
            for _ in range(100):
                start = time.perf_counter()
                torch.autograd.grad(_Busy.apply(x), x, x.detach())
                times.append((time.perf_counter() - start) * 1e3)
        medians.append(sorted(times)[len(times) // 2])
    return medians[0] - medians[1]


class Case:
    """One op at one size: its inputs, what is timed with them, and the rows of the table.

    Attributes:
        checked: What came of comparing paths with the float64 reference, where that was done before: None or the error.
    """

    def __init__(self, spec: OpSpec, bench: BenchSize, device: torch.device) -> None:
        self.spec, self.bench, self.device = spec, bench, device
        self.first = spec.bench_sizes[:1] == (bench,)
        self.fastest = "triton" if "triton" in spec.implementations and device.type == "cuda" else "chunked"
        self.checked: dict[str, str | None] = {}

    def paths(self, stage: int) -> dict[str, Callable[..., Any] | str]:
        """What stands in the table, or why it is not timed: our fastest path first, then other paths and peers.

        On a GPU other paths of ours stand beside the first size only.
        """
        spec, size, on_gpu = self.spec, self.bench.size, self.device.type == "cuda"
        found: dict[str, Callable[..., Any] | str] = {}
        unavailable = available_backends(self.device)
        for name in spec.implementations:
            if (name == self.fastest) != (stage == 0) or (stage and on_gpu and not self.first):
                continue
            if name == "reference" and on_gpu:
                found[name] = "a loop in Python, too slow at this size"
            elif unavailable[name]:
                found[name] = str(unavailable[name])
            elif not spec.offers(name, size):
                found[name] = "does not take this size"
            else:
                found[name] = functools.partial(spec.op, backend=name)
        if stage:
            if True not in size.values():  # peers have no such options
                found.update(PEERS.get(spec.name, {}))
            if size.get("l", 0) <= LONGEST_ATTENTION:
                found.update(FOR_SCALE.get(spec.name, {}))
            if on_gpu and self.first:
                found[COMPILED] = self.checked.get(COMPILED) or self.compiled()
        return found

    def compiled(self) -> Callable[..., Any]:
        """The chunked path under torch.compile."""
        torch.compiler.reset()  # compiled code is kept per line of source: after eight cases torch would stop
        return torch.compile(lambda **arguments: self.spec.op(**arguments, backend="chunked"))

    def inputs(self) -> dict[str, Any]:
        generator = torch.Generator(self.device).manual_seed(0)
        return self.spec.make_inputs(**self.bench.size, dtype=self.bench.dtype, device=self.device, generator=generator)

    def rows(self, stage: int, timer: Timer, bandwidth: float) -> list[dict[str, Any]]:
        """Rows of one stage; what fails is named in its row and stops no other.

        Our fastest path is compared with the chunked one, all else with our fastest.
        """
        paths = self.paths(stage)
        if not any(callable(run) for run in paths.values()):
            return [self.row(name) | {"skipped": reason} for name, reason in paths.items()]
        inputs = self.inputs()
        with torch.no_grad():
            found = self.spec.op(**inputs, backend=self.fastest if stage else "chunked")
        expected = dict(zip(self.spec.outputs, found if isinstance(found, tuple) else (found,), strict=True))
        floor = byte_floor(inputs, expected)
        rows = []
        for name, run in paths.items():
            row = self.row(name)
            rows.append(row)
            if isinstance(run, str):
                row["skipped"] = run
                continue
            try:
                row |= self.time(name, run, inputs, expected, timer)
            except torch.OutOfMemoryError:
                row["skipped"] = "needs more memory than there is"
            except Exception as error:  # whatever a peer, a compiler or a driver may raise must not end the table
                row["wrong"] = f"{type(error).__name__}: {str(error)[:300]}"
            for which, bytes_moved in zip(("forward", "forward_backward"), floor):
                row[f"{which}_floor_ms"] = round(bytes_moved / bandwidth * 1e3, 4)
        return rows

    @property
    def place(self) -> tuple[dict[str, Any], str]:
        """Size and dtype as the rows have them."""
        return dict(self.bench.size), str(self.bench.dtype).removeprefix("torch.")

    def row(self, name: str) -> dict[str, Any]:
        size, dtype = self.place
        row: dict[str, Any] = {"size": size, "dtype": dtype, "path": name}
        for key in ("required_ms", "stretch_ms"):
            if (wanted := getattr(self.bench, key)) is not None:
                row[key] = list(wanted)
        return row if self.bench.required_mib is None else row | {"required_mib": self.bench.required_mib}

    def time(
        self, name: str, run: Callable[..., Any], inputs: dict[str, Any], expected: dict[str, Tensor], timer: Timer
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if name in FOR_SCALE.get(self.spec.name, {}):
            found["for_scale"] = True
        elif problem := self.find_error(name, run, inputs, expected):
            return {"wrong": problem}
        # Training uses the first output; a gradient for the state handed on would cost an extra pass in torch itself.
        both = training_step(run, inputs, torch.randn_like(expected[self.spec.outputs[0]]))
        if name in self.spec.implementations and name != "reference":
            found["repeatable"] = all(_same(one, two) for one, two in zip(both(), both(), strict=True))
        with torch.no_grad():
            forward = functools.partial(run, **inputs)
            found["forward_ms"] = timer(forward)
            found["forward_graph_ms"] = timer.graph(forward, found["forward_ms"])
        found["peak_mib"] = None
        if self.device.type == "cuda":
            before = reset_peak()
            both()
            found["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
        found["forward_backward_ms"] = timer(both)
        found["forward_backward_graph_ms"] = timer.graph(both, found["forward_backward_ms"])
        return found

    def find_error(
        self, name: str, run: Callable[..., Any], inputs: dict[str, Any], expected: dict[str, Tensor]
    ) -> str | None:
        """Why an implementation must not be timed.

        It is compared with the float64 reference at a smaller size of the same widths, for which the same kernels run,
        gradients included; and here with another path.
        """
        if name in self.spec.implementations and name != "reference":
            if name not in self.checked:
                self.checked[name] = self.check(name)
            if problem := self.checked[name]:
                return problem
        other = "chunked path" if self.fastest == "chunked" or name == self.fastest else f"{self.fastest} path"
        try:
            with torch.no_grad():
                found = run(**inputs)
            for (output, value), got in zip(expected.items(), found if isinstance(found, tuple) else (found,)):
                error, limit = relative_error(got, value), 2 * self.spec.limit(output, self.bench.dtype)
                if not error <= limit:
                    return f"`{output}` differs from the {other} by {error:.1e}, allowed {limit:.0e}"
        except AssertionError as error:
            return str(error)
        return None

    def check(self, name: str) -> str | None:
        """What is wrong with a path at sizes for which the float64 reference is quick, or None."""
        try:
            for size in smaller(self.spec, self.bench.size):
                check_op(self.spec, size, name, self.bench.dtype, self.device)
        except AssertionError as error:
            return str(error)
        return None

    def first_call(self, compiled: bool = False) -> float:
        """Compile what is timed later, our fastest path or `compiled`; seconds of the first forward and backward."""
        if self.bench.size.get("l", 0) > LONGEST_ATTENTION:  # the kernels are the same
            self.bench = replace(self.bench, size={**self.bench.size, "l": LONGEST_ATTENTION})
        inputs = self.inputs()
        run = self.compiled() if compiled else functools.partial(self.spec.op, backend=self.fastest)
        step = training_step(run, inputs)
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        with torch.no_grad():
            run(**inputs)
        torch.cuda.synchronize()
        return round(seconds, 2)


def smaller(spec: OpSpec, size: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Sizes at which the float64 reference, a loop in Python, is quick; of graphs those of the tests."""
    if "v" in size:
        return tuple(one for one in spec.test_sizes if one.keys() <= size.keys())[:2]
    # Grids take their parameters by groups of the batch.
    cut = {"b": max(2, size.get("g", 1)), "l": 130, "i": 14, "j": 14, "r": 64} | (
        {"k": 130} if spec.name == "fft_conv" else {}
    )
    return ({key: min(value, cut[key]) if key in cut else value for key, value in size.items()},)


def _same(one: Tensor | None, two: Tensor | None) -> bool:
    return one is two if one is None or two is None else torch.equal(one, two)


def training_step(
    run: Callable[..., Any], inputs: dict[str, Any], cotangent: Tensor | None = None
) -> Callable[[], Any]:
    """Forward and backward from the first output, from ones without a cotangent, to all floating inputs."""
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    arguments, wanted = {**inputs, **leaves}, list(leaves.values())

    def step() -> Any:
        found = run(**arguments)
        first = found[0] if isinstance(found, tuple) else found
        given = torch.ones_like(first) if cotangent is None else cotangent.view_as(first)
        return torch.autograd.grad(first, wanted, given, allow_unused=True)

    return step


def byte_floor(inputs: dict[str, Any], outputs: dict[str, Tensor]) -> tuple[int, int]:
    """Bytes of forward, and of forward and backward, if everything moves once.

    Backward reads the inputs (or as many bytes of saved states) and the gradients of the outputs and writes those of
    the inputs.
    """
    given = sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))
    made = sum(value.nbytes for value in outputs.values())
    return given + made, 3 * given + 2 * made


def reset_peak() -> int:
    """Bytes in use; from now on the most of them are noted anew."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
