"""Measure scoring, reading and training of DNA models, and write table, picture and packaged model from training runs.

    python benchmarks/genomics.py JOB ... [--device cpu|cuda] [--model FOLDER_OR_NAME] [--data FOLDER] [--out FOLDER]
        [--genome FASTA] [--seconds S]

records   seconds for 200,000 VCF records: read, and REF checked against a genome of as many bases as E. coli
tem1      all SNVs of the TEM-1 gene with hnet_tiny, window 512, both strands, two threads (DATA: bla_tem1)
fitness   rank correlation of scores of these SNVs with measured fitness, beside Markov order 7 and BLOSUM62
score     variants per second with --model (default dnahnet_small, untrained), window 8,192, both strands, bfloat16
long      seconds and memory of scoring one sequence of 1,048,576 bases
          (score, long and train read --genome, or random bases where it is not given)
train     bases per second of training steps: dnahnet_small beside isotropic models of its size
curves    table in docs/genomics_models.md and docs/images/genomics_flops.png from the runs of genomics_train.py
install   --from FOLDER (its NAME.json and NAME/): genomics/pretrained/NAME_ecoli with its card
keep      --from FOLDER (its NAME.json, .csv, .log, .config.yaml and .metrics.csv): configuration, log and, for models
          that are not packaged, a card in results/nvidia-h100-80gb-hbm3/genomics/NAME

Measurements go to results/DEVICE/genomics.json after each job, which replaces its own rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # not there under PYTHONSAFEPATH

from command import leave
from run import describe, folder_of, write_json

from omnissm.genomics import (
    Reference,
    create_model,
    from_pretrained,
    pretrained_models,
    read_variants,
    save_pretrained,
    score_variants,
)
from omnissm.genomics.contigs import ContigMap
from omnissm.genomics.curves import plot_curves, read_curve
from omnissm.genomics.data.batch import SequenceBatch
from omnissm.genomics.loading import load_model, load_scorer
from omnissm.genomics.models import MODELS, PACKAGED
from omnissm.genomics.models.markov import MarkovModel
from omnissm.genomics.status import Policy, check
from omnissm.genomics.tasks import CausalLM
from omnissm.ssmcore.training.optim import create_optimizer

ROOT = HERE.parent
RUNS = HERE / "results" / "nvidia-h100-80gb-hbm3" / "genomics"
PAGE = ROOT / "docs" / "genomics_models.md"
PICTURE = ROOT / "docs" / "images" / "genomics_flops.png"
BEGIN, END = "<!-- curves: begin -->\n", "<!-- curves: end -->\n"
ORDER = ("dnahnet_small", "mamba2_small", "transformer_small", "dnahnet_debug", "mamba2_debug", "transformer_debug")
MARKOV = 1.930  # order 7, first 90 % to last 10 %: the command stands in docs/genomics_models.md
HEADER = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"

Options = argparse.Namespace


def random_genome(bases: int) -> Reference:
    text = np.frombuffer(b"ACGT", np.uint8)[np.random.default_rng(0).integers(4, size=bases)].tobytes()
    return Reference.from_sequences({"c": text})


def genome_of(options: Options, bases: int) -> Reference:
    """The genome that was named, at least so many bases in its first contig, or random bases."""
    if options.genome is None:
        return random_genome(bases)
    genome = Reference(options.genome, cache="memory")
    if genome.lengths[genome.names[0]] < bases:
        raise SystemExit(f"{options.genome}: the first contig has fewer than {bases:,} bases")
    return genome


def write_snvs(path: Path, genome: Reference, places: list[int]) -> None:
    name, other = genome.names[0], dict(zip("ACGT", "CATG"))
    text = genome.fetch(name, 0, genome.lengths[name]).decode()
    path.write_text(HEADER + "".join(f"{name}\t{at + 1}\t.\t{text[at]}\t{other[text[at]]}\t.\t.\t.\n" for at in places))


def records(options: Options, folder: Path) -> list[dict[str, Any]]:
    genome, count = random_genome(4_640_000), 200_000
    write_snvs(folder / "r.vcf", genome, sorted(random.Random(0).sample(range(4_640_000), count)))
    contigs, policy = ContigMap(genome.lengths), Policy()
    began, used = time.perf_counter(), time.process_time()
    ok = sum(
        check(record, alt, genome, contigs, policy).status == "ok"
        for record in read_variants(folder / "r.vcf")
        for alt in record.alts
    )
    seconds = time.perf_counter() - began
    if ok != count:
        raise SystemExit(f"{count - ok} records were not ok")
    row = {"job": "records", "records": count, "seconds": round(seconds, 2)}
    return [row | {"cpu_seconds": round(time.process_time() - used, 2), "required_s": 15}]


def tem1(options: Options, folder: Path) -> list[dict[str, Any]]:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    scorer = load_scorer(create_model("hnet_tiny"), device="cpu")
    plasmid = Reference(options.data / "pBAD30.fa", circular=True)
    began, used = time.perf_counter(), time.process_time()
    table = score_variants(options.data / "bla_tem1_snvs.vcf", plasmid, scorer, window=512)
    row = {"job": "tem1", "model": "hnet_tiny", "window": 512, "threads": 2, "counts": table.counts()}
    row |= {"seconds": round(time.perf_counter() - began, 1), "cpu_seconds": round(time.process_time() - used, 1)}
    return [row | {"required_s": 180}]


def fitness(options: Options, folder: Path) -> list[dict[str, Any]]:
    from Bio.Align import substitution_matrices

    facts = []
    for line in (options.data / "bla_tem1_snvs.vcf").read_text().splitlines():
        if not line.startswith("#"):
            facts.append(dict(word.split("=", 1) for word in line.split("\t")[7].split(";")))
    kept = [k for k, fact in enumerate(facts) if "DMS2500" in fact]
    truth = [float(facts[k]["DMS2500"]) for k in kept]
    plasmid = Reference(options.data / "pBAD30.fa", circular=True)
    matrix = substitution_matrices.load("BLOSUM62")
    found = {"BLOSUM62": [float(matrix[facts[k]["AACHANGE"][0]][facts[k]["AACHANGE"][-1]]) for k in kept]}
    models: dict[str, Any] = {}
    if options.genome:
        coli = Reference(options.genome)
        models["markov order 7"] = MarkovModel(7, 100.0).fit([coli.fetch(n, 0, coli.lengths[n]) for n in coli.names])
    models[options.model] = load_model(options.model)
    for name, model in models.items():
        scorer = load_scorer(model, device=options.device)
        table = score_variants(options.data / "bla_tem1_snvs.vcf", plasmid, scorer, window=options.window)
        found[name] = [float(table["llr"][k]) for k in kept]
    return [
        {
            "job": "fitness",
            "by": name,
            "window": options.window,
            "snvs": len(kept),
            "spearman": round(rho(values, truth), 4),
        }
        for name, values in found.items()
    ]


def rho(a: list[float], b: list[float]) -> float:
    """Spearman's rank correlation."""
    import pandas as pd

    return float(pd.Series(a).rank().corr(pd.Series(b).rank()))


def network(options: Options) -> Any:
    """A model by name, untrained, or from a folder or the package."""
    torch.manual_seed(0)
    return create_model(options.model) if options.model in MODELS else load_model(options.model)


def score(options: Options, folder: Path) -> list[dict[str, Any]]:
    genome = genome_of(options, 1_000_000)
    places = sorted(random.Random(0).sample(range(10_000, 990_000), options.variants + 64))
    warm, places = places[::17][:64], [at for k, at in enumerate(places) if k % 17]
    write_snvs(folder / "warm.vcf", genome, warm)
    rows = []
    for tokens, shared in itertools.product(options.batch_tokens, (True, False)):
        scorer = load_scorer(network(options), device=options.device, dtype=options.dtype, batch_tokens=tokens)
        scorer.continues = scorer.continues and shared
        for _ in range(2):  # the first pass compiles
            began = time.perf_counter()
            score_variants(folder / "warm.vcf", genome, scorer, window=options.window, workers=1)
        rate = len(warm) / (time.perf_counter() - began)
        count = max(64, min(len(places), int(rate * options.seconds)))
        write_snvs(folder / "s.vcf", genome, sorted(random.Random(1).sample(places, count)))
        reset(options)
        began = time.perf_counter()
        table = score_variants(folder / "s.vcf", genome, scorer, window=options.window, workers=1)
        seconds = time.perf_counter() - began
        if table.counts() != {"ok": table.n_rows}:
            raise SystemExit(f"not all variants were scored: {table.counts()}")
        row = {"job": "score", "model": options.model, "window": options.window, "batch_tokens": tokens}
        row |= {"share_prefix": shared, "dtype": scorer.dtype, "variants": table.n_rows, "seconds": round(seconds, 2)}
        row |= {"variants_per_s": round(table.n_rows / seconds, 1), "peak_gib": peak(options), "required": 40}
        rows.append(row)
        print(row, flush=True)
    return rows


