"""Scores of a block of variant records: statuses, windows, unique sequences in batches, and numbers for each allele."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .contigs import ContigMap
from .haplotypes import Haplotypes, Mode, haplotypes
from .intervals import Variant, to_one_based
from .likelihood import Scorer
from .reference import Reference
from .sequence import is_acgt
from .status import SCORED, Checked, Policy, check
from .sums import RangeSum
from .variants import Record

log = logging.getLogger(__name__)

Columns = dict[str, npt.NDArray[Any]]
Strand = Literal["both", "fwd", "rev"]

SCORES = {
    "llr": "log-likelihood of the alternative minus that of the reference, nats, mean of the strands",
    "llr_mean": "the same with each log-likelihood divided by its scored bases",
    "llr_fwd": "forward strand only",
    "llr_rev": "reverse strand only",
    "ll_ref": "log-likelihood of the reference window, nats, mean of the strands",
    "ll_alt": "log-likelihood of the alternative window, nats, mean of the strands",
    "llr_site": "the bases of the alleles only, nats, mean of the strands",
    "masked_llr": "masked models: log-probability of the alternative bases minus the reference's, nats",
    "embed_cos": "1 minus the cosine of the mean embeddings around the variant",
    "embed_l1": "mean absolute difference of the mean embeddings",
    "embed_l2": "root mean square difference of the mean embeddings",
    "boundary_shift": "positions outside the alleles whose chunk boundary differs, all stages, mean of the strands",
}
LIKELIHOODS = ("llr", "llr_mean", "llr_fwd", "llr_rev", "ll_ref", "ll_alt", "llr_site")
EMBEDDINGS = ("embed_cos", "embed_l1", "embed_l2")
FACTS = ("record", "alt_index", "chrom", "pos", "id", "ref", "alt", "status")
EXTRAS = ("n_scored", "window_start0", "window_length", "contig")


@dataclass(frozen=True)
class ScoreOptions:
    """What is computed.

    Attributes:
        scores: Names out of `SCORES`; () takes "llr", or "masked_llr" of a masked model.
        window: Bases of the window, at most the contig and what the model reads.
        placement: Share of the window's free bases on the left of the variant.
        mode: "fixed" compares equally many bases, "flank" keeps both flanks.
        strand: "both", "fwd" or "rev".
        max_n_frac: Largest share of N in the reference window.
        share_window: Variants within a stretch of so many bases share one reference window.
        embed_k: Bases on each side of the variant whose embeddings are averaged; 0 takes the window.
        embed_layer: Layer, by the model's own names.
        policy: What is scored.

    Raises:
        ValueError: for a name or number that makes no sense.
    """

    scores: tuple[str, ...] = ()
    window: int = 8192
    placement: float = 0.5
    mode: Mode = "fixed"
    strand: Strand = "both"
    max_n_frac: float = 0.1
    share_window: int = 1
    embed_k: int = 0
    embed_layer: str | None = None
    policy: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        for name in self.scores:
            if name not in SCORES:
                raise ValueError(f"unknown score {name!r}; expected some of {', '.join(SCORES)}")
        if self.window < 2:
            raise ValueError(f"expected a window of at least 2 bases, got {self.window}")
        if not 0 <= self.placement <= 1:
            raise ValueError(f"expected a placement from 0 to 1, got {self.placement}")
        if not 0 <= self.max_n_frac <= 1:
            raise ValueError(f"expected a share of N (max_n_frac) from 0 to 1, got {self.max_n_frac}")
        if self.share_window < 1 or self.embed_k < 0:
            got = f"{self.share_window} and {self.embed_k}"
            raise ValueError(f"expected share_window of at least 1 and embed_k of at least 0, got {got}")
        if self.strand not in ("both", "fwd", "rev"):
            raise ValueError(f"expected strand both, fwd or rev, got {self.strand!r}")
        if self.mode not in ("fixed", "flank"):
            raise ValueError(f"expected mode fixed or flank, got {self.mode!r}")
        for name, strand in (("llr_fwd", "rev"), ("llr_rev", "fwd")):
            if name in self.scores and self.strand == strand:
                raise ValueError(f"score {name!r} needs its strand, got strand {self.strand!r}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for headers and manifests."""
        found = asdict(self)
        return {**found, **found.pop("policy"), "scores": list(self.scores)}


