"""Verbs that keep what is finished: Ctrl-C, a request to end (SIGTERM) and a full disk say how to go on."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["interruptible"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def interruptible(advice: str) -> Iterator[None]:
    """Turn an interrupt inside the block into one line on stderr and an exit code; say at a full disk how to go on.

    Args:
        advice: How to go on, a sentence.

    Raises:
        SystemExit: with code 130 after SIGINT, 143 after SIGTERM.
        OSError: that of a full disk, with the advice.
    """
    before = signal.getsignal(signal.SIGTERM)
    mine = threading.current_thread() is threading.main_thread() and before is not None
    if mine:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"Interrupted. {advice}\n")
        raise SystemExit(143 if isinstance(stop, _Terminated) else 130) from stop
    except OSError as error:
        if error.errno in _FULL:
            place = f": {error.filename!r}" if error.filename else ""
            raise OSError(f"{os.strerror(error.errno)}{place}. {advice}") from error
        raise
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated
