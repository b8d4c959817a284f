"""Seconds of as many training steps of neuralforecast's iTransformer as an epoch has: ROOT STEPS.

Run by benchmarks/timeseries.py with a Python that has neuralforecast. Prints one line of JSON.
"""

import json
import logging
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
from neuralforecast import NeuralForecast
from neuralforecast.losses.pytorch import MSE
from neuralforecast.models import iTransformer


def main() -> None:
    root, steps = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    wide = pd.read_csv(root / "ETTh1.csv", parse_dates=["date"]).iloc[:8640]
    frame = wide.melt("date", var_name="unique_id", value_name="y").rename(columns={"date": "ds"})
    quiet = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    for count in (2, steps):  # the first one warms up
        model = iTransformer(
            h=96,
            input_size=96,
            n_series=7,
            hidden_size=96,
            d_ff=96,
            e_layers=2,
            n_heads=8,
            loss=MSE(),
            max_steps=count,
            batch_size=7,
            windows_batch_size=32,
            learning_rate=1e-3,
            scaler_type="standard",
            **quiet,
        )
        wall, cpu = time.perf_counter(), time.process_time()
        NeuralForecast(models=[model], freq="h").fit(frame, val_size=0)
        found = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "steps": count, "timed": 1.0}
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"model": "iTransformer of neuralforecast, width 96", **found, "parameters": parameters}))


if __name__ == "__main__":
    main()
