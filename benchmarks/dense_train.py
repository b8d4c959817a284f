"""Train segmenters and detectors beside torchvision's and write results/DEVICE/dense_training.json.

    python benchmarks/dense_train.py --data FOLDER [--only NAME ...] [--seeds 0 1 2] [--at-once 3] [-- OPTIONS OF FIT]

FOLDER holds `vision/wbc_seg` and `vision/bccd_det`. Each run is `omnissm vision fit -c vision/NAME`, on a GPU in
bfloat16, then `omnissm vision validate` of the best weights in float32; several may share a GPU, and `seconds` is the
time of the fit as it was then. What is not done after `--limit` seconds is stopped and named. Rows of the same
configuration, seed and options are replaced, others stay.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # not there under PYTHONSAFEPATH

from command import leave
from run import describe, folder_of, write_json

CONFIGS = (
    "detect_bccd",
    "detect_bccd_fcos",
    "detect_bccd_ssdlite",
    "segment_wbc",
    "segment_wbc_lraspp",
    "segment_wbc_deeplab",
)
Row = dict[str, Any]


class Runs:
    """Runs, some at once on each device, until a time.

    Args:
        work: Folder of runs and logs.
        devices: GPUs as `CUDA_VISIBLE_DEVICES` names them, None for the CPU, each as often as runs share it.
        end: Time (of `time.monotonic`) at which runs are stopped.
        options: Further options of `fit`.
    """

    def __init__(self, work: Path, devices: list[str | None], end: float, options: list[str]) -> None:
        self.work, self.end, self.options = work, end, options
        self.free: queue.Queue[str | None] = queue.Queue()
        for device in devices:
            self.free.put(device)

    def __call__(self, name: str, seed: int) -> Row | None:
        """Train and validate; None, with a line that says so, if that did not end well or in time."""
        device, run = self.free.get(), f"{name}_{seed}"
        began = time.monotonic()
        try:
            extra = ["-c", "trainer/gpu_bf16"] if device is not None else ["--trainer.accelerator", "cpu"]
            quiet = ["--overwrite", "--seed_everything", str(seed), "--trainer.enable_progress_bar", "false"]
            self._call(device, run, "fit", "-c", f"vision/{name}", *extra, "--run", run, *quiet, *self.options)
            seconds = time.monotonic() - began
            accelerator = ["gpu", "--trainer.devices", "1"] if device is not None else ["cpu"]
            whole = ["--trainer.precision", "32-true", "--trainer.accelerator", *accelerator]
            self._call(device, run, "validate", "--run", run, *whole)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            reason = "not done in time" if isinstance(error, subprocess.TimeoutExpired) else f"failed, see {run}.log"
            print(f"{run}: {reason}, after {time.monotonic() - began:.0f} s", flush=True)
            return None
        finally:
            self.free.put(device)
        row = {"task": name.partition("_")[0], "config": name, "seed": seed, **self._read(run)}
        row |= {"seconds": round(seconds, 1), "options": self.options}
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        return row

    def _call(self, device: str | None, run: str, verb: str, *words: str) -> None:
        """One verb of `omnissm vision`, with its output in the run's log."""
        chosen = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
        with (self.work / f"{run}.log").open("ab") as log:
            subprocess.run(
                [sys.executable, "-m", "omnissm", "vision", verb, *words],
                cwd=self.work,
                env={**os.environ, **chosen},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=max(0.0, self.end - time.monotonic()),
                check=True,
            )

    def _read(self, run: str) -> Row:
        folder = self.work / "runs" / run
        found = json.loads((folder / "metrics.json").read_text())
        config = yaml.safe_load((folder / "config.yaml").read_text())
        values = {key.partition("/")[2]: round(value, 5) for key, value in found["metrics"].items()}
        values.pop("loss", None)
        return {"parameters": found["parameters"], "epochs": config["trainer"]["max_epochs"], **values}


def add(path: Path, about: Row, row: Row) -> None:
    """Put a row into the file, in place of the one of the same run."""
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    keys = ("config", "seed", "options")
    rows = [other for other in rows if any(other[key] != row[key] for key in keys)]
    order = {name: k for k, name in enumerate(CONFIGS)}
    rows = sorted(
        [*rows, {**row, "commit": about["commit"]}], key=lambda row: (order[row["config"]], row["options"], row["seed"])
    )
    commits = ", ".join(dict.fromkeys(str(row["commit"]) for row in rows))
    write_json(path, {**about, "commit": commits, "rows": rows})


def visible_gpus() -> list[str | None]:
    """As `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [*named.split(",")] if named else [str(k) for k in range(torch.cuda.device_count())]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with vision/wbc_seg and vision/bccd_det")
    parser.add_argument("--only", nargs="+", default=list(CONFIGS), choices=CONFIGS, help="configurations, in order")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--at-once", type=int, default=1, help="runs that share a device")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which runs are stopped")
    parser.add_argument("--work", type=Path, default=Path("dense_training"), help="folder of runs and logs")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for DEVICE/dense_training.json")
    parser.add_argument("--commit", help="commit to note, where the code is a copy without history")
    words = sys.argv[1:] if argv is None else list(argv)
    own = words[: words.index("--")] if "--" in words else words
    options = parser.parse_args(own)
    if not options.data.is_dir():
        parser.error(f"--data {options.data} is no folder")
    end = time.monotonic() + options.limit
    options.work.mkdir(parents=True, exist_ok=True)
    link = options.work / "data"
    link.unlink(missing_ok=True)
    link.symlink_to(options.data.resolve())

    cuda = torch.cuda.is_available()
    devices = visible_gpus() if cuda else [None]
    about = describe(torch.device("cuda" if cuda else "cpu"), options.commit)
    shared = f"Runs that shared a device, {options.at_once} at once." if options.at_once > 1 else ""
    about |= {"command": "python benchmarks/dense_train.py --data data", "notes": shared}
    path = options.out / folder_of(about["device"]) / "dense_training.json"
    runs = Runs(options.work.resolve(), devices * options.at_once, end, words[len(own) + 1 :])
    lock = threading.Lock()

    def one(job: tuple[str, int]) -> bool:
        row = runs(*job)
        if row is not None:
            with lock:
                add(path, about, row)
        return row is not None

    jobs = [(name, seed) for name in options.only for seed in options.seeds]
    with ThreadPoolExecutor(len(devices) * options.at_once) as pool:
        return int(not all(list(pool.map(one, jobs))))


if __name__ == "__main__":
    leave(main)