@dataclass
class _Job:
    """One sequence to evaluate, and which sums of it are wanted."""

    sequence: bytes
    shared: int = 0  # bases at the beginning that its partner has too
    ranges: list[tuple[int, int]] = field(default_factory=list)
    sums: dict[tuple[int, int], RangeSum] = field(default_factory=dict)
    masked: dict[tuple[int, ...], npt.NDArray[np.float64]] = field(default_factory=dict)
    means: dict[tuple[int, int], npt.NDArray[np.float64]] = field(default_factory=dict)
    stages: list[npt.NDArray[np.bool_]] | None = None
    error: str = ""
    known: bool = False

    def add(self, found: Sequence[RangeSum]) -> None:
        """Take the wanted sums."""
        if not all(np.isfinite(one.nats) for one in found):
            raise ValueError("the model gave a log-probability that is not finite")
        self.sums = dict(zip(self.ranges, found))
        self.known = True


Begun = Callable[[], list[list[RangeSum]]]


@dataclass
class _Row:
    record: Record
    alt_index: int
    alt: str
    checked: Checked
    status: str
    window: int = 0
    haplotypes: dict[str, Haplotypes] = field(default_factory=dict)


class VariantScorer:
    """Scores blocks of records; a block's numbers depend on nothing outside it.

    Args:
        scorer: The model.
        reference: The genome.
        options: What is computed.
        contigs: How names of the file become the reference's.

    Raises:
        ValueError: if a score is asked of a model that cannot give it.
    """

    def __init__(
        self, scorer: Scorer, reference: Reference, options: ScoreOptions, contigs: ContigMap | None = None
    ) -> None:
        self.scorer, self.reference, self.options = scorer, reference, options
        self.contigs = contigs or ContigMap(reference.lengths)
        self.scores = options.scores or (("llr",) if scorer.is_causal else ("masked_llr",))
        self.wants_likelihood = bool(set(self.scores) & set(LIKELIHOODS))
        self.wants_masked = "masked_llr" in self.scores
        self.wants_embedding = bool(set(self.scores) & set(EMBEDDINGS))
        self.wants_boundaries = "boundary_shift" in self.scores
        if self.wants_likelihood and not scorer.is_causal:
            raise ValueError(f"{scorer.name} is a masked model; ask for masked_llr instead of {self.scores}")
        if self.wants_masked and scorer.is_causal:
            raise ValueError(f"{scorer.name} is a causal model, which gives no masked_llr; ask for llr")
        if self.wants_embedding:
            scorer.check_layer(options.embed_layer)
        if self.wants_boundaries and not hasattr(scorer.model, "boundaries"):
            raise ValueError(f"{scorer.name} has no chunk boundaries, which 'boundary_shift' needs")
        directions = {"both": "+-", "fwd": "+", "rev": "-"}[options.strand]
        self.directions = directions[:1] if scorer.strands == "equivariant" else directions
        self.window = min(options.window, scorer.max_length - scorer.bos) if scorer.max_length else options.window

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of a block, in order."""
        return (*FACTS, *self.scores, *EXTRAS)

    def check(self, records: Iterable[Record]) -> list[_Row]:
        """Statuses of all alleles of records, before anything is computed."""
        rows = []
        for record in records:
            for alt_index, alt in enumerate(record.alts):
                try:
                    checked = check(record, alt, self.reference, self.contigs, self.options.policy)
                except ValueError as error:
                    if self.options.policy.on_ref_mismatch == "error":
                        raise
                    log.warning("record %d: %s", record.index + 1, error)
                    checked = Checked("failed")
                if record.problem:
                    log.warning("record %d: %s", record.index + 1, record.problem)
                rows.append(_Row(record, alt_index, alt, checked, checked.status))
        return rows

    def prepare(self, records: Iterable[Record]) -> list[_Row]:
        """Checked rows with the windows of those that are scored; all that reads the genome."""
        rows = self.check(records)
        for row in rows:
            if row.status in SCORED:
                try:
                    self._prepare(row)
                except ValueError as error:  # one row must not cost the run
                    log.warning("record %d: %s", row.record.index + 1, error)
                    row.status = "failed"
        return rows

    def score(self, rows: Sequence[_Row]) -> Columns:
        """Scores of prepared rows as columns of equal length."""
        jobs: dict[bytes, _Job] = {}
        for row in rows:
            if row.status in SCORED:
                self._enlist(row, jobs)
        self._run(list(jobs.values()))
        results = [self._results(row, jobs) for row in rows]
        return self._table(rows, results)

    def _prepare(self, row: _Row) -> None:
        """Windows of a row, and the statuses that depend on them."""
        variant, options = row.checked.variant, self.options
        assert variant is not None
        row.window = min(self.window, self.reference.lengths[variant.chrom])
        if max(len(variant.ref), len(variant.alt)) > max(1, row.window // 2):
            row.status = "allele_too_long"
            return
        for direction in self.directions:
            row.haplotypes[direction] = haplotypes(
                variant,
                self.reference,
                row.window,
                strand="+" if direction == "+" else "-",
                placement=options.placement,
                mode=options.mode,
                share=options.share_window,
            )
        first = row.haplotypes[self.directions[0]]
        if 1 - is_acgt(first.ref).mean() > options.max_n_frac:
            row.status = "n_context"
        elif self.wants_masked and len(variant.ref) != len(variant.alt):
            row.status = "unsupported"

    def _enlist(self, row: _Row, jobs: dict[bytes, _Job]) -> None:
        for h in row.haplotypes.values():
            for sequence in (h.ref, h.alt):
                jobs.setdefault(sequence, _Job(sequence, h.site))
            if self.wants_likelihood:
                for span in _spans(h, len(h.ref), h.ref_end):
                    jobs[h.ref].ranges.append(span)
                for span in _spans(h, len(h.alt), h.alt_end):
                    jobs[h.alt].ranges.append(span)
            if self.wants_masked:
                jobs[h.ref].masked[tuple(range(h.site, h.ref_end))] = np.empty(0)
            if self.wants_embedding:
                jobs[h.ref].means[self._around(h, len(h.ref), h.ref_end)] = np.empty(0)
                jobs[h.alt].means[self._around(h, len(h.alt), h.alt_end)] = np.empty(0)

    def _around(self, h: Haplotypes, length: int, end: int) -> tuple[int, int]:
        k = self.options.embed_k
        return (max(0, h.site - k), min(length, end + k)) if k else (0, length)

    def _run(self, jobs: list[_Job]) -> None:
        if self.wants_likelihood:
            if self.scorer.continues:
                for _, reason in self._sum(self._begin_families(jobs)):
                    log.warning(
                        "sequences that begin alike failed together and are read whole, which is slower: %s", reason
                    )
            unknown = [job for job in jobs if not job.known]
            groups = [[unknown[k] for k in batch] for batch in self.scorer.batches([job.sequence for job in unknown])]
            while groups:
                failed = list(self._sum((group, self._begin(group)) for group in groups))
                groups = [part for group, reason in failed for part in self._halves(group, reason)]
        if self.wants_masked or self.wants_embedding or self.wants_boundaries:
            jobs = [job for job in jobs if not job.error]
            for batch in self.scorer.batches([job.sequence for job in jobs]):
                self._read([jobs[k] for k in batch])

    def _read(self, jobs: list[_Job]) -> None:
        """What is no likelihood."""
        try:
            self._evaluate(jobs)
            return
        except Exception as error:
            reason = _reason(error)
        for part in self._halves(jobs, reason):
            self._read(part)

    def _halves(self, jobs: list[_Job], reason: str) -> list[list[_Job]]:
        """What to try where a batch failed: one bad sequence must not cost the batch, nor a batch the run."""
        if len(jobs) == 1:
            jobs[0].error = reason
            return []
        log.warning("a batch of %d failed, its halves are tried, which is slower: %s", len(jobs), reason)
        return [jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]]

    def _sum(self, batches: Iterable[tuple[list[_Job], Callable[[], Begun]]]) -> Iterator[tuple[list[_Job], str]]:
        """Sums of batches, each taken up after the next one has been begun; yields those that fail, with the reason."""
        waiting: list[tuple[list[_Job], Begun]] = []
        for jobs, begin in batches:
            reason = ""
            try:
                waiting.append((jobs, begin()))
            except Exception as error:
                reason = _reason(error)
            if reason:
                yield jobs, reason
            if len(waiting) > 1:
                yield from self._take(*waiting.pop(0))
        for jobs, finish in waiting:
            yield from self._take(jobs, finish)

    def _take(self, jobs: list[_Job], finish: Begun) -> Iterator[tuple[list[_Job], str]]:
        try:
            for job, found in zip(jobs, finish()):
                job.add(found)
            return
        except Exception as error:
            reason = _reason(error)
        yield [job for job in jobs if not job.known], reason

    def _begin(self, jobs: list[_Job]) -> Callable[[], Begun]:
        return partial(self.scorer.sums, [job.sequence for job in jobs], [job.ranges for job in jobs])

    def _begin_families(self, jobs: list[_Job]) -> Iterator[tuple[list[_Job], Callable[[], Begun]]]:
        for families in self._families(jobs):
            prefixes = [family[0].sequence[: family[0].shared] for family in families]
            parents = [k for k, family in enumerate(families) for _ in family]
            members = [job for family in families for job in family]
            rests = [(k, job.sequence[job.shared :]) for k, job in zip(parents, members)]
            ranges = [job.ranges for job in members]
            yield members, partial(self.scorer.sums_after, prefixes, rests, ranges)

    def _families(self, jobs: list[_Job]) -> Iterator[list[list[_Job]]]:
        """Batches of groups of sequences that begin alike; both what they share and what they do not fits a batch."""
        groups: dict[bytes, list[_Job]] = {}
        for job in jobs:
            groups.setdefault(job.sequence[: job.shared], []).append(job)
        batch: list[list[_Job]] = []
        rests = width = 0
        for prefix in sorted(groups, key=lambda prefix: (-len(prefix), prefix)):
            family = groups[prefix]
            width = max(width, *(len(job.sequence) - job.shared for job in family))
            rests += len(family)
            most = max(width * rests, (len(batch) + 1) * (1 + len((batch or [family])[0][0].sequence)))
            if batch and most > self.scorer.batch_tokens:
                yield batch
                batch, rests = [], len(family)
                width = max(len(job.sequence) - job.shared for job in family)
            batch.append(family)
        if batch:
            yield batch

    def _evaluate(self, jobs: list[_Job]) -> None:
        sequences = [job.sequence for job in jobs]
        if self.wants_masked:
            for places in sorted({places for job in jobs for places in job.masked}):
                group = [job for job in jobs if places in job.masked]
                found = self.scorer.masked_log_probs([job.sequence for job in group], [places] * len(group))
                for job, values in zip(group, found):
                    job.masked[places] = values
        if self.wants_embedding:
            for job, vectors in zip(jobs, self.scorer.embeddings(sequences, self.options.embed_layer)):
                for a, b in job.means:
                    job.means[a, b] = vectors[a:b].mean(axis=0, dtype=np.float64)
        if self.wants_boundaries:
            for job, stages in zip(jobs, self.scorer.boundaries(sequences)):
                job.stages = [stage.mask for stage in stages]

    def _results(self, row: _Row, jobs: dict[bytes, _Job]) -> dict[str, float]:
        if row.status not in SCORED:
            return {}
        pairs = {key: (jobs[h.ref], jobs[h.alt]) for key, h in row.haplotypes.items()}
        errors = [job.error for pair in pairs.values() for job in pair if job.error]
        if errors:
            log.warning("record %d, %s: %s", row.record.index + 1, row.checked.variant, errors[0])
            row.status = "failed"
            return {}
        found: dict[str, list[float]] = {}
        for key, h in row.haplotypes.items():
            for name, value in self._of_strand(h, *pairs[key], row.checked.variant).items():
                found.setdefault(name, []).append(value)
            if "llr" in found:
                found["llr_fwd" if key == "+" else "llr_rev"] = [found["llr"][-1]]
        if self.scorer.strands == "equivariant" and "llr_fwd" in found:
            found["llr_rev"] = found["llr_fwd"]
        means = {name: float(np.mean(values)) for name, values in found.items()}
        if row.status == "swapped":
            means["ll_ref"], means["ll_alt"] = means.get("ll_alt", np.nan), means.get("ll_ref", np.nan)
            for name in ("llr", "llr_mean", "llr_fwd", "llr_rev", "llr_site", "masked_llr"):
                means[name] = -means.get(name, np.nan)
        return means

    def _of_strand(self, h: Haplotypes, ref: _Job, alt: _Job, variant: Variant | None) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.wants_likelihood:
            whole, rest, site = (ref.sums[span] for span in _spans(h, len(h.ref), h.ref_end))
            whole_alt, rest_alt, site_alt = (alt.sums[span] for span in _spans(h, len(h.alt), h.alt_end))
            found["llr"] = rest_alt[0] - rest[0]
            found["ll_ref"], found["ll_alt"] = whole[0], whole_alt[0]
            found["llr_mean"] = whole_alt[0] / max(1, whole_alt[1]) - whole[0] / max(1, whole[1])
            found["llr_site"] = site_alt[0] - site[0]
            found["n_scored"] = whole[1]
        if self.wants_masked:
            values = ref.masked[tuple(range(h.site, h.ref_end))]
            old = ["ACGT".index(chr(c)) for c in h.ref[h.site : h.ref_end]]
            new = ["ACGT".index(chr(c)) for c in h.alt[h.site : h.alt_end]]
            rows = range(len(old))
            found["masked_llr"] = float((values[rows, new] - values[rows, old]).sum())
            found.setdefault("n_scored", len(old))
        if self.wants_embedding:
            a = ref.means[self._around(h, len(h.ref), h.ref_end)]
            b = alt.means[self._around(h, len(h.alt), h.alt_end)]
            norm = float(np.linalg.norm(a) * np.linalg.norm(b))
            found["embed_cos"] = 1 - float(a @ b) / norm if norm else np.nan
            found["embed_l1"] = float(np.abs(a - b).mean())
            found["embed_l2"] = float(np.sqrt(np.square(a - b).mean()))
        if self.wants_boundaries and ref.stages is not None and alt.stages is not None:
            found["boundary_shift"] = sum(
                float((a[: h.site] != b[: h.site]).sum()) + _differences(a[h.ref_end :], b[h.alt_end :])
                for a, b in zip(ref.stages, alt.stages)
            )
        return found

    def _table(self, rows: Sequence[_Row], results: Sequence[dict[str, float]]) -> Columns:
        first = [row.haplotypes.get(self.directions[0]) if row.status in SCORED else None for row in rows]
        columns: Columns = {
            "record": np.array([row.record.index for row in rows], np.int64),
            "alt_index": np.array([row.alt_index for row in rows], np.int64),
            "chrom": _text(row.record.chrom for row in rows),
            "pos": np.array([to_one_based(row.record.start) for row in rows], np.int64),
            "id": _text(row.record.id for row in rows),
            "ref": _text(row.record.ref for row in rows),
            "alt": _text(row.alt for row in rows),
            "status": _text(row.status for row in rows),
        }
        for name in self.scores:
            columns[name] = np.array([found.get(name, np.nan) for found in results], np.float64)
        columns["n_scored"] = np.array([found.get("n_scored", 0) for found in results], np.int64)
        columns["window_start0"] = np.array([h.start if h else -1 for h in first], np.int64)
        columns["window_length"] = np.array([row.window if h else 0 for row, h in zip(rows, first)], np.int64)
        columns["contig"] = _text(row.checked.contig for row in rows)
        return columns


def _reason(error: Exception) -> str:
    """What went wrong; the error itself would hold on to all that the device has made for the batch."""
    return f"{type(error).__name__}: {error}"


def _spans(h: Haplotypes, length: int, end: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Ranges of the whole window, of what follows the shared prefix, and of the allele."""
    limit = min(length, h.limit) if h.limit is not None else length
    return (0, limit), (min(h.site, limit), limit), (min(h.site, limit), min(end, limit))


def _differences(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    shared = min(len(a), len(b))
    return float((a[:shared] != b[:shared]).sum())


def _text(values: Iterable[str]) -> npt.NDArray[Any]:
    found = list(values)
    return np.array(found, dtype=f"<U{max([1, *map(len, found)])}")
