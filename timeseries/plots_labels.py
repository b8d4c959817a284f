"""Pictures of anomaly scores, of filled gaps and of confused classes; as in `plots`, on `ax` where one is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from .plot_style import BLUE, INK, MUTED, PALETTE, choose, each_variate, new_axes, style, time_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_anomalies", "plot_confusion", "plot_imputation"]


def plot_anomalies(
    found: xr.Dataset, *, series: str | None = None, variate: str | None = None, ax: Axes | None = None
) -> Any:
    """Score of each step with its threshold, flagged steps, and true windows where known; the series above it.

    Args:
        found: Of `anomalies.detect`; with `target` and `label` if they are to be drawn.
        series: Which series; default the first.
        variate: Which variate of the series above; default the first.
        ax: Draw the scores alone here.

    Returns:
        The Axes, or an array of two: series and scores.
    """
    name = choose(found, "series", series)
    one = found.sel(series=name)
    times = one["time"].to_numpy()
    with style() as plt:
        if ax is None and "target" in one:
            _, axes = plt.subplots(2, 1, figsize=(8.4, 4.6), sharex=True, layout="constrained")
            label = choose(found, "variate", variate)
            axes[0].plot(times, one["target"].sel(variate=label), color=BLUE, linewidth=0.9)
            several = variate is None and found.sizes["variate"] > 1
            place = f"{label} (of {found.sizes['variate']} variates)" if several else label
            axes[0].set_title(f"{place}, {name}" if found.sizes["series"] > 1 else place)
            panels = list(axes)
        else:
            panels = [new_axes(plt, ax, (8.4, 2.8))]
        bottom = panels[-1]
        score, threshold = one["score"].to_numpy().astype(float), float(one["threshold"])
        shown = np.maximum(score, threshold / 1e4)  # a logarithmic axis has no zero
        bottom.plot(times, shown, color=MUTED, linewidth=0.8, label="score")
        bottom.axhline(threshold, color=INK, linewidth=1, linestyle="--", label="threshold")
        flags = one["anomaly"].to_numpy().astype(bool)
        bottom.plot(times[flags], shown[flags], ".", color=PALETTE[1], label="flagged")
        bottom.set_yscale("log")
        bottom.set_ylabel("anomaly score")
        if "label" in one:
            half = (times[1] - times[0]) / 2  # a window of one step has a width too
            shade: dict[str, Any] = {"color": PALETTE[4], "alpha": 0.25, "linewidth": 0}
            for number, (start, end) in enumerate(_stretches(one["label"].to_numpy().astype(bool))):
                for panel in panels:
                    text = "true window" if number == 0 and panel is bottom else None
                    panel.axvspan(times[start] - half, times[end] + half, label=text, **shade)
        bottom.legend(fontsize=9, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.14))
        time_axis(bottom, times)
        return bottom if len(panels) == 1 else np.array(panels)


def _stretches(flags: Any) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(a), int(b) - 1) for a, b in edges.reshape(-1, 2)]


def plot_imputation(
    filled: xr.Dataset,
    *,
    truth: xr.DataArray | None = None,
    series: str | None = None,
    variate: str | None = None,
    steps: int = 400,
    ax: Axes | None = None,
) -> Any:
    """Observed values, filled gaps and, where known, what was there; a panel per variate.

    Args:
        filled: Of `Imputer.impute`.
        truth: Values that were hidden, NaN elsewhere.
        series: Which series; default the first.
        variate: Which variate; default all of them.
        steps: Length drawn, around the first gap.
        ax: Draw one variate here.

    Returns:
        The Axes, or an array of them.
    """
    name = choose(filled, "series", series)
    one = filled.sel(series=name)
    gaps = one["imputed"].any("variate").to_numpy()
    start = max(0, int(gaps.argmax()) - steps // 4)
    window = slice(start, start + steps)
    hidden = None if truth is None else truth.sel(series=name) if "series" in truth.dims else truth

    def draw(panel: Axes, label: str) -> None:
        part = one.sel(variate=label).isel(time=window)
        times, values = part["time"].to_numpy(), part["target"].to_numpy()
        gap = part["imputed"].to_numpy().astype(bool)
        panel.plot(times, np.where(gap, np.nan, values), color=BLUE, linewidth=1, label="observed")
        reach = gap | np.roll(gap, 1) | np.roll(gap, -1)  # joined to the neighbours
        panel.plot(times, np.where(reach, values, np.nan), color=PALETTE[1], linewidth=1.2, label="filled")
        if hidden is not None:
            known = hidden.sel(variate=label).isel(time=window).to_numpy()
            panel.plot(times, known, ".", color=INK, markersize=2.5, label="hidden truth")
        time_axis(panel, times)

    return each_variate(filled, variate, ax, f"filled by {filled.attrs.get('imputation', 'model')}", draw)


def plot_confusion(classes: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """How many series of each class were taken for which.

    Args:
        classes: Of `Classifier.predict`, with `label`.
        ax: Draw here.

    Raises:
        ValueError: if the labels are not known.
    """
    if "label" not in classes:
        raise ValueError("the table has no column 'label'; classes can be compared only where they are known")
    names = sorted(set(classes["label"]) | set(classes["predicted"]))
    table = pd.crosstab(classes["label"], classes["predicted"]).reindex(index=names, columns=names, fill_value=0)
    counts = table.to_numpy()
    with style() as plt:
        size = 1.6 + 0.5 * len(names)
        ax = new_axes(plt, ax, (size + 0.6, size))
        share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if share[row, column] > 0.6 else INK
                ax.text(column, row, str(count), ha="center", va="center", color=color, fontsize=9)
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
        ax.set_yticks(range(len(names)), names)
        ax.set_xlabel("predicted")
        ax.set_ylabel("true")
        ax.grid(False)
        right = float(np.trace(counts) / counts.sum())
        ax.set_title(f"accuracy {right:.3f} of {counts.sum()} series")
        return ax
