"""One writer per folder: a lock that goes with its process, however that ends."""

from __future__ import annotations

import errno
import logging
import os
import socket
from pathlib import Path

__all__ = ["FolderLock"]

NAME = ".lock"
log = logging.getLogger(__name__)


class FolderLock:
    """A lock on a folder, held by a file in it; the system frees it when the process ends, also by a kill.

    Systems and file systems that know no such locks are used without one.

    Args:
        folder: An existing folder, by the time it is locked.
        advice: What else to do while another process has it, for the message.
    """

    def __init__(self, folder: str | os.PathLike, advice: str = "") -> None:
        self.path, self.advice = Path(folder) / NAME, advice
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock; once taken, nothing happens.

        Raises:
            ValueError: if another process has it; the message names that process.
            OSError: if the folder cannot be written.
        """
        try:
            import fcntl
        except ImportError:
            return
        while self._handle is None:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = os.pread(handle, 200, 0).decode(errors="replace").strip()
                os.close(handle)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    advice = f" Wait for it, stop it{self.advice}."
                    raise ValueError(
                        f"{str(self.path.parent)!r} is being written by {owner or 'another process'}.{advice}"
                    ) from error
                log.debug("%s is not locked: %s", self.path.parent, error)
                self.path.unlink(missing_ok=True)
                return
            if not _is_at(handle, self.path):  # its owner has just removed it
                os.close(handle)
                continue
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            self._handle = handle

    def release(self) -> None:
        """Give the lock back and remove its file."""
        if self._handle is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
