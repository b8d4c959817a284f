"""Pictures of anomalies, filled gaps and classes show what the data say."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

matplotlib = pytest.importorskip("matplotlib")
from matplotlib import pyplot as plt  # noqa: E402

from omnissm.timeseries.plots_labels import plot_anomalies, plot_confusion, plot_imputation  # noqa: E402


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture
def found():
    times = pd.date_range("2024", periods=50, freq="h")
    score = np.ones((1, 50))
    score[0, [10, 30]] = 9.0
    label = np.zeros((1, 50), bool)
    label[0, 10] = label[0, 20:25] = True
    dims = ("series", "time")
    return xr.Dataset(
        {
            "score": (dims, score),
            "anomaly": (dims, score > 5),
            "threshold": ("series", [5.0]),
            "label": (dims, label),
            "target": ((*dims, "variate"), np.zeros((1, 50, 1))),
        },
        {"series": ["s"], "time": times, "variate": ["v"]},
    )


def test_true_windows_and_flags(found):
    series, scores = plot_anomalies(found)
    for panel in (series, scores):
        hours = [24 * patch.get_width() for patch in panel.patches]
        assert hours == pytest.approx([1.0, 5.0])  # a window of one step is as wide as a step
    flagged = next(line for line in scores.lines if line.get_label() == "flagged")
    assert list(flagged.get_xdata()) == list(found["time"].values[[10, 30]])
    ax = plt.subplots()[1]
    assert plot_anomalies(found, ax=ax) is ax
    assert series.get_title(loc="left") == "v"
    two = xr.concat([found, found.assign_coords(variate=["w"])], "variate", data_vars="minimal")
    assert plot_anomalies(two)[0].get_title(loc="left") == "v (of 2 variates)"
    assert plot_anomalies(two, variate="w")[0].get_title(loc="left") == "w"


def test_filled_values_are_apart_from_observed_ones():
    values = np.arange(20.0).reshape(1, 20, 1)
    gap = np.zeros_like(values, bool)
    gap[0, 5:8] = True
    dims, coords = ("series", "time", "variate"), {"series": ["s"], "time": np.arange(20), "variate": ["v"]}
    ds = xr.Dataset({"target": (dims, values), "imputed": (dims, gap)}, coords)
    truth = xr.DataArray(np.where(gap, values + 1, np.nan), coords, dims)
    lines = {line.get_label(): line.get_ydata() for line in plot_imputation(ds, truth=truth).lines}
    assert np.isnan(lines["observed"]).sum() == 3
    assert np.flatnonzero(np.isfinite(lines["filled"])).tolist() == [4, 5, 6, 7, 8]  # joined to its neighbours
    assert lines["hidden truth"][5:8].tolist() == [6.0, 7.0, 8.0]


def test_confusion_counts_pairs():
    ax = plot_confusion(pd.DataFrame({"label": ["a", "a", "b"], "predicted": ["a", "b", "b"]}))
    assert sorted((*text.get_position(), text.get_text()) for text in ax.texts) == [
        (0, 0, "1"),
        (1, 0, "1"),
        (1, 1, "1"),
    ]
    assert "0.667" in ax.get_title(loc="left")
    with pytest.raises(ValueError, match="no column 'label'"):
        plot_confusion(pd.DataFrame({"predicted": ["a"]}))
