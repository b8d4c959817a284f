"""Where a hierarchical model cuts DNA, and how that relates to genes."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .annotation import Feature
from .files import open_out
from .intervals import Interval
from .likelihood import Scorer, Stage
from .reference import Reference
from .sequence import reverse_complement

DRAWN = 600  # points along a picture of a region
PROMOTER = 60  # bases upstream of a gene's start
CLASSES = ("all", "promoter", "start codon", "coding", "stop codon", "intergenic")
POSITIONS = ("codon position 1", "codon position 2", "codon position 3")


@dataclass(frozen=True)
class BoundaryTrace:
    """Boundaries of both reading directions over one interval, in base coordinates of the forward strand.

    Attributes:
        interval: Where.
        forward: One entry for each stage, from the forward pass.
        reverse: The same from the pass over the reverse complement, turned round.
    """

    interval: Interval
    forward: list[Stage]
    reverse: list[Stage]


class Rate(NamedTuple):
    """Selection rate of one class.

    Attributes:
        stage: Stage.
        name: Class, one of `CLASSES` or `POSITIONS`.
        rate: Boundaries per eligible position.
        low, high: 95 % interval from resampling genes and the gaps between them.
        eligible: Eligible positions.
        null: Rate with what was cut and eligible of each gene and its promoter shifted by a random offset; genes only,
            what lies between them stays.
    """

    stage: int
    name: str
    rate: float
    low: float
    high: float
    eligible: int
    null: float


def trace(scorer: Scorer, reference: Reference, interval: Interval) -> BoundaryTrace:
    """Boundaries of a model over an interval, read in one piece in both directions.

    Args:
        scorer: A hierarchical model.
        reference: The genome.
        interval: Where.

    Raises:
        ValueError: if the model has no stages.
    """
    bases = reference.fetch(interval.chrom, interval.start, interval.end)
    forward = scorer.boundaries([bases])[0]
    if not forward:
        raise ValueError(f"{scorer.name} has no stages that cut")
    backward = scorer.boundaries([reverse_complement(bases)])[0]
    turned = [Stage(s.mask[::-1], s.eligible[::-1], s.prob[::-1], s.confidence[::-1]) for s in backward]
    return BoundaryTrace(interval, forward, turned)


def annotate(
    traces: Sequence[BoundaryTrace], genes: Sequence[Feature], *, samples: int = 200, seed: int = 0
) -> list[Rate]:
    """Selection rates by class: of plus-strand genes from the forward pass, of minus-strand genes from the reverse one.

    Bases outside genes count in both directions. Eligible for stage s > 0 are the boundaries of stage s - 1.

    Args:
        traces: Of one or several intervals.
        genes: Genes in one piece, from start codon to stop codon; others are left out.
        samples: Resamplings of genes, and random shifts.
        seed: Of both.
    """
    blocks: list[
        list[dict[str, npt.NDArray[np.int64]]]
    ] = []  # per gene and gap, per stage: class -> cut and eligible, as they are and shifted
    rng = np.random.default_rng(seed)
    for found in traces:
        blocks += _blocks(found, genes, rng)
    if not blocks:
        return []
    rates = []
    for stage in range(len(blocks[0])):
        for name in (*CLASSES, *POSITIONS):
            counts = np.array([block[stage].get(name, np.zeros(4, np.int64)) for block in blocks], float)
            cut, eligible, moved, possible = counts.sum(axis=0)
            if not eligible:
                continue
            picks = rng.integers(len(counts), size=(samples, len(counts)))
            drawn = counts[picks].sum(axis=1)
            drawn = drawn[drawn[:, 1] > 0]  # a draw without the class says nothing of it
            ratios = drawn[:, 0] / drawn[:, 1]
            low, high = np.quantile(ratios, [0.025, 0.975])
            null = moved / possible if possible else np.nan
            rates.append(Rate(stage, name, cut / eligible, float(low), float(high), int(eligible), null))
    return rates


def _blocks(
    found: BoundaryTrace, genes: Sequence[Feature], rng: np.random.Generator
) -> list[list[dict[str, npt.NDArray[np.int64]]]]:
    interval, length = found.interval, len(found.interval)
    between = np.ones(length, bool)
    blocks = []
    for gene in genes:
        if not gene.interval.overlap(interval):
            continue
        if gene.start < interval.start or gene.end > interval.end or gene.parts:
            for start, end in gene.parts or ((gene.start, gene.end),):  # the parts of one across the origin lie apart
                between[max(0, start - interval.start) : max(0, end - interval.start)] = False
            continue
        start, end = gene.start - interval.start, gene.end - interval.start
        between[start:end] = False
        stages = found.forward if gene.strand != "-" else found.reverse
        places = np.arange(start, end) if gene.strand != "-" else np.arange(end - 1, start - 1, -1)
        before = places[0] + np.arange(-PROMOTER, 0) * (1 if gene.strand != "-" else -1)
        before = before[(before >= 0) & (before < length)]
        between[before] = False
        shift = int(rng.integers(len(before) + len(places)))
        blocks.append([_count(stage, places, before, shift) for stage in stages])
    rest = np.flatnonzero(between)
    for gap in np.split(rest, np.flatnonzero(np.diff(rest) > 1) + 1):
        for stages in (found.forward, found.reverse):
            counts = []
            for stage in stages:
                here = np.array([stage.mask[gap].sum(), stage.eligible[gap].sum()] * 2, np.int64)
                counts.append({"all": here, "intergenic": here})
            blocks.append(counts)
    return blocks


def _count(
    stage: Stage, places: npt.NDArray[np.int64], before: npt.NDArray[np.int64], shift: int
) -> dict[str, npt.NDArray[np.int64]]:
    """Counts of one gene: cut and eligible, then both shifted. `places` and `before` are in reading direction."""
    every = np.concatenate([before, places])
    rows = np.stack([stage.mask[every], stage.eligible[every]])
    both = np.concatenate([rows, np.roll(rows, shift, axis=1)]).astype(np.int64)  # what is eligible moves along
    promoter, gene = both[:, : len(before)], both[:, len(before) :]
    middle = gene[:, 3 : max(3, len(places) - 3)]
    found = {
        "all": both,
        "promoter": promoter,
        "start codon": gene[:, :3],
        "coding": middle,
        "stop codon": gene[:, -3:],
    }
    found |= {name: middle[:, k::3] for k, name in enumerate(POSITIONS)}
    return {name: values.sum(axis=1) for name, values in found.items()}


def write_trace(out: str | Path, found: BoundaryTrace) -> None:
    """Write forward boundaries as BED (all stages), bedGraph (probabilities of stage 0) or TSV (everything).

    Args:
        out: .bed, .bedgraph or .tsv (also with .gz).
        found: The boundaries.

    Raises:
        ValueError: for another suffix.
    """
    stem = str(out).removesuffix(".gz")
    chrom, start = found.interval.chrom, found.interval.start
    if not stem.endswith((".bed", ".bedgraph", ".tsv")):
        raise ValueError(f"unknown kind of output {str(out)!r}; expected .bed, .bedgraph or .tsv")
    with open_out(out) as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        if stem.endswith(".bedgraph"):
            prob = found.forward[0].prob
            writer.writerows((chrom, start + k, start + k + 1, f"{p:.4f}") for k, p in enumerate(prob))
            return
        if stem.endswith(".tsv"):
            writer.writerow(("chrom", "start0", "strand", "stage", "boundary", "prob", "confidence"))
        for strand, stages in (("+", found.forward), ("-", found.reverse)):
            for s, stage in enumerate(stages):
                for k in np.flatnonzero(stage.mask if stem.endswith(".bed") else stage.eligible):
                    if stem.endswith(".bed"):
                        score = round(1000 * float(stage.prob[k]))
                        writer.writerow((chrom, start + k, start + k + 1, f"stage{s}", score, strand))
                    else:
                        facts = (int(stage.mask[k]), f"{stage.prob[k]:.4f}", f"{stage.confidence[k]:.4f}")
                        writer.writerow((chrom, start + k, strand, s, *facts))


def write_rates(out: str | Path, rates: Sequence[Rate]) -> None:
    """Write rates as TSV, or to standard output for -."""
    with open_out(out) as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(Rate._fields)
        for rate in rates:
            writer.writerow([f"{v:.4f}" if isinstance(v, float) else v for v in rate])


def plot_rates(rates: Sequence[Rate], out: str | Path) -> None:
    """Bars of the rates by class and by codon position, one row of panels for each stage.

    Args:
        rates: Of `annotate`.
        out: .png, .pdf or .svg.

    Raises:
        ImportError: if matplotlib is missing.
    """
    from .figures import figure, save

    stages = sorted({rate.stage for rate in rates})
    with figure(len(stages), 2, width=9, height=2.6 * len(stages)) as (drawing, axes):
        for row, stage in enumerate(stages):
            for column, names in enumerate((CLASSES, POSITIONS)):
                shown = [rate for rate in rates if rate.stage == stage and rate.name in names]
                _bars(axes[row][column], shown)
                axes[row][column].set_title(f"stage {stage}: " + ("by class" if column == 0 else "by codon position"))
        save(drawing, out)


def _bars(ax: Any, rates: Sequence[Rate]) -> None:
    x = np.arange(len(rates))
    values = np.array([100 * rate.rate for rate in rates])
    low, high = (100 * np.array([getattr(rate, name) for rate in rates]) for name in ("low", "high"))
    spread = np.abs(np.stack([values - low, high - values]))
    ax.bar(x, values, width=0.65, yerr=spread, capsize=2, error_kw={"linewidth": 0.8})
    ax.plot(x, [100 * rate.null for rate in rates], "_", markersize=18, color="#7b8794", label="shifted at random")
    ax.set_xticks(x, [rate.name.replace(" ", "\n") for rate in rates])
    ax.set_ylabel("selected, %")
    tops = [100 * max(rate.high, rate.rate, np.nan_to_num(rate.null)) for rate in rates]
    ax.set_ylim(0, 1.3 * max([*tops, 1.0]))  # room for the legend
    ax.legend(loc="upper right")


def _means(values: npt.NDArray[Any], edges: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Means of the stretches that begin at `edges`."""
    return np.add.reduceat(values.astype(float), edges) / np.diff(edges, append=len(values))


