"""Models on one graph data set with the same budget: fit and test by a configuration, collected in one file.

    python benchmarks/graphs.py --config graphs/order_gine_tiny_pyast --models gine order_gine_tiny --seeds 0 1 2

Writes OUT/NAME.json after every run, by default benchmarks/results/graphs/CONFIG.json; rows of models and seeds that
are already there stay. `--jobs` runs are made at once, each on one thread, in the order given: the slowest model first.
The checkpoint of the best validation value is tested. A model may bring options, as in
dag_gine_tiny:d_state=4,n_layer=2; other options are handed to the fit.
"""

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # not there under PYTHONSAFEPATH

from command import leave

from omnissm.ssmcore.training import write_atomic

RESULTS = HERE / "results" / "graphs"


def run(config: str, model: str, seed: int, folder: Path, words: list[str]) -> dict:
    """Fit and test one model; metrics, parameters and CPU seconds of the fit."""
    name, _, own = model.partition(":")
    place = folder / f"{model}-{seed}"
    common = ["--run", str(place), "--trainer.enable_progress_bar", "false"]
    options = ["--model.init_args.model", name, "--seed_everything", str(seed), *words]
    for option, value in (pair.split("=", 1) for pair in own.split(",") if own):
        options += [f"--model.init_args.model_args.{option}", value]
    seconds = _omnissm(["graphs", "fit", "-c", config, *options, *common])
    _omnissm(["graphs", "test", *common])
    found = json.loads((place / "metrics.json").read_text())
    row = {"model": model, "seed": seed, "cpu_s": round(seconds, 1), "parameters": found["parameters"]}
    with open(place / "metrics.csv", newline="") as lines:
        epochs = list(csv.DictReader(lines))
    for name in (name.replace("test/", "val/") for name in found["metrics"] if name != "test/loss"):
        values = [float(epoch[name]) for epoch in epochs if epoch.get(name)]
        lower = name.endswith(("rmse", "mae"))
        row[f"best {name}"] = round(min(values) if lower else max(values), 4)
    return row | {name: round(value, 4) for name, value in found["metrics"].items()}


def _omnissm(words: list[str]) -> float:
    """Run one verb in a process of its own; CPU seconds that it took.

    Raises:
        RuntimeError: if it fails; its last words are shown.
    """
    command = [sys.executable, "-m", "omnissm", *words]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{said.read()[-2000:]}")
    return usage.ru_utime + usage.ru_stime


def command_of(content: dict, name: str) -> str:
    """What makes all rows of a result file again."""
    config, *words = content["config"].split(" ")
    command = ["python", "benchmarks/graphs.py", "--config", config, "--models"]
    command += dict.fromkeys(row["model"] for row in content["rows"])
    command += ["--seeds", *(str(seed) for seed in sorted({row["seed"] for row in content["rows"]}))]
    command += [] if name == Path(config).stem else ["--name", name]
    return shlex.join([*command, *words])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", help="name of the result file, by default the configuration's")
    arguments, words = parser.parse_known_args()
    out = arguments.out / f"{arguments.name or Path(arguments.config).stem}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(out.read_text()) if out.is_file() else {"rows": []}
    options = f" {' '.join(words)}" if words else ""
    content |= {"config": arguments.config + options, "torch": torch.__version__, "threads": 1}
    done = {(row["model"], row["seed"]) for row in content["rows"]}
    wanted = [(model, seed) for model in arguments.models for seed in arguments.seeds if (model, seed) not in done]
    order = {model: k for k, model in enumerate(dict.fromkeys([row["model"] for row in content["rows"]]))}
    for model in arguments.models:
        order.setdefault(model, len(order))
    start, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(arguments.jobs) as pool:
        runs = [pool.submit(run, arguments.config, model, seed, Path(scratch), words) for model, seed in wanted]
        for one in as_completed(runs):
            try:
                row = one.result()
            except RuntimeError as error:  # the other runs go on
                failed += 1
                sys.stderr.write(f"{error}\n")
                continue
            content["rows"].append(row)
            content["rows"].sort(key=lambda row: (order[row["model"]], row["seed"]))
            content["command"] = command_of(content, out.stem)
            write_atomic(out, json.dumps(content, indent=1) + "\n")
            sys.stderr.write(f"{time.monotonic() - start:.0f} s: {row}\n")
    sys.exit(f"{failed} of {len(runs)} runs failed." if failed else 0)


if __name__ == "__main__":
    leave(main)
