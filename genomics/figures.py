"""What all figures of this package share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .files import atomic_path

STYLE = {
    "savefig.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "legend.frameon": False,
}


@contextmanager
def figure(rows: int, columns: int, *, width: float, height: float, sharex: bool = False) -> Iterator[tuple[Any, Any]]:
    """A figure and its (rows, columns) axes under the house style; closed at the end.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        import matplotlib as mpl
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('plots need matplotlib; run: pip install "omnissm[plot]"') from error
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        drawing, axes = plt.subplots(
            rows, columns, figsize=(width, height), squeeze=False, sharex=sharex, layout="constrained"
        )
        try:
            yield drawing, axes
        finally:
            plt.close(drawing)


def save(drawing: Any, out: str | Path) -> None:
    """Write a figure; it appears whole.

    Raises:
        ValueError: for a suffix other than .png, .pdf or .svg.
    """
    suffix = Path(out).suffix
    if suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"figure is {str(out)!r}, expected a name ending in .png, .pdf or .svg")
    with atomic_path(out) as temporary:
        drawing.savefig(temporary, format=suffix[1:])
