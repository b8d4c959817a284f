"""Time training steps of the forecasters and the sampling of windows, and write results/DEVICE/models.json.

    python benchmarks/models.py [--device cpu|cuda] [--threads 1]

A training step is forward, backward and AdamW on batches of 32 windows of 96 hours to 96 over 7 variates.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # not there under PYTHONSAFEPATH

from command import leave
from run import Timer, describe, folder_of, write_json

from omnissm.ssmcore.training import param_groups
from omnissm.timeseries import create_model
from omnissm.timeseries.frames import from_numpy
from omnissm.timeseries.windows import Windows

MODELS = ("chimera_tiny", "chimera_small", "chimera_base", "rlinear", "dlinear")


def hourly_windows() -> Windows:
    """As many hours and variates as the training part of ETTh1."""
    values = np.random.default_rng(0).normal(size=(8640, 7)).cumsum(0).astype("float32")
    return Windows(from_numpy(values, start="2016-07-01", freq="h"), 96, 96)


def training_step(name: str, windows: Windows, device: torch.device, timer: Timer) -> dict:
    """Milliseconds of a step; on a CPU also of processor time, which a busy machine does not stretch."""
    torch.manual_seed(0)
    model = create_model(name, lookback=96, horizon=96, n_variates=7).to(device)
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-3)
    batch = windows.get_batch(range(0, 3200, 100)).to(device)

    def step() -> None:
        optimizer.zero_grad()
        (model(batch) - batch.y).abs().mean().backward()
        optimizer.step()

    row = {"model": name, "parameters": sum(p.numel() for p in model.parameters()), "step_ms": timer(step)}
    if device.type == "cpu":
        begin = time.process_time()
        for _ in range(10):
            step()
        row["step_cpu_ms"] = round((time.process_time() - begin) * 100, 2)
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for DEVICE/models.json")
    parser.add_argument("--commit", help="commit to note, where the code is a copy without history")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    timer = Timer(device, seconds=3.0)
    windows = hourly_windows()
    rows = [training_step(name, windows, device, timer) for name in MODELS]
    order = np.random.default_rng(0).integers(len(windows), size=(1000, 32))
    begin = time.perf_counter()
    for indices in order:
        windows.get_batch(indices)
    sampling = round((time.perf_counter() - begin) * 10, 3)
    about = describe(device, options.commit)
    for row in rows:
        print(f"{row['model']:16} {row['parameters']:9,} parameters  {row['step_ms']['median']:8.2f} ms a step")
    print(f"10,000 batches of 32 windows are sampled in {sampling} s")
    write_json(
        options.out / folder_of(about["device"]) / "models.json",
        {**about, "rows": rows, "seconds_for_10000_batches": sampling},
    )
    return 0


if __name__ == "__main__":
    leave(main)
