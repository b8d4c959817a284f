"""Bits per base of a model on sequences it has not seen, beside interpolated Markov models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .intervals import Interval
from .likelihood import Scorer
from .models.markov import MarkovModel
from .progress import Progress
from .reference import Reference
from .sequence import reverse_complement


class Evaluation(NamedTuple):
    """Likelihood of sequences.

    Attributes:
        nats: Sum of the negative log-likelihoods.
        bases: Scored bases.
    """

    nats: float
    bases: int

    @property
    def bits_per_base(self) -> float:
        """Mean bits of a base; 2 is what knowing nothing costs."""
        return self.nats / self.bases / math.log(2) if self.bases else math.nan

    @property
    def perplexity(self) -> float:
        """2 to the bits per base."""
        return 2**self.bits_per_base


def evaluate_model(
    scorer: Scorer,
    reference: Reference,
    regions: Iterable[Interval],
    *,
    window: int = 8192,
    context: int = 0,
    both_strands: bool = False,
    progress: bool | None = False,
) -> Evaluation:
    """Bits per base over regions, each base scored once.

    Args:
        scorer: A causal model.
        reference: The genome.
        regions: Where.
        window: Bases read at once.
        context: Bases of each window that are read but not scored, except at a region's start.
        both_strands: Also read the reverse complement, and average.
        progress: Show how far it is on stderr.

    Raises:
        ValueError: if the context leaves nothing to score, or the model is not causal.
    """
    if scorer.max_length:
        window = min(window, scorer.max_length - scorer.bos)
    if not 0 <= context < window:
        raise ValueError(f"expected a context from 0 to below the window {window}, got {context}")
    pieces: list[tuple[bytes, int]] = []
    for region in regions:
        whole = reference.fetch(region.chrom, region.start, region.end)
        for bases in (whole, reverse_complement(whole)) if both_strands else (whole,):
            at = 0
            while at < len(bases):
                low = max(0, at - context)
                pieces.append((bases[low : low + window], at - low))
                at = low + window
    bar = Progress("bases", sum(len(bases) - skip for bases, skip in pieces), show=progress)
    nats, count = 0.0, 0
    for batch in scorer.batches([bases for bases, _ in pieces]):
        for k, values in zip(batch, scorer.log_probs([pieces[k][0] for k in batch])):
            scored = values[pieces[k][1] :]
            nats -= float(np.nansum(scored))
            count += int((~np.isnan(scored)).sum())
        bar.add(sum(len(pieces[k][0]) - pieces[k][1] for k in batch))
    bar.close()
    return Evaluation(nats, count)


def markov_baseline(
    train: Sequence[bytes],
    reference: Reference,
    regions: Sequence[Interval],
    orders: Iterable[int] = range(11),
    strength: float = 100.0,
) -> dict[int, Evaluation]:
    """Evaluations of interpolated Markov models by order, fitted on both strands of `train`.

    Args:
        train: Sequences to count in.
        reference: The genome.
        regions: Where to evaluate.
        orders: Orders to try.
        strength: See `MarkovModel`.
    """
    found = {}
    for order in orders:
        scorer = Scorer(MarkovModel(order, strength).fit(train), batch_tokens=2**20)
        found[order] = evaluate_model(scorer, reference, regions, window=2**20, context=order)
    return found
