"""Arrays by name out of .npz files, without pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["read_arrays"]


def read_arrays(path: str | Path) -> dict[str, npt.NDArray[Any]]:
    """All arrays of a .npz file.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, is no such file, or holds objects, which only a pickle can.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(2, "No such file of arrays", str(path))
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: _plain(content[name]) for name in content.files}
    except PermissionError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds, MemoryError at an announced size
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{str(path)!r} is no readable .npz file of plain arrays: {reason}") from error


def _plain(value: Any) -> npt.NDArray[Any]:
    if not isinstance(value, np.ndarray):  # a member that is no array comes as bytes
        raise TypeError(f"it holds {type(value).__name__}, expected arrays")
    return value
