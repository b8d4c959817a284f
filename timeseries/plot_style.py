"""Colours, panels, labels and files that all plots of this package share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#1f2933"
MUTED = "#7b8794"
GRID = "#e4e7eb"
BLUE = "#2467b3"
PALETTE = (BLUE, "#e07a2f", "#2a9d8f", "#8a5fb0", "#c8553d", "#7b8794", "#b58a17", "#4c6a92")
STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "savefig.dpi": 150,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


@contextmanager
def style() -> Iterator[Any]:
    """pyplot under the house style.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        import matplotlib as mpl
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('plots need matplotlib; run: pip install "omnissm[plot]"') from error
    with mpl.rc_context(STYLE):
        yield plt


def panels(plt: Any, count: int, *, width: float = 5.2, height: float = 2.1, columns: int = 2) -> list[Axes]:
    """Axes of a figure with one panel per variate, the unused ones removed."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    _, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows + 0.4), layout="constrained", squeeze=False
    )
    for extra in axes.flat[count:]:
        extra.remove()
    return list(axes.flat[:count])


def label_lowest(axes: Sequence[Axes], columns: int) -> None:
    """Time labels only where no panel stands below."""
    for panel in axes[: max(0, len(axes) - columns)]:
        panel.tick_params(labelbottom=False)
        panel.xaxis.get_offset_text().set_visible(False)
        panel.set_xlabel("")


def new_axes(plt: Any, ax: Axes | None, size: tuple[float, float] = (6.4, 3.6)) -> Axes:
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def choose(ds: xr.Dataset | xr.DataArray, dim: str, label: Any) -> str:
    """The given label of a dimension, or its first; unknown ones are refused."""
    labels = [str(v) for v in ds[dim].values]
    if label is None:
        return labels[0]
    if str(label) not in labels:
        raise ValueError(f"no {dim} named {label!r}; available: {', '.join(labels)}")
    return str(label)


def label_of(ds: xr.Dataset, variate: str) -> str:
    """Name and unit, e.g. "temp (degF)"."""
    units = str(ds["units"].sel(variate=variate).item()) if "units" in ds.coords else ""
    return f"{variate} ({units})" if units else variate


def time_axis(ax: Axes, times: Any) -> None:
    """Short date labels for datetimes, plain numbers otherwise."""
    if np.issubdtype(np.asarray(times).dtype, np.datetime64):
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

        locator = AutoDateLocator(minticks=3, maxticks=7)
        ax.xaxis.set_major_locator(locator)
        ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    else:
        ax.set_xlabel("time step")
    ax.margins(x=0.01)


def fan(ax: Axes, times: Any, quantiles: xr.DataArray, color: str) -> None:
    """Nested central intervals, the widest lightest; labelled with their coverage."""
    levels = [float(q) for q in quantiles["quantile"].values]
    pairs = [(low, high) for low, high in zip(levels, reversed(levels)) if low < high - 1e-9]
    for depth, (low, high) in enumerate(pairs):
        lower, upper = (quantiles.sel(quantile=q).values for q in (low, high))
        alpha = 0.14 + 0.16 * depth / max(1, len(pairs) - 1)
        ax.fill_between(times, lower, upper, color=color, alpha=alpha, linewidth=0, label=f"{high - low:.0%} interval")


def legend(ax: Axes, count: int) -> None:
    """One row above the panels of the figure, for several panels; inside the axes for one."""
    entries = sorted(zip(*ax.get_legend_handles_labels()), key=lambda entry: "interval" in entry[1])  # lines first
    handles, labels = [handle for handle, _ in entries], [label for _, label in entries]
    if count > 1 and ax.figure is not None:
        ax.figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), fontsize=9)
    else:
        ax.legend(handles, labels, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=len(labels))


def each_variate(
    forecast: xr.Dataset,
    variate: str | None,
    ax: Axes | None,
    title: str,
    draw: Callable[[Axes, str], None],
) -> Any:
    """Draw one variate on `ax`, or every variate on a panel of its own."""
    with style() as plt:
        if ax is not None or variate is not None or forecast.sizes["variate"] == 1:
            ax = new_axes(plt, ax, (7.2, 3.2))
            name = choose(forecast, "variate", variate)
            draw(ax, name)
            ax.set_title(f"{label_of(forecast, name)}, {title}" if title else label_of(forecast, name))
            legend(ax, 1)
            return ax
        names = [str(v) for v in forecast["variate"].values]
        axes = panels(plt, len(names))
        for panel, name in zip(axes, names):
            draw(panel, name)
            panel.set_title(label_of(forecast, name))
        axes[0].figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
        label_lowest(axes, 2)
        legend(axes[0], len(axes))
        return np.array(axes)


def save(axes: Any, path: str) -> str:
    """Write the figure of these Axes, whole or not at all, and close it; returns the path."""
    import matplotlib.pyplot as plt

    from .files import atomic_path

    figure = np.ravel(axes)[0].figure
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
    plt.close(figure)
    return path
