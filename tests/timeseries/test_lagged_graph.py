"""Variates that repeat their predecessor after a lag: what mixing variates is there for."""

import json

import numpy as np
import pytest

from omnissm.__main__ import main
from omnissm.timeseries import Forecaster, evaluate
from omnissm.timeseries.data.synthetic import lagged_graph

LAG = 8


def test_mixing_variates_finds_the_lags():
    ds = lagged_graph(1200, 3, 0.1, np.random.default_rng(0), lag=LAG)
    errors = {}
    for mix in (True, False):
        options = {"patch_len": 8, "stride": 4, "instance_norm": False, "mixer": {"mix_variates": mix}}
        model = Forecaster("chimera_tiny", lookback=2 * LAG, horizon=LAG, model_args=options)
        model.fit(ds.isel(time=slice(0, 960)), max_epochs=8, lr=1e-2, coverages=None, progress=False)
        result = model.backtest(ds, start=960, progress=False)
        errors[mix] = evaluate(result, ("mse",), "variate")["mse"].to_numpy()
    assert errors[True].mean() < 0.7 * errors[False].mean()
    # The first variate has no predecessor: nothing but its own past helps there, and it helps all the same.
    assert errors[True][1:].max() < 0.5 * errors[True][0]
    assert errors[False].max() < 1.3 * errors[False].min()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_configuration_beats_itself_without_mixing(tmp_path):
    found = {}
    for mix in ("true", "false"):
        run = ["--run", str(tmp_path / mix), "--trainer.enable_progress_bar", "false"]
        words = ["-c", "timeseries/chimera_tiny_lagged_graph"]
        words += ["--model.init_args.model_args.mixer", f"{{mix_variates: {mix}}}"]
        assert main(["timeseries", "fit", *words, *run]) == 0
        assert main(["timeseries", "test", *run]) == 0
        found[mix] = json.loads((tmp_path / mix / "metrics.json").read_text())["metrics"]["test/mse"]
    assert found["true"] < 0.7 * found["false"]
