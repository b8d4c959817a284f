"""Finished parts of a long run in a folder beside its output, from which a killed run goes on.

OUT.parts/manifest.json      what is computed from what; a run that differs is refused
OUT.parts/part-000012.npz    columns of the 13th block of records, written whole or not at all
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..ssmcore.training.arrays import read_arrays
from ..ssmcore.training.checkpoints import owner, sweep, write_atomic
from ..ssmcore.training.lock import FolderLock
from .variant_scorer import Columns

MANIFEST = "manifest.json"


def unfinished(folder: Path) -> str:
    """What to say where a run would be started on top of another."""
    return f"{str(folder)!r} holds an unfinished run; go on with --resume true, or delete the folder"


class Parts:
    """The folder of a run.

    Args:
        folder: Where it is.
        manifest: What is computed from what, JSON-able.
    """

    def __init__(self, folder: str | Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = Path(folder), dict(manifest)
        self.lock = FolderLock(self.folder, ", or write to another --out")

    @classmethod
    def open(cls, folder: str | Path) -> Parts:
        """An existing folder.

        Raises:
            FileNotFoundError: if it has no manifest.
            ValueError: if that is damaged.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(2, "No parts of a run (manifest.json is missing)", str(folder))
        try:
            return cls(folder, json.loads(path.read_text()))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete the folder and start again") from error

    def start(self, *, resume: bool, shared: bool) -> None:
        """Claim the folder, or go on with what is in it.

        Args:
            resume: Go on with a killed run.
            shared: Other shards write here too.

        Raises:
            ValueError: if a run is in it and `resume` is False, the run in it computes something else, or, unless it is
                shared, another process works on it.
        """
        if (self.folder / MANIFEST).is_file():
            old = Parts.open(self.folder).manifest
            if not resume and not shared:
                raise ValueError(unfinished(self.folder))
            self.compare(old)
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder.parent, self.folder.name)
        if not shared:
            self.lock.acquire()
        if not (self.folder / MANIFEST).is_file():
            try:
                write_atomic(self.folder / MANIFEST, json.dumps(self.manifest, indent=1, sort_keys=True) + "\n")
            except OSError:
                self.leave_nothing()
                raise

    def compare(self, other: Mapping[str, Any]) -> None:
        """Refuse another run's manifest.

        Raises:
            ValueError: naming the first difference.
        """
        new = json.loads(json.dumps(self.manifest))
        for key in sorted(new.keys() | other.keys()):
            if new.get(key) != other.get(key):
                raise ValueError(
                    f"the run in {str(self.folder)!r} was started with {key} = {other.get(key)!r}, now it is"
                    f" {new.get(key)!r}; use the same inputs and options, or delete the folder"
                )

    def path(self, number: int) -> Path:
        """File of a part."""
        return self.folder / f"part-{number:06d}.npz"

    def write(self, number: int, columns: Columns) -> None:
        """Keep a part."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **columns)  # type: ignore[arg-type]
        write_atomic(self.path(number), buffer.getvalue())

    def read(self, number: int) -> Columns | None:
        """A part, or None where it is missing.

        Raises:
            ValueError: if the file is damaged.
        """
        path = self.path(number)
        if not path.is_file():
            return None
        try:
            return read_arrays(path)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); delete this file and use --resume true") from error

    def leave_nothing(self) -> None:
        """Delete the folder of a run that failed before its first part."""
        if not any(self.folder.glob("part-*.npz")):
            self.remove()

    def remove(self) -> None:
        """Delete the folder, which is gone in one step: a part that a kill leaves must not count for another run."""
        gone = self.folder.with_name(f".{self.folder.name}.{owner()}.old")
        with contextlib.suppress(FileNotFoundError):  # another shard was faster
            self.folder.rename(gone)
        self.lock.release()
        shutil.rmtree(gone, ignore_errors=True)