def plot_region(found: BoundaryTrace, genes: Sequence[Feature], out: str | Path) -> None:
    """One interval: probability of a cut, boundaries of all stages, and genes.

    Args:
        found: Its boundaries.
        genes: Features to draw.
        out: .png, .pdf or .svg.

    Raises:
        ImportError: if matplotlib is missing.
    """
    from .figures import figure, save

    start = found.interval.start
    with figure(2, 1, width=10, height=3.6, sharex=True) as (drawing, axes):
        top, bottom = axes[0][0], axes[1][0]
        size = -(-len(found.interval) // DRAWN)  # of long regions means over so many bases, which ticks would fill
        edges = np.arange(0, len(found.interval), size)
        x = start + edges + (np.minimum(edges + size, len(found.interval)) - edges - 1) / 2
        top.plot(x, _means(found.forward[0].prob, edges), linewidth=0.7)
        top.axhline(0.5, color="#7b8794", linewidth=0.8)
        top.set_ylabel("probability of a cut")
        below = "ticks below: cuts of each stage" if size == 1 else f"below: share of cuts; means of {size} bases"
        top.set_title(f"{found.interval}, stage 0 forward; {below}")
        for s, stage in enumerate(found.forward):
            if size == 1:
                bottom.vlines(start + np.flatnonzero(stage.mask), s + 0.1, s + 0.9, linewidth=0.6, color=f"C{s}")
            else:
                share = _means(stage.mask, edges)
                bottom.fill_between(x, s + 0.1, s + 0.1 + 0.8 * share, step="mid", linewidth=0, color=f"C{s}")
        depth = len(found.forward)
        for gene in genes:
            if gene.interval.overlap(found.interval):
                low, high = max(gene.start, start), min(gene.end, found.interval.end)
                forward = gene.strand != "-"
                ends = {
                    "xy": (high if forward else low, depth + 0.5),
                    "xytext": (low if forward else high, depth + 0.5),
                }
                bottom.annotate("", **ends, arrowprops={"arrowstyle": "-|>", "linewidth": 2, "color": "#2a9d8f"})
                bottom.text(
                    (low + high) / 2, depth + 0.62, gene.attributes.get("Name", gene.id), ha="center", fontsize=8
                )
        bottom.set_ylim(0, depth + 1.1)
        bottom.set_yticks(np.arange(depth + 1) + 0.5, [*(f"stage {s}" for s in range(depth)), "genes"])
        bottom.set_xlim(start, found.interval.end)
        bottom.set_xlabel(f"{found.interval.chrom}, base (0-based)")
        save(drawing, out)
