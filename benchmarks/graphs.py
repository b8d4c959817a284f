"""Models on one graph data set with the same budget: fit and test by a configuration, collected in one file.

    python benchmarks/graphs.py --config graphs/dag_ssm_tiny_pyast --models mlp gcn gine gps dag_gine_tiny --seeds 0 1 2

Writes benchmarks/results/graphs/CONFIG.json after every run; rows of models and seeds that are already there stay.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from omnissm.__main__ import main as omnissm
from omnissm.ssmcore.training import write_atomic

RESULTS = Path(__file__).resolve().parent / "results" / "graphs"


def run(config: str, model: str, seed: int, folder: Path, words: list[str]) -> dict:
    """Fit and test one model; metrics, parameters and CPU seconds of the fit."""
    common = ["--run", str(folder / f"{model}-{seed}"), "--trainer.enable_progress_bar", "false"]
    start = time.process_time()
    options = ["--model.init_args.model", model, "--seed_everything", str(seed), *words]
    if omnissm(["graphs", "fit", "-c", config, *options, *common]):
        raise SystemExit(1)
    seconds = time.process_time() - start
    if omnissm(["graphs", "test", *common]):
        raise SystemExit(1)
    found = json.loads((folder / f"{model}-{seed}" / "metrics.json").read_text())
    row = {"model": model, "seed": seed, "cpu_s": round(seconds, 1), "parameters": found["parameters"]}
    return row | {name: round(value, 4) for name, value in found["metrics"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--name", help="name of the result file, by default the configuration's")
    arguments, words = parser.parse_known_args()
    out = RESULTS / f"{arguments.name or Path(arguments.config).stem}.json"
    content = json.loads(out.read_text()) if out.is_file() else {"rows": []}
    options = f" {' '.join(words)}" if words else ""
    content |= {"config": arguments.config + options, "torch": torch.__version__, "threads": 1}
    done = {(row["model"], row["seed"]) for row in content["rows"]}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in arguments.seeds:
            for model in arguments.models:
                if (model, seed) in done:
                    continue
                content["rows"].append(run(arguments.config, model, seed, Path(scratch), words))
                write_atomic(out, json.dumps(content, indent=1) + "\n")
                print(content["rows"][-1], file=sys.stderr, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
