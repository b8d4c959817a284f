"""The guide's Python and its commands, in order, on small data."""

import re
import shlex
from pathlib import Path

import pytest

from omnissm.__main__ import main
from omnissm.timeseries import Forecaster
from omnissm.timeseries.data.nyc_weather import read_nyc_weather
from omnissm.timeseries.files import write_series

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "timeseries.md"
BLOCK = re.compile(r"^```(python)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHORT = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_guide(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    try:
        weather = read_nyc_weather().isel(time=slice(-400, None))
    except ImportError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for python, block in BLOCK.findall(GUIDE.read_text()):
        if python:
            exec(compile(block, str(GUIDE), "exec"), namespace)
            continue
        if "taxi.nc" in block:
            spikes = namespace["spikes"]
            write_series(spikes, "taxi.nc")
            Forecaster("ridge", lookback=24, horizon=1).fit(spikes.drop_vars("label")).save("runs/taxi")
        if "weather.nc" in block:
            write_series(namespace["dark"].drop_vars("truth") if "impute" in block else weather, "weather.nc")
        for line in block.strip().splitlines():
            words = shlex.split(line, comments=True)
            assert words[:2] == ["omnissm", "timeseries"]
            assert main([*words[1:], *(SHORT if "-c" in words else ())]) == 0, line
    for name in ("confusion", "anomalies", "filled", "backtest"):
        assert Path(f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for name in ("classes.csv", "anomalies.nc", "filled.nc", "filled.csv", "backtest.nc", "forecast.nc"):
        assert Path(name).stat().st_size > 0
