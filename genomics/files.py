"""Files of this domain: whole or refused on reading, whole or absent on writing."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..ssmcore.training.checkpoints import owner, sweep

csv.field_size_limit(2**31 - 1)  # sequences stand in fields of tables

BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


def is_gzip(path: str | Path) -> bool:
    """Whether a file begins as gzip or BGZF."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def is_bgzf(path: str | Path) -> bool:
    """Whether a file begins as BGZF, the gzip of independent blocks that can be read in part."""
    with open(path, "rb") as file:
        head = file.read(16)
    return head.startswith(b"\x1f\x8b") and head[12:14] == b"BC"


def check_whole(path: str | Path) -> None:
    """Refuse a BGZF file without its end marker: it was cut between two blocks, which no reader notices.

    Raises:
        ValueError: if the marker is missing.
    """
    if not is_bgzf(path):
        return
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - len(BGZF_END)))
        if file.read() != BGZF_END:
            raise ValueError(f"{path} is cut off: the end marker of BGZF is missing; fetch it again")


@contextlib.contextmanager
def open_lines(path: str | Path) -> Iterator[IO[bytes]]:
    """A file as bytes, unpacked where it is gzip; `-` is standard input.

    Raises:
        ValueError: if a packed file is damaged or cut off, at the latest where that is read.
    """
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    if not Path(path).is_file():
        raise FileNotFoundError(2, "No such file", str(path))
    check_whole(path)
    try:
        with gzip.open(path) if is_gzip(path) else open(path, "rb") as file:
            yield file  # type: ignore[misc]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or cut off ({error}); fetch it again") from error


def text_lines(path: str | Path) -> Iterator[str]:
    """Lines of a text file in UTF-8, with or without a byte order mark, unpacked where it is gzip.

    Raises:
        ValueError: at a line that is no such text, with its number.
    """
    with open_lines(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                yield (raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw).decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: expected text in UTF-8, got the byte {raw[error.start]:#04x}; is it a"
                    " text file?"
                ) from error


def table_rows(path: str | Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields of the rows of a table in text; the first one names the columns.

    Raises:
        ValueError: if it has no rows, names a column twice, or cannot be read.
    """
    rows = csv.reader(text_lines(path), delimiter=delimiter)
    first = True
    try:
        for row in rows:
            if not row:
                continue
            if first and len(set(row)) < len(row):
                twice = next(name for k, name in enumerate(row) if name in row[:k])
                raise ValueError(f"{path}: two columns are named {twice!r}; rename one")
            first = False
            yield rows.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}; is it a table in text?") from error
    if first:
        raise ValueError(f"{path} is empty; expected a line with the names of columns")


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder that takes the place of `path` on success and vanishes on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    temporary = path.with_name(f".tmp.{owner()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)  # a full disk names no file by itself
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def open_out(path: str | Path) -> Iterator[IO[str]]:
    """A text file that appears whole at the end; packed where its name ends in `.gz`; `-` is standard output.

    Bytes that were no UTF-8 in the file they come from are written as they were.
    """
    if str(path) == "-":
        yield sys.stdout
        sys.stdout.flush()
        return
    with atomic_path(path) as temporary:
        if str(path).endswith(".gz"):
            # No time stamp in the header: equal content gives equal files.
            with (
                open(temporary, "wb") as raw,
                gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
                io.TextIOWrapper(packed, "utf-8", "surrogateescape", newline="\n") as file,
            ):
                yield file
        else:
            with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
                yield file
