"""Train a language model of DNA on E. coli within a budget of time, and write what it reached.

    python benchmarks/genomics_train.py NAME --data FOLDER --out FOLDER --seconds 510 [--steps N] [-- OPTIONS OF FIT]

NAME is a model with a configuration `configs/genomics/NAME_ecoli.yaml`. FOLDER of the data holds the genome
(`*.fna.gz` or `*.fa*`) and, for rates of boundaries by codon position, `genes.gff3`. Written are OUT/NAME.json (one
line), OUT/NAME.csv (the curve), OUT/NAME.config.yaml, the run's folder OUT/runs/NAME, and for small models (below 6 MB)
OUT/NAME, a model folder.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

STARTED = time.monotonic()

import torch
import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # not there under PYTHONSAFEPATH

from command import leave
from run import describe, write_json

from omnissm.__main__ import main as omnissm
from omnissm.genomics import Reference, from_pretrained, save_pretrained
from omnissm.genomics.annotation import read_features
from omnissm.genomics.boundaries import annotate, trace
from omnissm.genomics.curves import read_curve
from omnissm.genomics.evaluation import evaluate_model
from omnissm.genomics.intervals import Interval
from omnissm.genomics.loading import load_scorer

CONFIGS = HERE.parent / "configs" / "genomics"
NAMES = sorted(path.stem.removesuffix("_ecoli") for path in CONFIGS.glob("*_ecoli.yaml"))
LAST = 60.0  # seconds for what comes after training
SMALL = 6_000_000


def genome_of(folder: Path) -> Path:
    found = sorted(path for pattern in ("*.fna.gz", "*.fa.gz", "*.fna", "*.fa") for path in folder.glob(pattern))
    if not found:
        raise SystemExit(f"no genome in {folder}: expected a file such as ecoli_k12_mg1655.fna.gz")
    return found[0]


def overlay(options: argparse.Namespace, config: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What differs from the configuration: where data and results are, and the budget."""
    steps = options.steps or config["trainer"]["max_steps"]
    batch = config["data"]["init_args"]["batch_size"]
    every = max(1, min(options.every or max(25, steps // 24), steps))
    curve = {
        "class_path": "omnissm.genomics.curves.TrainingCurve",
        "init_args": {"path": str(options.out / f"{options.label}.csv"), "test": True},
    }
    return {
        "model": {"init_args": {"lr_scheduler": {"init_args": {"seconds": seconds - 3}}}},
        "data": {
            "init_args": {
                "fasta": str(genome_of(options.data)),
                "num_workers": options.workers,
                "epoch_size": batch * max(1, steps // 8),  # an epoch's only meaning here: the state is saved
            }
        },
        "trainer": {
            "max_steps": steps,
            "max_epochs": -1,
            "max_time": str(dt.timedelta(seconds=int(seconds))).rjust(8, "0").join(("00:", "")),
            "val_check_interval": every,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "callbacks": [*config["trainer"].get("callbacks", []), curve],
        },
    }


def boundary_rates(scorer: Any, genome: Reference, genes: Path, last: Interval) -> dict[str, float]:
    """Selection rates over the held-out part, read in windows of 49,152 bases."""
    places = [
        Interval(last.chrom, start, min(start + 49_152, last.end)) for start in range(last.start, last.end, 49_152)
    ]
    found = annotate([trace(scorer, genome, place) for place in places], read_features(genes, ["CDS"]), samples=20)
    return {f"stage {rate.stage}, {rate.name}": round(rate.rate, 4) for rate in found}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="model, such as dnahnet_small", choices=NAMES, metavar="NAME")
    parser.add_argument("--data", type=Path, required=True, help="folder of the genome")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=510, help="budget, from the start of this program")
    parser.add_argument("--steps", type=int, help="steps of the schedule (default: the configuration's)")
    parser.add_argument("--every", type=int, help="steps between validations (default: a 24th)")
    parser.add_argument("--label", help="name of the results (default: NAME)")
    parser.add_argument("--workers", type=int, default=4, help="loader processes")
    words = sys.argv[1:] if argv is None else list(argv)
    own = words[: words.index("--")] if "--" in words else words
    options = parser.parse_args(own)
    options.options = words[len(own) + 1 :]  # of `omnissm genomics fit`
    options.label = options.label or options.name
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    config_file = CONFIGS / f"{options.name}_ecoli.yaml"
    config = yaml.safe_load(config_file.read_text())
    cuda = torch.cuda.is_available()

    run = options.out / "runs" / options.label
    seconds = options.seconds - (time.monotonic() - STARTED) - LAST
    extra = options.out / f".{options.label}.yaml"
    extra.write_text(yaml.safe_dump(overlay(options, config, seconds)))
    words = ["genomics", "fit", "-c", str(config_file), "-c", str(extra)]
    words += ["-c", "trainer/gpu_bf16"] if cuda else []
    began = time.monotonic()
    code = omnissm([*words, "--run", str(run), "--overwrite", *options.options])
    trained = time.monotonic() - began
    if code:
        return code

    genome = Reference(genome_of(options.data))
    (chrom,) = genome.names
    last = Interval(chrom, round(0.9 * genome.lengths[chrom]), genome.lengths[chrom])
    scorer = load_scorer(run)  # the best weights by validation
    found = {context: evaluate_model(scorer, genome, [last], window=8192, context=context) for context in (0, 4096)}
    curve = read_curve(options.out / f"{options.label}.csv")
    net: Any = scorer.model
    best = min(curve, key=lambda row: row.get("val_bits", float("inf")))
    result = {
        "model": options.name,
        "bits_per_base": round(found[4096].bits_per_base, 5),
        "bits_per_base_without_context": round(found[0].bits_per_base, 5),
        "bases": found[0].bases,
        "steps": int(curve[-1]["step"]),
        "best_step": int(best["step"]),
        "bases_seen": int(curve[-1]["bases"]),
        "training_seconds": curve[-1]["seconds"],
        "fit_seconds": round(trained, 1),
        "training_flops": curve[-1]["flops"],
        "bases_per_second": round(curve[-1]["bases"] / curve[-1]["seconds"]),
        "parameters": sum(p.numel() for p in net.parameters()),
        "rates": {name: round(value, 4) for name, value in best.items() if name.endswith("_rate")},
        "targets": list(net.target_ratios),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "options": options.options,
        **describe(torch.device("cuda" if cuda else "cpu"), None),
    }
    genes = options.data / "genes.gff3"
    if net.target_ratios and genes.is_file():
        result["selection"] = boundary_rates(scorer, genome, genes, last)
    line = json.dumps(result)
    write_json(options.out / f"{options.label}.json", result)
    shutil.copy(run / "config.yaml", options.out / f"{options.label}.config.yaml")
    if 4 * result["parameters"] < SMALL:
        save_pretrained(from_pretrained(run), options.out / options.label)
    print(line, flush=True)
    return 0


if __name__ == "__main__":
    leave(main)
