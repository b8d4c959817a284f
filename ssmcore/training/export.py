"""The verb `export`: from a checkpoint to a model folder."""

from __future__ import annotations

import sys
from pathlib import Path

from .checkpoints import export_checkpoint


def export(checkpoint: Path, out: Path, raw: bool = False) -> None:
    """Turn a checkpoint into a model folder, which loads without the training code.

    Args:
        checkpoint: A .ckpt file, or a run's folder, of which the best checkpoint is taken.
        out: Folder to write; an older model folder of that name is replaced.
        raw: Of a run with averaged weights, take the last ones instead of the average.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the file is damaged or foreign.

    Example:
      omnissm timeseries export --checkpoint runs/NAME --out model
    """
    folder = export_checkpoint(best_checkpoint(checkpoint), out, raw=raw)
    sys.stdout.write(f"{folder}\n")


def best_checkpoint(path: Path) -> Path:
    """The file itself, or of a run's folder the best checkpoint, or its last one where nothing was validated.

    Raises:
        FileNotFoundError: if there is none.
    """
    if path.is_file() or path.suffix == ".ckpt":
        return path
    for name in ("best.ckpt", "last.ckpt"):
        if (found := path / "checkpoints" / name).is_file():
            return found
    raise FileNotFoundError(f"{str(path)!r} holds no checkpoints/best.ckpt or last.ckpt. Run `fit` first.")
