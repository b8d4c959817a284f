"""The quick start: an H-Net that comes with the package scores changes in genes, and shows where it cuts DNA."""

from __future__ import annotations

import csv
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..ssmcore.training.report import markdown_table, run_verb, write_summary

__all__ = ["demo"]

MODEL, BASELINE = "dnahnet_debug_ecoli", "markov5_ecoli"
EFFECTS = ("stop", "missense", "silent")
NAMES = {MODEL: "H-Net", BASELINE: "Markov model"}
DRAWN = "3151-3750"  # 1-based: the end of one gene and the start of the next


def demo(out: Path = Path("demo"), count: int = 100, seed: int = 0, window: int = 256, bases: int = 49_152) -> int:
    """Score changes of single bases in genes of E. coli with a trained H-Net, and draw where it cuts.

    Genome, genes and models come with the package. Files in the folder that an earlier demo wrote are replaced.

    Args:
        out: Folder for variants.vcf, scored.vcf.gz, tables, pictures, summary.md and report.html.
        count: Changes of each kind.
        seed: Of the choice of changes.
        window: Bases around a change that the models read.
        bases: Length of the part of the genome on which prediction and cuts are measured.

    Returns:
        0, or 1 if the H-Net is no better than a Markov model.

    Raises:
        ImportError: if a package for files or pictures is missing; the line says what to install.

    Example:
      omnissm demo genomics --out demo
    """
    missing = [name for name in ("matplotlib", "pysam") if find_spec(name) is None]
    if missing:
        raise ImportError(f'the demo needs {", ".join(missing)}; run: pip install "omnissm[demo]"')
    genome = _copy_data(out)
    kinds = write_variants(out / "variants.vcf", genome, out / "genes.gff3", count, seed)
    scores = {
        MODEL: _score(out, genome, MODEL, ["scored.vcf.gz", "scored.tsv"], window),
        BASELINE: _score(out, genome, BASELINE, ["baseline.tsv"], window),
    }
    places = ("--reference", genome, "--model", MODEL, "--genes", out / "genes.gff3")
    drawn = (
        "--regions",
        f"ecoli_part:{DRAWN}",
        "--out",
        out / "cuts_drawn.bed",
        "--region_figure",
        out / "boundaries.png",
    )
    run_verb("genomics", "boundaries", *places, *drawn)
    rates = ("--out", out / "cuts.bed", "--rates", out / "rates.tsv", "--figure", out / "rates.png")
    run_verb("genomics", "boundaries", *places, "--regions", f"ecoli_part:1-{bases}", *rates)
    rows = [_row(name, genome, bases, values, kinds) for name, values in scores.items()]
    _draw(out / "scores.png", scores, kinds)
    model, baseline = rows
    better = all(
        (model[key] < baseline[key]) if key == "bits per base" else (model[key] > baseline[key])
        for key in ("bits per base", "stop or silent")
    )
    write_summary(out, _summary(rows, better, count, window, bases))
    return int(not better)


def _copy_data(out: Path) -> Path:
    """Put the packaged part of a genome and its genes into the folder, as a user's files would lie there."""
    from .models import PACKAGED

    out.mkdir(parents=True, exist_ok=True)
    for name in ("ecoli_part.fa.gz", "genes.gff3"):
        shutil.copy(PACKAGED / "ecoli_part" / name, out / name)
    return out / "ecoli_part.fa.gz"


