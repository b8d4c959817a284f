"""Gene essentiality without training: how much a stop cassette near a gene's start costs in likelihood.

A window around the gene, in the gene's orientation; the knock-out replaces 15 bases by `TAATAATAATAGTGA`, 12 bases
after the first base of the start codon. The score is the log-likelihood of the wild type minus that of the knock-out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .annotation import Feature
from .genbank import genetic_code
from .likelihood import Scorer
from .progress import Progress
from .reference import Reference
from .sequence import gc_content, reverse_complement

CASSETTE = b"TAATAATAATAGTGA"


@dataclass(frozen=True)
class GeneScore:
    """Result for one gene.

    Attributes:
        gene: The gene.
        status: "ok", "joined" (several parts), "partial" (no legal start or stop), "too_short" (for the cassette),
            "outside" (the cassette lies outside the window), "contig_missing".
        gc: Share of G and C.
        cai: Codon adaptation index; NaN without a reference set.
        ll_wt, ll_ko: Log-likelihoods of the windows, nats.
    """

    gene: Feature
    status: str
    gc: float = float("nan")
    cai: float = float("nan")
    ll_wt: float = float("nan")
    ll_ko: float = float("nan")

    @property
    def score(self) -> float:
        """Log-likelihood lost by the knock-out."""
        return self.ll_wt - self.ll_ko


def score_genes(
    scorer: Scorer,
    reference: Reference,
    genes: Sequence[Feature],
    *,
    window: int = 8192,
    offset: int = 12,
    table: int = 11,
    progress: bool | None = False,
) -> list[GeneScore]:
    """Scores of genes, in order.

    Args:
        scorer: A causal model.
        reference: The genome; a circular contig wraps, at the end of a linear one the window is shifted.
        genes: Genes or coding sequences, from start codon to stop codon.
        window: Bases around the gene.
        offset: Bases from the first base of the start codon to the cassette.
        table: Genetic code.
        progress: Show how far it is on stderr.

    Raises:
        ValueError: for an unknown genetic code, an empty window or an offset before the gene.
    """
    if window < 1 or offset < 0:
        raise ValueError(f"expected a window of at least 1 base and an offset of at least 0, got {window} and {offset}")
    code = genetic_code(table)
    weights = adaptation_weights(reference, genes, table)
    if scorer.max_length:
        window = min(window, scorer.max_length - scorer.bos)
    found: dict[int, GeneScore] = {}
    windows: dict[int, tuple[bytes, bytes]] = {}
    for k, gene in enumerate(genes):
        status, gc, cai = "ok", float("nan"), float("nan")
        if gene.chrom not in reference.lengths:
            status = "contig_missing"
        elif gene.parts:
            status = "joined"
        else:
            bases = reference.fetch_interval(gene.interval)
            gc, cai = gc_content(bases), codon_adaptation(bases, weights)
            legal = bases[:3].decode() in code.starts and bases[-3:].decode() in code.stops and len(bases) % 3 == 0
            if not legal:
                status = "partial"
            elif len(bases) < offset + len(CASSETTE):
                status = "too_short"
            else:
                pair = _windows(reference, gene, window, offset)
                status = "outside" if pair is None else "ok"
                if pair is not None:
                    windows[k] = pair
        found[k] = GeneScore(gene, status, gc, cai)
    keys = list(windows)
    sequences = [sequence for k in keys for sequence in windows[k]]
    total = np.zeros(len(sequences))
    bar = Progress("sequences", len(sequences), show=progress)
    for batch in scorer.batches(sequences):
        for k, values in zip(batch, scorer.log_probs([sequences[k] for k in batch])):
            total[k] = np.nansum(values)
        bar.add(len(batch))
    bar.close()
    for at, k in enumerate(keys):
        old = found[k]
        found[k] = GeneScore(old.gene, "ok", old.gc, old.cai, float(total[2 * at]), float(total[2 * at + 1]))
    return [found[k] for k in range(len(genes))]


def _windows(reference: Reference, gene: Feature, window: int, offset: int) -> tuple[bytes, bytes] | None:
    """Wild type and knock-out in the gene's orientation, or None if the cassette lies outside."""
    length = reference.lengths[gene.chrom]
    window = min(window, length)
    place = gene.interval.resize(window)
    start = place.start
    if gene.chrom not in reference.circular:
        start = min(max(start, 0), length - window)
    bases = reference.fetch(gene.chrom, start, start + window)
    first = gene.start - start
    if gene.strand == "-":
        bases, first = reverse_complement(bases), start + window - gene.end
    at = first + offset
    if at < 0 or at + len(CASSETTE) > window:
        return None
    return bases, bases[:at] + CASSETTE + bases[at + len(CASSETTE) :]


def adaptation_weights(reference: Reference, genes: Sequence[Feature], table: int = 11) -> dict[str, float]:
    """Relative adaptiveness of codons by use in ribosomal protein genes (pseudo-count 0.5); {} without such genes."""
    names = re.compile(r"ribosomal protein|\brp[lsm][A-Z]\b", re.IGNORECASE)
    keys = ("product", "Name", "gene", "symbol", "name")
    chosen = [
        gene
        for gene in genes
        if not gene.parts
        and gene.chrom in reference.lengths
        and any(names.search(gene.attributes.get(key, "")) for key in keys)
    ]
    if not chosen:
        return {}
    acids = genetic_code(table).amino_acids
    counts: Counter[str] = Counter()
    for gene in chosen:
        counts.update(_codons(reference.fetch_interval(gene.interval)))
    used = {codon: counts[codon] + 0.5 for codon, acid in acids.items() if acid != "*"}
    best = {acid: max(n for codon, n in used.items() if acids[codon] == acid) for acid in set(acids.values()) - {"*"}}
    alone = {acid for acid in best if sum(acids[codon] == acid for codon in used) == 1}
    return {codon: n / best[acids[codon]] for codon, n in used.items() if acids[codon] not in alone}


def codon_adaptation(bases: bytes, weights: dict[str, float]) -> float:
    """Codon adaptation index: geometric mean of the weights of a gene's codons; NaN without weights."""
    logs = [np.log(weights[codon]) for codon in _codons(bases) if codon in weights]
    return float(np.exp(np.mean(logs))) if logs else float("nan")


def _codons(bases: bytes) -> list[str]:
    text = bases.decode()
    return [text[k : k + 3] for k in range(0, len(text) - 2, 3)]


def auroc(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Area under the ROC curve: probability that a positive scores above a negative, ties counting half.

    Args:
        scores: (n,); NaN is left out.
        labels: (n,) of 0 and 1.
    """
    values, truth = np.asarray(scores, float), np.asarray(labels).astype(bool)
    known = ~np.isnan(values)
    values, truth = values[known], truth[known]
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[inverse]
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))
