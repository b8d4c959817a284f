import numpy as np
import pandas as pd
import pytest

from omnissm.timeseries import Forecaster


@pytest.mark.parametrize("ids", ["variates", "series"])
def test_ids_and_times_of_a_long_frame_come_back_as_they_went_in(ids):
    times = pd.date_range("2024-03-30", periods=60, freq="h", tz="Europe/Berlin")  # with a change to summer time
    frame = pd.concat([pd.DataFrame({"unique_id": k, "ds": times, "y": np.arange(60.0)}) for k in (7, 11)])
    model = Forecaster("last_value", 8, 4, ids=ids).fit(frame, val=None)
    forecast = model.predict(frame)
    assert forecast["unique_id"].dtype == np.int64
    assert forecast["unique_id"].unique().tolist() == [7, 11]
    assert forecast["ds"].tolist()[:4] == list(pd.date_range(times[-1], periods=5, freq="h")[1:])
    assert str(forecast["ds"].dt.tz) == str(forecast["cutoff"].dt.tz) == "Europe/Berlin"
    compared = frame.merge(model.backtest(frame), on=["unique_id", "ds"], suffixes=("", "_kept"))
    assert len(compared) == 2 * 49 * 4
    np.testing.assert_array_equal(compared["y"], compared["y_kept"])


def test_text_ids_and_plain_times_stay():
    times = pd.date_range("2024-01-01", periods=40, freq="D")
    frame = pd.DataFrame({"unique_id": "a", "ds": times, "y": np.arange(40.0)})
    forecast = Forecaster("last_value", 8, 4).fit(frame, val=None).predict()
    assert forecast["unique_id"].tolist() == ["a"] * 4
    assert forecast["ds"].tolist() == list(pd.date_range("2024-02-10", periods=4, freq="D"))
