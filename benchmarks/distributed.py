"""Train one configuration per domain on one device and on several: are the results equal, how does the speed grow?

    python benchmarks/distributed.py [--devices N] [--accelerator cpu|gpu] [--domain NAME ...]
                                     [--strategy ddp|fsdp2 ...] [--steps 60] [--small] [--out FILE]

For each domain and strategy two runs on N devices are compared with one run on one device:

equal    the batch divided by N on each device: weights after a few steps, as a share of what the steps changed
speed    the whole batch on each device: samples per second, and efficiency = speed of N / (N times speed of one)

`--small` takes small networks and batches, for a CPU, where several processes say nothing about speed. The exit code is
1 where weights differ by more than the tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # not there under PYTHONSAFEPATH

from run import describe, write_json

COMPARED = 4  # steps after which weights are compared: later ones only add up rounding
WARM = 10  # steps before the clock starts
TOLERANCE = 1e-3

# Without dropout, whose draws differ between processes.
# Domain: configuration, batch of one device, options always given, those of a large run; batch and options of a small.
DOMAINS: dict[str, tuple[str, int, dict[str, Any], dict[str, Any], int, dict[str, Any]]] = {
    "timeseries": (
        "chimera_tiny_lagged_graph",
        64,
        {"model.model_args.dropout": 0.0, "model.model_args.head_dropout": 0.0},
        {"model.model": "chimera_small", "data.length": 60_000, "data.variate_count": 16, "data.lookback": 96},
        8,
        {"data.length": 800},
    ),
    "genomics": (
        "hnet_tiny_synthetic",
        16,
        {"model.ratio_sync": True},
        {"model.model": "dnahnet_small", "data.bases": 2_000_000, "data.length": 4096},
        8,
        {"data.bases": 20_000, "data.length": 64},
    ),
    "vision": (
        "hydra_vit_tiny_synthetic",
        64,
        {"model.backbone_args.drop_rate": 0.0},
        {
            "model.backbone": "hydra_vit_small_patch16_224",
            "model.backbone_args": '{"img_size": 128, "drop_rate": 0.0, "drop_path_rate": 0.0}',
            "data.image_size": 128,
            "data.num_workers": 8,
        },
        8,
        {"model.backbone_args.depth": 1},
    ),
    "graphs": (
        "dag_ssm_tiny_synthetic",
        256,
        {},
        {"model.model": "dag_ssm_small", "model.model_args": '{"dropout": 0.0}'},
        16,
        {},
    ),
}
SAMPLES = {"genomics": "epoch_size", "vision": "train_samples", "graphs": "train_samples"}


class Clock(pl.Callback):
    """Write the weights at the start and after a few steps, and the seconds per step after the first ones.

    Args:
        folder: Where to, an existing folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.began = Path(folder), 0.0

    def keep(self, trainer: pl.Trainer, module: pl.LightningModule, name: str) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(module.net, options=options)  # all processes take part
        if trainer.is_global_zero:
            torch.save(weights, self.folder / f"{name}.pt")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.keep(trainer, pl_module, "start")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1
        if done == COMPARED:
            self.keep(trainer, pl_module, "end")
        if done == WARM or (done == trainer.num_training_batches and done > WARM):
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            if done > WARM and trainer.is_global_zero:
                found = {"seconds": (now - self.began) / (done - WARM), "devices": trainer.world_size}
                (self.folder / "clock.json").write_text(json.dumps(found))
            self.began = now