def write_variants(out: Path, genome: Path, genes: Path, count: int, seed: int) -> np.ndarray:
    """Draw single-base changes in genes, equally many of each effect on the protein, and write them as VCF.

    Args:
        out: The VCF.
        genome: Reference.
        genes: Its coding sequences.
        count: Changes of each of `EFFECTS`.
        seed: Of the choice.

    Returns:
        The effect of each record, in order, (3 * count,).
    """
    from .annotation import read_features
    from .files import atomic_path
    from .reference import Reference
    from .sequence import reverse_complement

    reference = Reference(genome)
    found: dict[str, list[tuple[int, str, str, str]]] = {effect: [] for effect in EFFECTS}
    for gene in read_features(genes, ["CDS"]):
        coding = reference.fetch_interval(gene.interval).decode()
        for k in range(3, len(coding) - 3):  # neither the start codon nor the stop codon
            place = gene.start + k if gene.strand == "+" else gene.end - 1 - k
            for base in set("ACGT") - {coding[k]}:
                ref, alt = coding[k], base
                if gene.strand == "-":
                    ref, alt = (reverse_complement(one).decode() for one in (ref, alt))
                found[_effect(coding[k // 3 * 3 :][:3], k % 3, base)].append((place, ref, alt, gene.attributes["Name"]))
    rng = np.random.default_rng(seed)
    chosen = [
        (*sorted(places)[k], effect)
        for effect, places in found.items()
        for k in rng.choice(len(places), count, replace=False)
    ]
    chosen.sort()
    with atomic_path(out) as temporary:
        lines = [
            "##fileformat=VCFv4.2",
            f"##contig=<ID=ecoli_part,length={reference.lengths['ecoli_part']}>",
            '##INFO=<ID=GENE,Number=1,Type=String,Description="Gene">',
            '##INFO=<ID=EFFECT,Number=1,Type=String,Description="What the change does to the protein">',
            "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO",
        ]
        lines += [
            f"ecoli_part\t{place + 1}\t.\t{ref}\t{alt}\t.\t.\tGENE={gene};EFFECT={effect}"
            for place, ref, alt, gene, effect in chosen
        ]
        Path(temporary).write_text("\n".join(lines) + "\n")
    return np.array([effect for *_, effect in chosen])


def _effect(codon: str, index: int, base: str) -> str:
    from Bio.Seq import translate

    before = translate(codon, table=11)
    after = translate(codon[:index] + base + codon[index + 1 :], table=11)
    return "silent" if before == after else "stop" if after == "*" else "missense"


def _score(out: Path, genome: Path, model: str, names: list[str], window: int) -> np.ndarray:
    """Run the verb, and read the scores back."""
    shutil.rmtree(out / f"{names[0]}.parts", ignore_errors=True)  # of a demo that was interrupted
    outs = f"[{', '.join(str(out / name) for name in names)}]"
    places = ("--variants", out / "variants.vcf", "--reference", genome, "--model", model)
    run_verb("genomics", "score", *places, "--window", window, "--progress", "false", "--out", outs)
    with open(out / names[-1], newline="") as file:
        return np.array([float(row["llr"]) for row in csv.DictReader(file, delimiter="\t")])


def _row(name: str, genome: Path, bases: int, scores: np.ndarray, kinds: np.ndarray) -> dict[str, Any]:
    """Figures of one model: bits per base, and how often a change that harms scores below a silent one."""
    from .essentiality import auroc
    from .evaluation import evaluate_model
    from .intervals import Interval
    from .loading import load_scorer
    from .reference import Reference

    reference = Reference(genome)
    places = [Interval(chrom, 0, bases) for chrom in reference.names]
    row: dict[str, Any] = {"model": NAMES[name]}
    row["bits per base"] = round(evaluate_model(load_scorer(name), reference, places, window=2048).bits_per_base, 3)
    for effect in EFFECTS[:2]:
        both = (kinds == effect) | (kinds == "silent")
        row[f"{effect} or silent"] = round(float(auroc(-scores[both], kinds[both] == effect)), 3)
    return row


def _draw(out: Path, scores: dict[str, np.ndarray], kinds: np.ndarray) -> None:
    """Scores by effect, a panel for each model: every change as a dot, the middle half as a box."""
    from .figures import figure, save

    ends = [min(map(np.min, scores.values())) - 0.5, max(map(np.max, scores.values())) + 0.5]
    with figure(1, len(scores), width=9, height=3.4) as (drawing, axes):
        for ax, (name, values) in zip(axes[0], scores.items()):
            groups = [values[kinds == effect] for effect in EFFECTS]
            ax.boxplot(groups, showfliers=False, widths=0.5, medianprops={"color": "#c8553d", "linewidth": 2})
            rng = np.random.default_rng(0)
            for k, group in enumerate(groups):
                ax.plot(k + 1 + rng.uniform(-0.18, 0.18, len(group)), group, ".", color="C0", alpha=0.5, markersize=4)
            ax.axhline(0, color="#7b8794", linewidth=0.8)
            ax.set_xticks(range(1, len(EFFECTS) + 1), EFFECTS)
            ax.set_ylim(*ends)  # one scale, so that the panels can be compared
            ax.set_title(NAMES[name])
            ax.set_ylabel("score (llr, nats); lower: less expected")
        save(drawing, out)


def _summary(rows: list[dict[str, Any]], better: bool, count: int, window: int, bases: int) -> str:
    """The page a person reads."""
    model, baseline = rows
    verdict = "is better than" if better else "is NOT better than"
    return f"""# Genomics: changes in genes, scored by a small H-Net

A trained H-Net of 1.4 million parameters guesses the next base of *E. coli* DNA that it has not seen with
{model["bits per base"]:.3f} bits per base, ranks a new stop codon below a silent change in {model["stop or silent"]:.0%} of pairs,
and {verdict} a Markov model of order 5 ({baseline["bits per base"]:.3f} bits, {baseline["stop or silent"]:.0%}).

{markdown_table(rows)}
**Bits per base**: how badly each base is guessed from those before it; 2 is a blind guess, lower is better.
**Stop or silent**: of a change that cuts a protein short and a change that leaves the protein as it is, how often the
first one scores lower: 0.5 is chance, 1 would be perfect. **Missense or silent**: the same for changes that exchange one
amino acid. With {count} changes of each kind these shares are uncertain by about {0.4 / count**0.5:.2f}. Nobody told the
models what a gene is. Where a share is not above 0.5, as for the amino acids, the model cannot tell the two kinds apart;
scores of so small a model are of no use there, and they say nothing about human DNA.

![Scores of single-base changes by what they do to the protein.](scores.png)

Each dot is one of {3 * count} changes of a single base, drawn at random from 34 genes. The score is how much less (or,
above 0, more) likely the model finds the {window} bases around it after the change than before. The box holds the
middle half, the red line is the median. If the "stop" box lies below the "silent" box, the model has noticed that stop
codons do not belong into the middle of genes. The scores stand in `scored.vcf.gz` beside each variant (field `SSM_LLR`)
and in `scored.tsv`.

![Where the H-Net cuts 600 bases of the genome.](boundaries.png)

An H-Net cuts DNA into chunks by itself, here about three bases each. Top: for each base the probability that a chunk
begins there; above 0.5 (grey line) it cuts. Below: the cuts as ticks, and the genes as arrows, here the end of *rplL*
and the start of *rpoB*. All cuts are in `cuts.bed`.

![How often it cuts, by kind of place and by position in the codon.](rates.png)

Does it cut anywhere special? Bars are the share of bases at which a chunk begins, with 95 % intervals over genes; grey
marks are what cuts shifted at random along the genes would give. Where a bar stands away from its grey mark, cuts follow
the genes: the three positions of a codon are treated differently, though no one has shown the model a codon.

The commands, in the folder of this page:

    omnissm genomics score --variants variants.vcf --reference ecoli_part.fa.gz --model {MODEL} --window {window} --out '[scored.vcf.gz, scored.tsv]'
    omnissm genomics boundaries --reference ecoli_part.fa.gz --model {MODEL} --regions ecoli_part:{DRAWN} --genes genes.gff3 --out cuts_drawn.bed --region_figure boundaries.png
    omnissm genomics boundaries --reference ecoli_part.fa.gz --model {MODEL} --regions ecoli_part:1-{bases} --genes genes.gff3 --out cuts.bed --rates rates.tsv --figure rates.png
    omnissm genomics evaluate --fasta ecoli_part.fa.gz --model {MODEL} --window 2048

Your own genome and VCF go in the same places.
"""  # noqa: E501  (commands stay on one line)
