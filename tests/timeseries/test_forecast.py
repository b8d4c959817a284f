"""What the verbs load from a run's folder."""

import os

import numpy as np
import pandas as pd
import torch
import xarray as xr

from omnissm.ssmcore.training import read_model_folder
from omnissm.timeseries import Forecaster
from omnissm.timeseries.forecast import load


def test_newer_checkpoint_of_a_run_beats_its_model_folder(tmp_path):
    steps = np.arange(120)
    coords = {"time": pd.date_range("2024-01-01", periods=120, freq="h"), "variate": ["a"]}
    data = xr.Dataset({"target": (("time", "variate"), np.sin(steps / 4)[:, None])}, coords, {"freq": "h"})
    models = [Forecaster("rlinear", 24, 4, accelerator="cpu").fit(data, max_epochs=n, progress=False) for n in (1, 2)]
    models[0].save(tmp_path / "model")
    assert_same_weights(load(tmp_path), models[0])  # without any checkpoint
    models[1].save(tmp_path / "later")
    folder = read_model_folder(tmp_path / "later")
    best = tmp_path / "checkpoints" / "best.ckpt"
    best.parent.mkdir()
    state = {f"net.{name}": tensor for name, tensor in folder.state.items()}
    about = {"config": dict(folder.config), "files": dict(folder.files)}
    torch.save({"state_dict": state, "omnissm": about}, best)
    written = (tmp_path / "model" / "config.json").stat().st_mtime_ns
    os.utime(best, ns=(written + 1, written + 1))
    assert_same_weights(load(tmp_path), models[1])
    os.utime(best, ns=(written, written))
    assert_same_weights(load(tmp_path), models[0])


def assert_same_weights(one, other):
    torch.testing.assert_close(one.net.state_dict(), other.net.state_dict(), rtol=0, atol=0)