def long(options: Options, folder: Path) -> list[dict[str, Any]]:
    genome = genome_of(options, options.bases)
    scorer = load_scorer(network(options), device=options.device, dtype=options.dtype)
    sequence = genome.fetch(genome.names[0], 0, options.bases)
    scorer.log_probs([sequence[: min(len(sequence), 131_072)]])
    reset(options)
    began = time.perf_counter()
    (values,) = scorer.log_probs([sequence])
    seconds = time.perf_counter() - began
    row = {"job": "long", "model": options.model, "bases": options.bases, "dtype": scorer.dtype}
    row |= {"seconds": round(seconds, 2), "bases_per_s": round(options.bases / seconds), "peak_gib": peak(options)}
    return [row | {"bits_per_base": round(float(-np.nanmean(values) / math.log(2)), 4), "required_gib": 16}]


def train(options: Options, folder: Path) -> list[dict[str, Any]]:
    rows = []
    genome = genome_of(options, max(options.rows) * options.window)
    for count, name in itertools.product(options.rows, options.models):
        text = genome.fetch(genome.names[0], 0, count * options.window)
        bases = np.frombuffer(text, np.uint8).reshape(count, options.window)
        torch.manual_seed(0)
        task = CausalLM(name).to(options.device).train()
        if options.compile:
            task.net.compile()
        task.log = task.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
        optimizer = create_optimizer(task, lambda groups: torch.optim.AdamW(groups, lr=1e-4), task.lr_scales())
        assert optimizer is not None
        tokens = torch.from_numpy(bases.astype(np.int64)).to(options.device)
        batch = SequenceBatch(tokens, torch.ones_like(tokens, dtype=torch.bool))

        def step(task: Any = task, optimizer: Any = optimizer, batch: SequenceBatch = batch) -> list[float]:
            with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
                nats, _, found = task.losses(batch)
                loss = nats.mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return [float(boundaries.mask.double().mean()) for boundaries in found]

        for _ in range(3):
            step()
        reset(options)
        began = time.perf_counter()
        for _ in range(options.steps):
            rates = step()
        wait(options)
        seconds = (time.perf_counter() - began) / options.steps
        flops = task.net.flops(options.window, rates=rates, mode="train") * count
        row = {"job": "train", "model": name, "rows": count, "length": options.window, "rates": rates}
        row["compiled"] = options.compile
        row |= {"step_ms": round(1e3 * seconds, 1), "bases_per_s": round(tokens.numel() / seconds)}
        rows.append(row | {"tflop_per_s": round(flops / seconds / 1e12, 2), "peak_gib": peak(options)})
        print(rows[-1], flush=True)
        del task, optimizer
    return rows


def wait(options: Options) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def reset(options: Options) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(options: Options) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if options.device == "cuda" else None


def runs() -> dict[str, tuple[dict[str, Any], list[dict[str, float]]]]:
    """Result and curve of every model that was trained, in the table's order."""
    names = [name for name in ORDER if (RUNS / f"{name}.json").is_file()]
    return {name: (json.loads((RUNS / f"{name}.json").read_text()), read_curve(RUNS / f"{name}.csv")) for name in names}


def bits_at(curve: list[dict[str, float]], flops: float) -> float | None:
    """Bits of the test part after so many operations, between rows by the logarithm; None beyond the ends."""
    x, y = [math.log(row["flops"]) for row in curve], [row["test_bits"] for row in curve]
    return float(np.interp(math.log(flops), x, y)) if x[0] <= math.log(flops) <= x[-1] else None


def best_row(result: dict[str, Any], curve: list[dict[str, float]]) -> dict[str, float]:
    return next(row for row in curve if row["step"] == result["best_step"])


