"""Commands in processes that can be hurt, and whose output and file operations are seen.

They are killed with all their children at a file operation or a moment, or have no disk space or no rights.

The processes are forked from a server that has the package imported, so that each starts in a moment. Runs as root lose
the right to pass over permissions, where a test is about permissions.
"""

import ctypes
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

DOMAINS = ("timeseries", "genomics", "vision", "graphs")
PRELOADED = ["omnissm.ssmcore.training.cli", "omnissm.genomics.scoring", "omnissm.genomics.loading"]
PRELOADED += [f"omnissm.{domain}.{part}" for domain in DOMAINS for part in ("tasks", "data")]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)
WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"}
FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
LIMIT = 60.0


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code (negative for a signal), what it said, and the time of each file operation."""

    code: int
    out: str
    err: str
    moments: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Harm:
    """What happens to a command.

    Attributes:
        at_operation: Kill the process group before this file operation (1-based).
        file_size: No file may grow above so many bytes, as on a full disk.
        obey: Give up root's right to pass over permissions.
        patch: Called in the process before the command.
    """

    at_operation: int = 0
    file_size: int = 0
    obey: bool = False
    patch: Callable[[], None] | None = None


def begin(words: Sequence[str], folder: Path, harm: Harm = Harm()) -> "Running":
    """Start `omnissm WORDS` in `folder`."""
    return Running(words, folder, harm)


def finish(words: Sequence[str], folder: Path, harm: Harm = Harm()) -> Ended:
    """Run `omnissm WORDS` in `folder` to its end."""
    return begin(words, folder, harm).wait()


class Running:
    """A command that runs, with a process group of its own."""

    def __init__(self, words: Sequence[str], folder: Path, harm: Harm) -> None:
        self.moments = Path(tempfile.mkdtemp(prefix="moments", dir=folder.parent)) / "moments"
        ready, sign = CONTEXT.Pipe(duplex=False)
        self.said = [_Said(), _Said()]
        ends = [said.end for said in self.said]
        self.process = CONTEXT.Process(target=_run, args=(list(words), folder, self.moments, harm, sign, ends))
        self.process.start()
        for end in (sign, *ends):
            end.close()
        if not ready.poll(LIMIT):
            raise TimeoutError("the command did not start")
        self.started = ready.recv()

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: int, group: bool = True) -> None:
        """Send a signal to all processes of the command, or to its first one."""
        (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, seconds: float = LIMIT) -> Ended:
        """Its end; after `seconds` it is killed as hanging."""
        self.process.join(seconds)
        hangs = self.process.is_alive()
        if hangs:
            self.signal(signal.SIGKILL)
            self.process.join()
        out, err = (said.text() for said in self.said)
        if hangs:
            raise TimeoutError(f"no end after {seconds} s: {err[-2000:]}")
        return Ended(self.process.exitcode, out, err, [float(line) for line in self.moments.read_text().split()])

    def wait_for(self, happened: Callable[[], bool], seconds: float = LIMIT) -> None:
        """Wait until something is seen from outside.

        Raises:
            AssertionError: if the command ends first, or does not do it in time.
        """
        end = time.monotonic() + seconds
        while not happened():
            assert self.process.is_alive(), f"ended too early: {self.wait().err[-2000:]}"
            assert time.monotonic() < end, "did not happen in time"
            time.sleep(0.005)

    def kill_after(self, seconds: float) -> Ended:
        """Kill the group so long after its start, if it is still there."""
        self.process.join(max(0.0, self.started + seconds - time.monotonic()))
        if self.process.is_alive():
            self.signal(signal.SIGKILL)
        return self.wait()


class _Said(threading.Thread):
    """Takes what is written into one end of a pipe; a file would have the limits of the command."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._start, self.end = CONTEXT.Pipe(duplex=False)
        self._parts: list[bytes] = []
        self.start()

    def run(self) -> None:
        while part := os.read(self._start.fileno(), 65536):
            self._parts.append(part)

    def text(self) -> str:
        """All that was written, once the command has ended; its orphans may live a little longer."""
        self.join(5.0)
        return b"".join(self._parts).decode()


def _run(words: list[str], folder: Path, moments: Path, harm: Harm, sign, ends) -> None:
    """The process: a group of its own, output into pipes, then the command."""
    os.setsid()
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)  # as in a process of the user's
    for number, end in zip((1, 2), ends):
        os.dup2(end.fileno(), number)
        end.close()
    import torch

    from omnissm.__main__ import main

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if harm.obey:
        obey_permissions()
    moments.touch()
    if harm.file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (harm.file_size, harm.file_size))
    if harm.patch:
        harm.patch()
    started = time.monotonic()
    if not harm.file_size:
        _watch(str(folder), moments, started, harm.at_operation)
    sign.send(started)
    sign.close()
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _watch(folder: str, moments: Path, started: float, at_operation: int) -> None:
    """Note when files below `folder` change, and kill the group at one of these moments."""
    file, count = os.open(moments, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event == "open":
            if not isinstance(args[0], str) or not (args[2] or 0) & FLAGS:
                return
        elif event not in WRITES:
            return
        path = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else ""
        inside = os.path.isabs(path) and path.startswith(folder)
        relative = path and not os.path.isabs(path) and os.getcwd() == folder
        if not (inside or relative):
            return
        count += 1
        if count == at_operation:
            os.killpg(0, signal.SIGKILL)
        os.write(file, f"{time.monotonic() - started:.4f}\n".encode())

    sys.addaudithook(hook)


def obey_permissions() -> None:
    """Drop the capabilities by which root passes over permissions of files."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    if libc.syscall(_CAPGET, header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for first in (0, 1, 2):  # effective, permitted, inheritable; bits: override, read search, owner
        sets[first] &= ~0b1110
    if libc.syscall(_CAPSET, header, sets):
        raise OSError(ctypes.get_errno(), "capset")


_CAPGET, _CAPSET = (90, 91) if os.uname().machine == "aarch64" else (125, 126)


def kill_often(
    start: Sequence[str],
    resume: Callable[[], Sequence[str]],
    folder: Path,
    moments: Sequence[float],
    kills: int,
    dice: random.Random,
    done: list[str],
) -> None:
    """Start a command, kill it so many times, each time going on as the documents say, and let it end.

    Args:
        start: The command.
        resume: The words to go on with, by what is in the folder.
        folder: Where it runs.
        moments: When an undisturbed run changed files; every other kill is at one of these, the others between them.
        kills: How often.
        dice: Randomness.
        done: Takes what was done, for the message of a failing test.
    """
    words = list(start)
    for number in range(kills):
        if number % 2 == 0:
            operation = dice.randint(1, len(moments))
            ended = finish(words, folder, Harm(at_operation=operation))
            done.append(f"operation {operation}: {ended.code}")
        else:
            moment = dice.uniform(0.9 * moments[0], moments[-1])
            ended = begin(words, folder).kill_after(moment)
            done.append(f"{moment:.3f} s: {ended.code}")
        assert ended.code in (0, -signal.SIGKILL), (words, ended.err[-2000:])
        words = list(resume())
    ended = finish(words, folder)
    assert ended.code == 0, (words, ended.err[-2000:])
