"""Ctrl-C in `Forecaster.fit`, as in a notebook: the session lives on, and hears the next one."""

import os
import signal

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import xarray as xr

from omnissm.timeseries import Forecaster


class Interrupt(pl.Callback):
    def on_train_batch_start(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)


def test_interrupt_is_a_keyboard_interrupt():
    times = pd.date_range("2024-01-01", periods=120, freq="h")
    series = xr.DataArray(np.random.default_rng(0).normal(size=(120, 1)), {"time": times}, ("time", "variate"))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs tests in background
    try:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                Forecaster("rlinear", lookback=12, horizon=4, callbacks=[Interrupt()]).fit(series, max_epochs=1)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
