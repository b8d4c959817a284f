"""Demos, each in a process of its own and two at a time, and one page about all of them."""

from __future__ import annotations

import html
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from .training.checkpoints import write_atomic
from .training.report import PAGE, SUMMARY, render, whole_page

LOG = "log.txt"
_TOGETHER = 2  # processes at a time, each on one core
_TAIL = 12  # lines of the log that the page shows of a demo that failed


@dataclass(frozen=True)
class Outcome:
    """What became of one demo.

    Attributes:
        name: Its name, and that of its folder.
        code: Exit code of its process.
        seconds: Wall clock.
        cpu_seconds: Of the processor, user and system.
        summary: Its page as Markdown, "" if it has not come so far.
        tail: Last lines of its output.
    """

    name: str
    code: int
    seconds: float
    cpu_seconds: float
    summary: str
    tail: str


def run_demos(parts: Mapping[str, str], out: Path) -> int:
    """Run `omnissm demo NAME --out OUT/NAME` for each name, and write OUT/report.html about all of them.

    A demo that fails does not keep the others from running; the page says how it ended.

    Args:
        parts: Names of demos, and what each shows.
        out: Folder. Files of earlier demos in it are replaced, others stay as they are.

    Returns:
        0, or 1 if any demo failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Outcome] = {}
    with ThreadPoolExecutor(min(_TOGETHER, os.cpu_count() or 1)) as pool:
        running = [pool.submit(_run, name, out / name) for name in parts]
        for done in as_completed(running):
            found[done.result().name] = done.result()
            outcomes = [found[name] for name in parts if name in found]
            write_atomic(out / PAGE, compose(outcomes, parts))  # one that is interrupted leaves those before it
    for one in outcomes:
        ended = "done" if one.code == 0 else f"FAILED, exit code {one.code}"
        sys.stdout.write(f"{one.name:<12} {ended}; {one.seconds:.0f} s, {one.cpu_seconds:.0f} s of processor time\n")
    sys.stdout.write(f"Open {out / PAGE}\n")
    return int(any(one.code for one in outcomes))


def _run(name: str, folder: Path) -> Outcome:
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (SUMMARY, PAGE):  # of an earlier run; this one may not come so far
        (folder / stale).unlink(missing_ok=True)
    command = [sys.executable, "-m", "omnissm", "demo", name, "--out", str(folder)]
    safe = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}  # our folders hide no other packages
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **safe}
    clock, lines = time.perf_counter(), []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    ) as process:
        assert process.stdout is not None  # it is a pipe
        for line in process.stdout:
            sys.stdout.write(f"{name:<10} | {line}")
            sys.stdout.flush()
            lines.append(line)
        _, status, usage = os.wait4(process.pid, 0)  # unlike `wait` it tells the processor time
        process.returncode = os.waitstatus_to_exitcode(status)
    write_atomic(folder / LOG, "".join(lines))
    summary = (folder / SUMMARY).read_text() if (folder / SUMMARY).is_file() else ""
    seconds, spent = time.perf_counter() - clock, usage.ru_utime + usage.ru_stime
    return Outcome(name, process.returncode, seconds, spent, summary, "".join(lines[-_TAIL:]))


def compose(outcomes: list[Outcome], parts: Mapping[str, str]) -> str:
    """The page: a table of all demos, then what each says of itself.

    Args:
        outcomes: What became of them.
        parts: What each shows.

    Returns:
        HTML; pictures and links lead into a folder for each demo.
    """
    rows = [
        f'<tr><td><a href="#{one.name}">{one.name}</a></td><td>{_verdict(one)}</td>'
        f"<td>{one.seconds:.0f} s ({one.cpu_seconds:.0f} s)</td></tr>\n"
        for one in outcomes
    ]
    intro = (
        "<h1>omnissm: what it does, tried on this machine</h1>\n<p>Each part below was trained, scored or drawn just "
        "now by the commands it shows, which work the same on your own data. All files lie in the folder of the part, "
        "beside this page.</p>\n<table><tr><th>part</th><th>result</th><th>time (of the processor)</th></tr>\n"
    )
    waiting = [name for name in parts if name not in {one.name for one in outcomes}]
    rest = f"<p>Still to come: {', '.join(waiting)}.</p>\n" if waiting else ""
    sections = "".join(f'<hr><section id="{one.name}">\n{_section(one)}</section>\n' for one in outcomes)
    return whole_page("omnissm demo", f"{intro}{''.join(rows)}</table>\n{rest}{sections}")


def _verdict(one: Outcome) -> str:
    paragraphs = one.summary.split("\n\n")
    said = render(paragraphs[1]) if len(paragraphs) > 1 else ""
    if one.code == 0:
        return said
    why = "did not reach what it should" if one.summary else f"failed, exit code {one.code}"
    return f'{said}<p class="failed">{why}</p>'


def _section(one: Outcome) -> str:
    if one.summary:
        return render(one.summary, one.name)
    last = f'<pre class="failed">{html.escape(one.tail)}</pre>'
    return f'<h1>{one.name}</h1>\n<p>It failed; <a href="{one.name}/{LOG}">its output</a> ends with:</p>\n{last}\n'
