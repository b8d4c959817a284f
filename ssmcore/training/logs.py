"""`metrics.csv` of a run: every row that is seen is whole, and nothing is written before training has begun."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from .checkpoints import write_atomic

__all__ = ["MetricsFile", "whole_lines"]


class MetricsFile(Logger):
    """Logger into one CSV file, a column per metric in alphabetical order, `epoch` and `step` among them.

    Rows are appended by one write each time; a new column rewrites the file and puts it in place at once. Until
    `begin`, rows are kept in memory: an earlier file stays until the run that replaces it has made a step.

    Args:
        path: The file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._begun = False
        self._names: list[str] = []
        self._rows: list[dict[str, Any]] = []

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """None: a run has one file."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.path.parent)

    def begin(self) -> None:
        """Write from now on."""
        self._begun = True
        self.save()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep one row."""
        self._rows.append({**metrics, "step": step})

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that are not yet in the file.

        Raises:
            OSError: if it cannot be written; the file holds the earlier rows.
        """
        if not self._begun or not self._rows:
            return
        names = sorted({*self._names, *(name for row in self._rows for name in row)})
        if names != self._names or not self.path.is_file():
            earlier = list(csv.DictReader(io.StringIO(whole_lines(self.path)))) if self._names else []
            write_atomic(self.path, _text(names, [*earlier, *self._rows], header=True))
        else:
            _append(self.path, _text(names, self._rows, header=False).encode())
        self._names, self._rows = names, []

    def finalize(self, status: str) -> None:
        """Write what is left. After an error that one is told, not a full disk that this would meet once more."""
        with contextlib.suppress(*(() if status == "success" else (OSError,))):
            self.save()


def whole_lines(path: Path) -> str:
    """Text of a file up to its last line break, as a kill or a full disk may have cut the line after it.

    Returns:
        The text; empty if there is no file.
    """
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    return text[: text.rfind("\n") + 1]


def _text(names: list[str], rows: list[dict[str, Any]], header: bool) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _append(path: Path, content: bytes) -> None:
    """Append all or nothing."""
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            while content:
                content = content[file.write(content) or 0 :]
        except OSError as error:
            file.truncate(size)
            raise OSError(error.errno, error.strerror, str(path)) from error
