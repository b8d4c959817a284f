"""Train one configuration per domain on one device and on several: are the results equal, how does the speed grow?

    python benchmarks/distributed.py [--devices N] [--accelerator cpu|gpu] [--domain NAME ...]
                                     [--strategy ddp|fsdp2 ...] [--steps 60] [--only equal|speed] [--jobs 1]
                                     [--small] [--out FILE]

For each domain and strategy two runs on N devices are compared with the like on one device:

equal    the batch divided by N on each device: weights after a few steps, as a share of what the steps changed
speed    the whole batch on each device: samples per second, and efficiency = speed of N / (N times speed of one)

Runs of the first kind come first, `--jobs` of them at once. Of the second, those on one GPU run side by side, a GPU for
each, then those on several alone (`--only` leaves out the others). The file is written whenever a row is known, and how
long each run took is said on stderr. Rows that FILE has for other domains, strategies or numbers of devices stay, so
that several calls on one machine complete it. `--small` takes small networks and batches, for a CPU, where several
processes say nothing about speed. The exit code is 1 where weights differ by more than the tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # not there under PYTHONSAFEPATH

from command import leave
from run import describe, write_json

COMPARED = 4  # steps after which weights are compared: later ones only add up rounding
WARM = 10  # steps before the clock starts
BLOCK = 10  # steps between two looks at the clock; the median of blocks leaves out kernels that are compiled late
TOLERANCE = 1e-3

# Adam would turn the rounding of gradients near zero into whole steps; its usual eps is below that rounding.
EVERYWHERE = {"model.lr_scheduler": "null", "model.optimizer.init_args.eps": 1e-4}
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
        8,
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
ROW = ("domain", "config", "strategy", "devices", "small")  # what tells rows apart
PLACE = ("device", "threads", "torch", "triton")  # the same for all rows of a file; each row carries the rest
SAMPLES = {"genomics": "epoch_size", "vision": "train_samples", "graphs": "train_samples"}


class Clock(pl.Callback):
    """Write the weights at the start and after a few steps, and the median of seconds per step after the first ones.

    Args:
        folder: Where to, an existing folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        torch.backends.cudnn.allow_tf32 = False  # which convolutions take it depends on the batch
        self.looks: list[tuple[int, float]] = []  # steps done, time

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
        is_last = done == trainer.num_training_batches
        if done >= WARM and ((done - WARM) % BLOCK == 0 or is_last):
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
            self.looks.append((done, time.perf_counter()))
            if is_last and trainer.is_global_zero:
                blocks = [(t1 - t0) / (n1 - n0) for (n0, t0), (n1, t1) in zip(self.looks, self.looks[1:])]
                found = {"seconds": statistics.median(blocks), "devices": trainer.world_size}
                (self.folder / "clock.json").write_text(json.dumps(found))


def train(
    domain: str,
    name: str,
    options: argparse.Namespace,
    strategy: str | None,
    batch: int,
    steps: int,
    device: int | None = None,
) -> Path:
    """Run `fit` in a folder of its own, on the GPU `device` alone where one is given, and return that folder."""
    began = time.perf_counter()
    config, large_batch, always, large, small_batch, small = DOMAINS[domain]
    folder = options.work / domain / name
    folder.mkdir(parents=True)
    devices = options.devices if strategy else 1
    values = {**always, **(small if options.small else large), **EVERYWHERE, "data.batch_size": batch}
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
    # torchrun starts all processes at once; Lightning's own launcher waits until the first has set up everything.
    several = ["torch.distributed.run", "--standalone", f"--nproc-per-node={devices}", "-m"] if devices > 1 else []
    program = [sys.executable, "-m", *several, "omnissm"]
    command = [*program, domain, "fit", "-c", f"{domain}/{config}", *strategies, *words]
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]  # an empty one would be the working folder
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if options.accelerator == "gpu" and device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(device)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with exit code {done.returncode}:\n{done.stderr[-4000:]}")
    print(f"{domain:<11} {name:<12} {time.perf_counter() - began:6.1f} s in all", file=sys.stderr, flush=True)
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


def compare(rows: list[dict[str, Any]], options: argparse.Namespace, tell: Callable[[dict[str, Any]], None]) -> None:
    """Add to the rows how far the weights are from those of one device, and call `tell` with each."""
    with ThreadPoolExecutor(options.jobs) as pool:

        def begin(domain: str, strategy: str | None) -> Any:
            share = 1 if strategy is None else options.devices
            batch = batch_of(domain, options) // share
            return pool.submit(train, domain, f"{strategy or 'one'}-equal", options, strategy, batch, COMPARED)

        runs = {domain: {way: begin(domain, way) for way in (None, *options.strategy)} for domain in options.domain}
        for row in rows:
            found = runs[row["domain"]]
            row["difference"] = difference(found[None].result(), found[row["strategy"]].result())
            tell(row)


