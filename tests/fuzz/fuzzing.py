"""What all formats share: files made of a model of their data, damage, and a process that reads them under limits.

A whole file must give back what its model says. A damaged one is read or refused in one line: what a reader raises must
be what the command line takes for a fault of the user. A crash, a hang, or memory beyond the limit fails too.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
from damage import Damage, damages
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from omnissm.__main__ import is_bad_input, one_line

CPU_SECONDS, WALL_SECONDS = 10, 100  # the first for one file; the second also where another job has the processor
MEMORY = 2**30  # bytes that reading may take
ADDRESSES = 4 * 2**30  # of virtual memory: some libraries reserve a GiB when they are first used

SHARED_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # small files go nowhere near a disk

Payload = dict[str, bytes]


def write_all(payload: Mapping[str, bytes], folder: Path, model: Any) -> Path:
    """Every content as a file; the first is what is read."""
    for name, content in payload.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder / next(iter(payload))


@dataclass(frozen=True)
class Format:
    """One format and its reader.

    Attributes:
        name: Name in reports.
        models: Draws what a file holds, as plain values.
        payload: Contents that are damaged before they are packed, by name.
        read: Reads the file (or folder) and takes everything out of it.
        expected: What `read` must give for a whole file; None where a value is only read or refused.
        pack: Writes the payload and gives the path to read.
        weight: Share of the examples, for readers that take long.
        lenient: Whether a whole file may be refused too.
    """

    name: str
    models: st.SearchStrategy[Any]
    payload: Callable[[Any], Payload]
    read: Callable[[Path, Any], Any]
    expected: Callable[[Any], Any] | None = None
    pack: Callable[[Mapping[str, bytes], Path, Any], Path] = write_all
    weight: float = 1.0
    lenient: bool = False


@dataclass
class Report:
    """What became of the examples."""

    counts: Counter[str] = field(default_factory=Counter)
    peak: int = 0


def same(found: Any, wanted: Any, place: str = "value") -> None:
    """Compare plain values and arrays, NaN with NaN."""
    if isinstance(wanted, np.ndarray):
        np.testing.assert_array_equal(np.asarray(found), wanted, err_msg=place)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted), f"{place}: {list(found)} != {list(wanted)}"
        for key in wanted:
            same(found[key], wanted[key], f"{place}[{key!r}]")
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted), f"{place}: {len(found)} entries, expected {len(wanted)}"
        for k, (one, other) in enumerate(zip(found, wanted)):
            same(one, other, f"{place}[{k}]")
    else:
        assert found == wanted or (found != found and wanted != wanted), f"{place}: {found!r} != {wanted!r}"


class LateError(BaseException):
    """The processor time of one file is used up."""


def _late(*_: Any) -> None:
    raise LateError


def _serve(format: Format, folder: Path, pipe: Any) -> None:
    """Answer (model, damage) by (verdict, detail, peak bytes) until the other end closes."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # C libraries write what they think of damaged files
        os.dup2(quiet, stream)
    warnings.simplefilter("ignore")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, used + ADDRESSES))
    signal.signal(signal.SIGPROF, _late)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while True:
        try:
            model, damage = pipe.recv()
        except EOFError:
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        verdict, detail = _one(format, folder, model, damage)
        peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if peak > MEMORY:
            verdict, detail = "fault", f"took {peak / 2**20:.0f} MiB of memory"
        pipe.send((verdict, detail, peak))


def _one(format: Format, folder: Path, model: Any, damage: Damage | None) -> tuple[str, str]:
    try:
        payload = format.payload(model)
        if damage is not None and damage.inside:
            damage.change(payload)
        path = format.pack(payload, folder, model)
    except Exception as error:
        if damage is None or not damage.inside:
            return "fault", "".join(traceback.format_exception(error))
        return "unwritable", ""  # a writer of a library that does not take the damaged content
    if damage is not None and not damage.inside:
        damage.change_files(folder)
    if damage is None and format.expected is not None:
        wanted = format.expected(model)
    try:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        found = format.read(path, model)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if damage is None and format.expected is not None:
            same(found, wanted)
        return "read", ""
    except LateError:
        return "fault", f"took more than {CPU_SECONDS} s of processor time"
    except Exception as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        lawful = isinstance(error, (ValueError, TypeError, FileNotFoundError)) and is_bad_input(error)
        if (damage is not None or format.lenient) and lawful and one_line(error):
            return "refused", one_line(error)
        return "fault", "".join(traceback.format_exception(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@contextlib.contextmanager
def _worker(format: Format, folder: Path) -> Iterator[Callable[[Any, Damage | None], tuple[str, str, int]]]:
    context = multiprocessing.get_context("fork")
    started: list[Any] = []

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(format, folder, theirs), daemon=True)
        process.start()
        theirs.close()
        started[:] = [process, ours]

    def stop() -> str:
        process, pipe = started
        pipe.close()
        process.join(5)
        if process.exitcode is None:
            process.kill()
            process.join()
        return f"exit code {process.exitcode}"

    def ask(model: Any, damage: Damage | None) -> tuple[str, str, int]:
        if not started:
            start()
        pipe = started[1]
        pipe.send((model, damage))
        try:
            if pipe.poll(WALL_SECONDS):
                return pipe.recv()
            how = f"hung for {WALL_SECONDS} s"
        except EOFError:
            how = "died"
        how = f"the reading process {how}, {stop()}"
        started.clear()
        return "fault", how, 0

    try:
        yield ask
    finally:
        if started:
            stop()


def fuzz(format: Format, *, damaged: bool, examples: int, seed: int, scratch: Path, keep: Path) -> Report:
    """Read files of one format.

    Args:
        format: What to read.
        damaged: Whether files are damaged first.
        examples: How many.
        seed: Of the draws; equal seeds give equal files.
        scratch: Folder for the files.
        keep: Folder where a failing file is left, in NAME-whole or NAME-damaged.

    Raises:
        AssertionError: at a fault, after the example was made small.
    """
    folder, report = scratch / "file", Report()
    kind = "damaged" if damaged else "whole"
    with _worker(format, folder) as ask:

        @hypothesis.seed(seed)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
            print_blob=False,
        )
        @hypothesis.given(format.models, damages if damaged else st.none())
        def check(model: Any, damage: Damage | None) -> None:
            verdict, detail, peak = ask(model, damage)
            report.counts[verdict] += 1
            report.peak = max(report.peak, peak)
            if verdict != "fault":
                return
            place = keep / f"{format.name}-{kind}"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(folder, place, symlinks=True, dirs_exist_ok=True)
            facts = {"seed": seed, "damage": repr(damage), "model": repr(model), "fault": detail}
            (place / "FAULT.json").write_text(json.dumps(facts, indent=1))
            raise AssertionError(f"{format.name}, seed {seed}, {damage}: {detail}\nkept in {place}")

        check()
    return report
