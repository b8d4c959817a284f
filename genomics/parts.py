"""Finished parts of a long run in a folder beside its output, from which a killed run goes on.

OUT.parts/manifest.json      what is computed from what; a run that differs is refused
OUT.parts/part-000012.npz    columns of the 13th block of records, written whole or not at all
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..ssmcore.training.arrays import read_arrays
from ..ssmcore.training.checkpoints import write_atomic
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
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); delete the folder and start again") from error

    def start(self, *, resume: bool, shared: bool) -> None:
        """Claim the folder, or go on with what is in it.

        Args:
            resume: Go on with a killed run.
            shared: Other shards write here too.

        Raises:
            ValueError: if a run is in it and `resume` is False, or the run in it computes something else.
        """
        if (self.folder / MANIFEST).is_file():
            old = Parts.open(self.folder).manifest
            if not resume and not shared:
                raise ValueError(unfinished(self.folder))
            self.compare(old)
            return
        write_atomic(self.folder / MANIFEST, json.dumps(self.manifest, indent=1, sort_keys=True) + "\n")

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
        """Delete the folder; its manifest goes first, so that a rest is no run."""
        (self.folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