def table() -> str:
    found = runs()
    lines = [
        "| model | parameters | steps | bases read | training FLOPs | bits per base | at equal FLOPs | rates |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (result, curve) in found.items():
        size = name.rpartition("_")[2]
        limit = min(best_row(*one)["flops"] for other, one in found.items() if other.endswith(f"_{size}"))
        own, equal = best_row(result, curve), bits_at(curve, limit)
        rates = ", ".join(f"{value:.3f}" for value in result["rates"].values())
        lines.append(
            f"| `{name}` | {result['parameters']:,} | {result['best_step']:,} | {own['bases'] / 1e6:.0f} M |"
            f" {own['flops']:.2e} | {own['test_bits']:.4f} | {'' if equal is None else f'{equal:.3f}'} | {rates} |"
        )
    return "\n".join(lines) + "\n"


def curves(options: Options, folder: Path) -> list[dict[str, Any]]:
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    text = before + BEGIN + table() + END + rest.split(END)[1]
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, PAGE)
    plot_curves({name: curve for name, (_, curve) in runs().items()}, PICTURE, lines={"Markov, order 7": MARKOV})
    print(PAGE, PICTURE, sep="\n")
    return []


def card(name: str, result: dict[str, Any], own: dict[str, float], config: dict[str, Any]) -> str:
    """What README.md of a model says; every figure comes from the run's files."""
    model, steps = result["model"], config["trainer"]["max_steps"]
    length = config["data"]["init_args"]["length"] + config["data"]["init_args"]["bos"]
    packaged = name != model
    purpose = (
        "For quick starts and tests of the tools, not for conclusions about variants.\n\n"
        f'```python\nfrom omnissm.genomics import from_pretrained\n\nmodel = from_pretrained("{name}")\n```'
        if packaged
        else "The weights are not kept: configuration, log and curve are, and the command below makes them anew."
    )
    end = ", where the clock ended the run; several trainings shared the machine" if result["steps"] < steps else ""
    licence = f"Licence{' of the weights' if packaged else ''}: Apache-2.0, as the package."
    selection = result.get("selection", {})
    thirds = [selection[f"stage 0, codon position {k}"] for k in (1, 2, 3)]
    shares = " / ".join(f"{100 * value:.1f}" for value in thirds)
    rates = ", ".join(f"{value:.3f}" for value in result["rates"].values())
    targets = ", ".join(f"{1 / value:.3f}" for value in result["targets"])
    return f"""---
library_name: omnissm
license: apache-2.0
tags: [dna, genomics, h-net]
---

# {name}

`{model}`, {result["parameters"]:,} parameters, trained on one genome: *Escherichia coli* K-12 MG1655.
{purpose}

## Data

U00096.2, 4,639,675 bases, both strands: the first 88 % for training, the next 2 % to choose the checkpoint, the last
10 % for the test. The record comes from an INSDC database, whose records may be used without restriction.

## Training

`python benchmarks/genomics_train.py {model} --data FOLDER --out FOLDER --steps {steps}`, configuration
`genomics/{model}_ecoli`, bfloat16 autocast, {result["device"]}, torch {result["torch"]}:
{result["training_seconds"]:.0f} s for {result["steps"]:,} steps, {result["bases_seen"] / 1e6:.0f} million bases,
{result["training_flops"]:.2e} FLOPs{end}. The weights
are those of step {result["best_step"]:,}. Configuration, log and curve:
`benchmarks/results/nvidia-h100-80gb-hbm3/genomics/{model}*` of the source.

## Figures on the last 10 %

| | |
| --- | --- |
| bits per base, windows of the training length, nothing read before them | {own["test_bits"]:.4f} |
| bits per base, windows of 8,192 | {result["bits_per_base_without_context"]:.4f} |
| bits per base, windows of 8,192 of which the second half is scored | {result["bits_per_base"]:.4f} |
| interpolated Markov model, order 7, first 90 % to last 10 % | {MARKOV:.3f} |
| positions that begin a chunk (target {targets}) | {rates} |
| selected at codon positions 1 / 2 / 3, % | {shares} |

The rates of the codon positions differ {max(thirds) / min(thirds):.2f}-fold between the extremes.

## Limits

One bacterium, windows of {length:,} bases in training. Scores of variants in other genomes mean little{measured(name)}.
The model has read most genes of *E. coli*: use other models for questions about them.

{licence}
"""


