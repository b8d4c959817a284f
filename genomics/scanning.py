"""In-silico mutagenesis: all single-base changes of an interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from .files import atomic_path
from .intervals import Interval, Variant
from .likelihood import Scorer
from .reference import Reference
from .score_output import write_scores
from .scoring import ScoreTable, score_variants

SUFFIXES = (".tsv", ".tsv.gz", ".parquet", ".npy")


def scan(
    reference: str | Path | Reference,
    interval: Interval,
    model: str | Path | nn.Module | Scorer,
    *,
    skip_n: bool = True,
    **options: Any,
) -> tuple[ScoreTable, npt.NDArray[np.float64]]:
    """Score the three other bases at every position of an interval.

    Args:
        reference: The genome, or its file.
        interval: Where; its contig by the reference's name.
        model: As for `score_variants`.
        skip_n: Leave out positions that are N; else they get the status of any other such row.
        **options: Of `score_variants`.

    Returns:
        The table, and (4, l) scores in the order A, C, G, T: 0 at the reference base, NaN where there is none.
    """
    genome = reference if isinstance(reference, Reference) else Reference(reference)
    bases = genome.fetch(interval.chrom, interval.start, interval.end).decode()
    variants = [
        Variant(interval.chrom, interval.start + k, base, alt)
        for k, base in enumerate(bases)
        if base in "ACGT" or not skip_n
        for alt in "ACGT"
        if alt != base
    ]
    table = score_variants(variants, genome, model, **options)
    name = next(name for name in table if name not in ("record", "alt_index") and table[name].dtype.kind == "f")
    scores = np.full((4, len(bases)), np.nan)
    for k, base in enumerate(bases):
        if base in "ACGT":
            scores["ACGT".index(base), k] = 0.0
    for variant, value in zip(variants, table[name]):
        scores["ACGT".index(variant.alt), variant.start - interval.start] = value
    return table, scores


def check_scan_output(out: str | Path) -> None:
    """Refuse a bad name before the work.

    Raises:
        ValueError: for an unknown suffix.
    """
    if str(out) != "-" and not str(out).endswith(SUFFIXES):
        raise ValueError(f"unknown kind of output {str(out)!r}; expected {', '.join(SUFFIXES)}, or -")


def write_scan(out: str | Path, table: ScoreTable, scores: npt.NDArray[np.float64]) -> None:
    """Write the table (.tsv, .tsv.gz, .parquet, or - for TSV), or the (4, l) array (.npy).

    Raises:
        ValueError: for another suffix.
    """
    check_scan_output(out)
    if str(out).endswith(".npy"):
        with atomic_path(out) as temporary, open(temporary, "wb") as file:
            np.save(file, scores)
    else:
        write_scores(str(out), lambda: [([], dict(table))], list(table), header=(), facts=table.facts, prefix="SSM")