def measure(rows: list[dict[str, Any]], options: argparse.Namespace, tell: Callable[[dict[str, Any]], None]) -> None:
    """Add speeds to the rows, and call `tell` with each."""

    def seconds(domain: str, strategy: str | None, device: int | None = None) -> float:
        batch = batch_of(domain, options)
        folder = train(domain, f"{strategy or 'one'}-speed", options, strategy, batch, options.steps, device)
        clock = json.loads((folder / "clock.json").read_text())
        if clock["devices"] != (options.devices if strategy else 1):
            raise SystemExit(f"{folder}: trained on {clock['devices']} devices")
        return clock["seconds"]

    # Each GPU has its share of the domains, one after the other; a CPU has all.
    lanes = options.devices if options.accelerator == "gpu" else 1

    def share(lane: int) -> dict[str, float]:
        return {domain: seconds(domain, None, lane) for domain in options.domain[lane::lanes]}

    with ThreadPoolExecutor(lanes) as pool:
        alone = {domain: found for part in pool.map(share, range(lanes)) for domain, found in part.items()}
    for row in sorted(rows, key=lambda row: options.strategy.index(row["strategy"])):
        domain, batch = row["domain"], batch_of(row["domain"], options)
        together = seconds(domain, row["strategy"])
        row["batch_per_device"] = batch
        row["samples_per_second_one"] = batch / alone[domain]
        row["samples_per_second"] = options.devices * batch / together
        row["efficiency"] = alone[domain] / together
        tell(row)


def earlier_file(path: Path, place: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call has written; without one a file of no rows.

    Raises:
        ValueError: if the file is none of this program, or of another machine or other versions.
    """
    if not path.is_file():
        return {**{key: place[key] for key in PLACE}, "rows": []}
    earlier = json.loads(path.read_text())
    known = earlier.get("rows") if isinstance(earlier, dict) else None
    if not isinstance(known, list) or any(not set(ROW) <= set(row) for row in known):
        raise ValueError(f"{path} is no file that this program wrote; name another with --out.")
    if other := [f"{key} {earlier.get(key)}, not {place[key]}" for key in PLACE if earlier.get(key) != place[key]]:
        raise ValueError(f"{path} has rows of {' and '.join(other)}; name another file with --out.")
    return earlier


def batch_of(domain: str, options: argparse.Namespace) -> int:
    """Samples of one device's whole batch.

    Raises:
        SystemExit: if the devices do not divide it.
    """
    _, large, _, _, small, _ = DOMAINS[domain]
    batch = small if options.small else large
    if batch % options.devices:
        raise SystemExit(f"--devices must divide the batch of {batch}, got {options.devices}")
    return batch


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.cuda.device_count()
    parser.add_argument("--devices", type=int, default=gpus or 2)
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="gpu" if gpus else "cpu")
    parser.add_argument("--domain", nargs="+", choices=tuple(DOMAINS), default=list(DOMAINS))
    parser.add_argument("--strategy", nargs="+", choices=("ddp", "fsdp2"), default=["ddp", "fsdp2"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", choices=("equal", "speed"), help="default: both")
    parser.add_argument("--jobs", type=int, default=1, help="runs for comparison at once")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, help="file of results, JSON")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    options = parser.parse_args(argv)
    if options.steps <= WARM:
        parser.error(f"--steps must be above {WARM}, which are not timed")
    if options.accelerator == "gpu" and options.devices > gpus:
        parser.error(f"{options.devices} devices were asked for, this machine has {gpus} GPUs")
    place = describe(torch.device("cuda" if options.accelerator == "gpu" else "cpu"), options.commit)
    words = sys.argv[1:] if argv is None else argv
    aside = ("--out", "--commit")  # say nothing of what is measured
    said = [word for word, before in zip(words, ["", *words]) if not {word, before} & {*aside}]

    def tell(row: dict[str, Any]) -> None:
        text = f"weights differ by {row['difference']:.1e} of their change" if "difference" in row else ""
        if "efficiency" in row:
            text = f"{row['samples_per_second']:10.1f} samples/s, efficiency {row['efficiency']:.2f}"
        print(f"{row['domain']:<11} {row['strategy']:<6} {text}", flush=True)
        if options.out:
            new = [{**row, **facts} for row in rows if len(row) > len(ROW)]
            names = [[row[key] for key in ROW] for row in new]
            kept = [row for row in earlier["rows"] if [row[key] for key in ROW] not in names]
            write_json(options.out, {**earlier, "rows": kept + new})

    rows: list[dict[str, Any]] = [
        dict(zip(ROW, (domain, f"{domain}/{DOMAINS[domain][0]}", strategy, options.devices, options.small)))
        for domain in options.domain
        for strategy in options.strategy
    ]
    facts = {key: value for key, value in place.items() if key not in PLACE}
    facts |= {"steps": options.steps, "command": " ".join(["python benchmarks/distributed.py", *said])}
    earlier = earlier_file(options.out, place) if options.out else {}
    with tempfile.TemporaryDirectory() as work:
        options.work = Path(work)
        if options.only != "speed":
            compare(rows, options, tell)
        if options.only != "equal":
            measure(rows, options, tell)
    return int(any(not row.get("difference", 0) <= TOLERANCE for row in rows))


if __name__ == "__main__":
    leave(main)