def measured(name: str) -> str:
    """What the comparison with measured fitness gave for a model, if it was made."""
    for path in sorted((HERE / "results").glob("*/genomics.json")):
        rows = {row["by"]: row for row in json.loads(path.read_text())["rows"] if row["job"] == "fitness"}
        if name in rows:
            others = ", ".join(f"{by} {row['spearman']:.3f}" for by, row in rows.items() if by != name)
            own = rows[name]
            return (
                f": with\nthe measured fitness of {own['snvs']:,} SNVs of the gene TEM-1 they correlate by"
                f" {own['spearman']:.3f} (Spearman,\nwindow {own['window']:,}; beside it {others})"
            )
    return ",\nand no score of this model has been compared with measured effects"


def install(options: Options, folder: Path) -> list[dict[str, Any]]:
    result = json.loads((options.source / f"{options.model}.json").read_text())
    own = best_row(result, read_curve(options.source / f"{options.model}.csv"))
    name = f"{options.model}_ecoli"
    config = yaml.safe_load((options.source / f"{options.model}.config.yaml").read_text())
    target = save_pretrained(from_pretrained(options.source / options.model), PACKAGED / name)
    (target / "README.md").write_text(card(name, result, own, config))
    for path in target.iterdir():
        if path.stat().st_size > 6_000_000:
            shutil.rmtree(target)
            raise SystemExit(
                f"{path.name} has {path.stat().st_size:,} bytes, more than the 6,000,000 of a packaged file"
            )
    print(target)
    return []


def keep(options: Options, folder: Path) -> list[dict[str, Any]]:
    name, source = options.model, options.source
    result, curve = json.loads((source / f"{name}.json").read_text()), read_curve(source / f"{name}.csv")
    text = (source / f"{name}.config.yaml").read_text()
    config = yaml.safe_load(text)
    fasta = Path(config["data"]["init_args"]["fasta"])
    places = {str(Path(config["run"]).parents[1]): "OUT", str(fasta.parent): "DATA"}
    target = RUNS / name
    target.mkdir(parents=True, exist_ok=True)
    for old, new in (("config.yaml", "config.yaml"), ("log", "train.log"), ("metrics.csv", "metrics.csv")):
        content = (source / f"{name}.{old}").read_text()
        for place, word in places.items():
            content = content.replace(place, word)
        (target / new).write_text(content)
    if f"{name}_ecoli" not in pretrained_models():
        (target / "README.md").write_text(card(name, result, best_row(result, curve), config))
    print(target)
    return []


JOBS = {job.__name__: job for job in (records, tem1, fitness, score, long, train, curves, install, keep)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", choices=JOBS, metavar="JOB", help=", ".join(JOBS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="dnahnet_small", help="for fitness, score, long, install and keep")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "data" / "genomics" / "bla_tem1", help="for tem1 and fitness"
    )
    parser.add_argument("--genome", type=Path, help="for fitness: what the Markov model counts; for score, long, train")
    parser.add_argument("--window", type=int, default=8192)
    parser.add_argument("--variants", type=int, default=1024, help="for score: at most so many")
    parser.add_argument("--seconds", type=float, default=60, help="for score: about so long each")
    parser.add_argument("--batch_tokens", type=int, nargs="+", default=[262_144, 1_048_576], help="for score")
    parser.add_argument("--bases", type=int, default=2**20, help="for long")
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16], help="for train")
    parser.add_argument("--steps", type=int, default=10, help="for train")
    parser.add_argument("--models", nargs="+", default=list(ORDER[:3]), help="for train")
    parser.add_argument("--compile", action="store_true", help="for train: compile the networks")
    parser.add_argument("--from", dest="source", type=Path, help="for install and keep: results of genomics_train.py")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for DEVICE/genomics.json")
    parser.add_argument("--commit", help="commit to note, where the code is a copy without history")
    options = parser.parse_args(argv)
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if {"install", "keep"} & set(options.jobs) and options.source is None:
        parser.error("install and keep need --from FOLDER")
    for job in options.jobs:
        with tempfile.TemporaryDirectory() as folder:
            rows = JOBS[job](options, Path(folder))
        print(*rows, sep="\n", flush=True)
        if rows:
            about = describe(torch.device(options.device), options.commit)
            path = options.out / folder_of(about["device"]) / "genomics.json"
            old = json.loads(path.read_text())["rows"] if path.is_file() else []
            write_json(path, {**about, "rows": [row for row in old if row["job"] != job] + rows})
    return 0


if __name__ == "__main__":
    leave(main)