def train(domain: str, name: str, options: argparse.Namespace, strategy: str | None, batch: int, steps: int) -> Path:
    """Run `fit` in a folder of its own and return that."""
    config, large_batch, always, large, small_batch, small = DOMAINS[domain]
    folder = options.work / domain / name
    folder.mkdir(parents=True)
    devices = options.devices if strategy else 1
    values = {**always, **(small if options.small else large), "data.batch_size": batch, "model.lr_scheduler": "null"}
    if domain in SAMPLES:
        batches = options.devices * options.steps  # the same set in all runs
        values[f"data.{SAMPLES[domain]}"] = batches * (small_batch if options.small else large_batch)
    words = [f"--{key.replace('.', '.init_args.', 1)}={value}" for key, value in values.items()]
    trainer: dict[str, Any] = {
        "accelerator": options.accelerator,
        "devices": devices,
        "max_epochs": 1,
        "limit_train_batches": steps,
        "limit_val_batches": 0,
        "enable_progress_bar": "false",
        "callbacks+": "distributed.Clock",
        "callbacks.folder": folder,
    }
    words += [f"--trainer.{key}={value}" for key, value in trainer.items()]
    strategies = ["-c", f"trainer/{strategy}"] if strategy else []
    command = [sys.executable, "-m", "omnissm", domain, "fit", "-c", f"{domain}/{config}", *strategies, *words]
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]  # an empty one would be the working folder
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with exit code {done.returncode}:\n{done.stderr[-4000:]}")
    return folder


def difference(one: Path, several: Path) -> float:
    """|w_N - w_1| / |w_1 - w_0| over all weights after the compared steps."""
    start, end, other = (
        torch.load(path, weights_only=True, map_location="cpu")
        for path in (one / "start.pt", one / "end.pt", several / "end.pt")
    )
    apart, moved = (
        sum(
            (first[key].double() - second[key].double()).square().sum()
            for key in start
            if start[key].is_floating_point()
        )
        for first, second in ((other, end), (end, start))
    )
    return float((apart / moved).sqrt())


def measure(domain: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every strategy."""
    _, batch, _, _, small, _ = DOMAINS[domain]
    batch = small if options.small else batch
    if batch % options.devices:
        raise SystemExit(f"--devices must divide the batch of {batch}, got {options.devices}")
    one = train(domain, "one", options, None, batch, options.steps)
    alone = json.loads((one / "clock.json").read_text())["seconds"]
    rows = []
    for strategy in options.strategy:
        equal = train(domain, f"{strategy}-equal", options, strategy, batch // options.devices, COMPARED)
        fast = train(domain, f"{strategy}-speed", options, strategy, batch, options.steps)
        clock = json.loads((fast / "clock.json").read_text())
        rows.append(
            {
                "domain": domain,
                "config": f"{domain}/{DOMAINS[domain][0]}",
                "strategy": strategy,
                "devices": clock["devices"],
                "batch_per_device": batch,
                "samples_per_second_one": batch / alone,
                "samples_per_second": clock["devices"] * batch / clock["seconds"],
                "efficiency": alone / clock["seconds"],
                "difference": difference(one, equal),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.cuda.device_count()
    parser.add_argument("--devices", type=int, default=gpus or 2)
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="gpu" if gpus else "cpu")
    parser.add_argument("--domain", nargs="+", choices=tuple(DOMAINS), default=list(DOMAINS))
    parser.add_argument("--strategy", nargs="+", choices=("ddp", "fsdp2"), default=["ddp", "fsdp2"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, help="file of results, JSON")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    options = parser.parse_args(argv)
    if options.steps <= WARM:
        parser.error(f"--steps must be above {WARM}, which are not timed")
    if options.accelerator == "gpu" and options.devices > gpus:
        parser.error(f"{options.devices} devices were asked for, this machine has {gpus} GPUs")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        options.work = Path(work)
        for domain in options.domain:
            for row in measure(domain, options):
                rows.append(row)
                print(
                    f"{row['domain']:<11} {row['strategy']:<6} {row['samples_per_second']:10.1f} samples/s, efficiency"
                    f" {row['efficiency']:.2f}, weights differ by {row['difference']:.1e} of their change",
                    flush=True,
                )
    if options.out:
        place = describe(torch.device("cuda" if options.accelerator == "gpu" else "cpu"), options.commit)
        command = " ".join(["python benchmarks/distributed.py", *(sys.argv[1:] if argv is None else argv)])
        write_json(
            options.out, {**place, "command": command, "small": options.small, "steps": options.steps, "rows": rows}
        )
    return int(any(not row["difference"] <= TOLERANCE for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
