"""Seconds of a training epoch of neuralforecast's iTransformer: ROOT STEPS EVERY, of which one in EVERY is timed.

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
    root, steps, every = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    wide = pd.read_csv(root / "ETTh1.csv", parse_dates=["date"]).iloc[:8640]
    frame = wide.melt("date", var_name="unique_id", value_name="y").rename(columns={"date": "ds"})
    quiet = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    timed, seconds = -(-steps // every), []
    for count in (2, 2 + timed):  # the difference leaves out what a fit takes before its steps
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
        seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = ((after - before) * steps / timed for before, after in zip(*seconds))
    found = {"wall_s": wall, "cpu_s": cpu, "steps": steps, "timed": timed / steps}
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"model": "iTransformer of neuralforecast, width 96", **found, "parameters": parameters}))


if __name__ == "__main__":
    main()
