"""Variant scoring: a file of variants, a genome and a model in; annotated VCF, TSV or Parquet out.

Records are worked off in blocks. A block's numbers depend on nothing outside it, and a finished block is kept on disk:
so a killed run goes on where it was, shards can run anywhere, and all ways end in the same file.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import shutil
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from .contigs import ContigMap, read_contig_map
from .files import atomic_path
from .intervals import Interval, Variant
from .likelihood import Scorer
from .loading import load_scorer
from .parts import MANIFEST, Parts, unfinished
from .progress import Progress
from .reference import Reference
from .score_output import check_outputs, is_vcf, vcf_line, write_scores
from .sequence import normalise, reverse_complement
from .status import RefMismatchError
from .variant_scorer import Columns, ScoreOptions, VariantScorer
from .variants import Record, VariantFile

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

log = logging.getLogger(__name__)

GUARD = 1000  # checkable alleles before the share of mismatches counts


class ScoreTable(dict[str, npt.NDArray[Any]]):
    """Columns of equal length, one row for each alternative allele.

    Attributes:
        facts: Model, window and further facts about the run.
    """

    facts: dict[str, Any]

    def __init__(self, columns: Columns, facts: dict[str, Any] | None = None) -> None:
        super().__init__(columns)
        self.facts = facts or {}

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self["status"])

    def counts(self) -> dict[str, int]:
        """Rows by status."""
        return dict(Counter(self["status"].tolist()))

    def to_pandas(self) -> pd.DataFrame:
        """The table as a DataFrame."""
        import pandas as pd

        return pd.DataFrame(dict(self))

    def to_parquet(self, path: str | Path) -> None:
        """Write the table, with its facts as metadata."""
        write_scores(str(path), lambda: [([], dict(self))], list(self), header=(), facts=self.facts, prefix="SSM")


def score_variants(
    variants: str | Path | Iterable[Variant],
    reference: str | Path | Reference,
    model: str | Path | nn.Module | Scorer,
    options: ScoreOptions | None = None,
    *,
    out: str | Sequence[str] = (),
    regions: Sequence[str | Interval] = (),
    contig_map: str | Path | dict[str, str] | None = None,
    coordinates: Literal[0, 1] = 1,
    max_mismatch_frac: float = 0.3,
    part_size: int = 1000,
    shard: tuple[int, int] | None = None,
    resume: bool = False,
    prefix: str = "SSM",
    overwrite_info: bool = False,
    device: str = "auto",
    batch_tokens: int | None = None,
    workers: int = 0,
    progress: bool | None = False,
    **fields: Any,
) -> ScoreTable:
    """Score every alternative allele of a file or list of variants.

    Args:
        variants: File of variants (see `VariantFile`), `-` for a VCF on standard input, or variants.
        reference: The genome, or its file.
        model: Model folder, run's folder, checkpoint, network or scorer.
        options: What is computed; None takes the defaults with `fields`.
        out: Files to write, by suffix .vcf, .vcf.gz, .bcf, .tsv, .tsv.gz, .parquet, or - for TSV.
        regions: Score records that overlap one of these, such as "chr20:1-1000"; contigs may be named as in the
            variants or as in the reference.
        contig_map: Names in the variants to names in the reference, or a file of two columns.
        coordinates: 1 or 0, where a table's positions count from.
        max_mismatch_frac: Stop if more than this share of the REF alleles differ from the reference.
        part_size: Records of a block.
        shard: (i, n) scores every n-th block from the i-th (0-based); `merge_scores` then writes the outputs.
        resume: Go on with a killed run.
        prefix: Begin of the INFO fields of a VCF.
        overwrite_info: Replace such fields of an earlier run.
        device: "auto", "cpu" or such as "cuda:0".
        batch_tokens: Most positions of a batch; None: 65,536 on a CPU, 1,048,576 on a GPU.
        workers: Threads that check records and cut windows of the next blocks while the model works on one; the result
            does not depend on them.
        progress: Show count, rate and time left on stderr; None does so on a terminal.
        **fields: Fields of `ScoreOptions`, such as window=8192, scores=("llr", "ll_ref").

    Returns:
        The table; of a shard, its rows.

    Raises:
        RefMismatchError: if too many REF alleles differ, or one does under the policy "error".
        ValueError: for inputs that do not fit together.
    """
    options = options or ScoreOptions(**fields)
    outs = [out] if isinstance(out, str) else list(out)
    if not part_size > 0:
        raise ValueError(f"expected a part size of at least 1, got {part_size}")
    if not 0 <= max_mismatch_frac <= 1:
        raise ValueError(f"expected a share of mismatches (max_mismatch_frac) from 0 to 1, got {max_mismatch_frac}")
    if workers < 0:
        raise ValueError(f"expected workers of at least 0, got {workers}")
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise ValueError(f"expected a shard i/n with 0 <= i < n, got {shard[0]}/{shard[1]}")
    genome = reference if isinstance(reference, Reference) else Reference(reference)
    scorer = load_scorer(model, device=device, batch_tokens=batch_tokens)
    override = contig_map if isinstance(contig_map, dict) or contig_map is None else read_contig_map(contig_map)
    worker = VariantScorer(scorer, genome, options, ContigMap(genome.lengths, override))
    places = [
        Interval.from_str(r, lengths=_lengths(genome, worker.contigs, r)) if isinstance(r, str) else r for r in regions
    ]
    reading: dict[str, Any] = {"reference": genome, "coordinates": coordinates, "contigs": worker.contigs}
    if isinstance(variants, (str, Path)):
        if all(out == "-" for out in outs):
            if shard is not None or resume:
                raise ValueError("a shard and a run that can go on need a file to write; give out a name")
            records: Iterable[Record] = VariantFile(variants, regions=places, **reading)
            table = _in_memory(records, worker, outs, max_mismatch_frac, part_size, prefix, progress, workers)
            return _told(table, places)
    else:
        if outs or shard is not None or resume or places:
            raise ValueError(
                "variants in memory are all scored at once and give a table: no out, shard, resume or regions; write it"
                " with its to_parquet, or give a file to score"
            )
        return _in_memory(_records(variants), worker, outs, max_mismatch_frac, part_size, prefix, progress, workers)
    parts_folder = Path(f"{next(name for name in outs if name != '-')}.parts")
    source, spooled = str(variants), parts_folder / "input.vcf"
    if source == "-":
        if (parts_folder / MANIFEST).is_file() and not resume and shard is None:
            raise ValueError(unfinished(parts_folder))
        if not (resume and spooled.is_file()):
            _spool(spooled)
        source = str(spooled)
    file = VariantFile(source, regions=places, **reading)
    check_outputs(outs, file.header, prefix, overwrite_info=overwrite_info)
    bar = Progress("variants", show=progress)
    if bar.show or any(map(is_vcf, outs)):
        bar.total = _look_through(file, outs)
    facts = _facts(worker, genome)
    manifest = {
        **facts,
        "input_sha256": _sha256(source),
        "regions": [str(place) for place in places],
        "contig_map": override or {},
        "coordinates": coordinates,
        "part_size": part_size,
    }
    parts = Parts(parts_folder, manifest)
    parts.start(resume=resume, shared=shard is not None)
    guard = _Guard(max_mismatch_frac)
    mine: list[Columns] = []

    def is_ours(number: int) -> bool:
        return shard is None or number % shard[1] == shard[0]

    def is_open(number: int) -> bool:
        return is_ours(number) and not parts.path(number).is_file()

    try:
        for number, block, rows in _prepared(_blocks(file, part_size), worker, workers, is_open):
            if not is_ours(number):
                bar.skip(len(block))
                continue
            if rows is None:
                columns = parts.read(number)
                bar.skip(len(block))
            else:
                guard.see(rows)
                columns = worker.score(rows)
                parts.write(number, columns)
                bar.add(len(block))
            if shard is not None and columns is not None:
                mine.append(columns)
        guard.close()
    except Exception as error:
        if isinstance(error, RefMismatchError) and shard is None:
            parts.remove()  # the same inputs and options would stop again
        parts.leave_nothing()
        parts.lock.release()
        raise
    bar.close()
    if shard is not None:
        return ScoreTable(_concat(mine, worker), facts)
    table = _finish(parts, file, outs, prefix, worker.columns, facts, ContigMap(genome.lengths, override))
    return _told(table, places)


def _told(table: ScoreTable, places: Sequence[Interval]) -> ScoreTable:
    if places and not table.n_rows:
        log.warning("no record lies in the regions %s", ", ".join(str(place) for place in places[:5]))
    return table


def merge_scores(
    variants: str | Path,
    out: str | Sequence[str],
    parts: Sequence[str | Path] = (),
    *,
    prefix: str = "SSM",
    overwrite_info: bool = False,
    reference: str | Path | Reference | None = None,
) -> ScoreTable:
    """Join the parts of all shards into the outputs that one run would have written.

    Args:
        variants: The file of variants that was scored.
        out: Outputs, as for `score_variants`.
        parts: Folders of parts, of shards that ran on several machines; none takes that beside the first output.
        prefix: Begin of the INFO fields.
        overwrite_info: Replace such fields of an earlier run.
        reference: Needed where the variants are HGVS-like names without bases.

    Raises:
        ValueError: if a part is missing, parts do not belong together, or the variants are others.
    """
    outs = [out] if isinstance(out, str) else list(out)
    folders = [Path(folder) for folder in parts] or [Path(f"{outs[0]}.parts")]
    first = Parts.open(folders[0])
    if _sha256(str(variants)) != first.manifest["input_sha256"]:
        raise ValueError(f"{str(variants)!r} is not the file that the parts in {str(folders[0])!r} were made from")
    for folder in folders[1:]:
        first.compare(Parts.open(folder).manifest)
        for path in sorted(folder.glob("part-*.npz")):
            if not (first.folder / path.name).exists():
                with atomic_path(first.folder / path.name) as temporary:
                    shutil.copyfile(path, temporary)
    genome = reference if isinstance(reference, Reference) or reference is None else Reference(reference)
    lengths = first.manifest["contigs"]
    places = [Interval.from_str(text, lengths=lengths) for text in first.manifest["regions"]]
    contigs = ContigMap(lengths, first.manifest["contig_map"])
    file = VariantFile(
        variants, reference=genome, regions=places, coordinates=first.manifest["coordinates"], contigs=contigs
    )
    check_outputs(outs, file.header, prefix, overwrite_info=overwrite_info)
    columns = first.read(0)
    names = tuple(columns) if columns else tuple(first.manifest["columns"])
    contigs = ContigMap(lengths, first.manifest["contig_map"])
    return _finish(first, file, outs, prefix, names, _said(first.manifest), contigs)


def score_sequences(
    sequences: Iterable[str | bytes],
    model: str | Path | nn.Module | Scorer,
    *,
    strands: Literal["both", "fwd", "rev"] = "fwd",
    reduce: Literal["sum", "mean"] = "sum",
    device: str = "auto",
) -> npt.NDArray[np.float64]:
    """Log-likelihoods of whole sequences, in nats.

    Args:
        sequences: DNA.
        model: Model folder, run's folder, checkpoint, network or scorer.
        strands: "both" averages the two reading directions.
        reduce: "sum", or "mean" over the scored bases.
        device: "auto", "cpu" or such as "cuda:0".

    Returns:
        (n,) float64; NaN for a sequence without a scored base.
    """
    scorer = load_scorer(model, device=device)
    bases = [normalise(sequence) for sequence in sequences]
    directions = {"both": "+-", "fwd": "+", "rev": "-"}[strands]
    total = np.zeros(len(bases))
    for direction in directions:
        read = bases if direction == "+" else [reverse_complement(sequence) for sequence in bases]
        for batch in scorer.batches(read):
            for k, values in zip(batch, scorer.log_probs([read[k] for k in batch])):
                known = values[~np.isnan(values)]
                value = known.sum() if reduce == "sum" else known.mean() if len(known) else np.nan
                total[k] += value if len(known) else np.nan
    return total / len(directions)


class _Guard:
    """Stops a run whose REF alleles differ from the reference too often: the wrong assembly."""

    def __init__(self, limit: float) -> None:
        self.limit, self.compared, self.mismatches = limit, 0, 0

    def see(self, rows: Sequence[Any]) -> None:
        self.compared += sum(row.checked.compared for row in rows)
        self.mismatches += sum(row.status in ("ref_mismatch", "swapped") or row.checked.trusted for row in rows)
        if self.compared >= GUARD:
            self.close()

    def close(self) -> None:
        if self.compared >= 20 and self.mismatches > self.limit * self.compared:
            raise RefMismatchError(
                f"REF of {self.mismatches} of {self.compared} alleles differs from the reference. Is it the same"
                " assembly, and do the contig names mean the same? --max_mismatch_frac allows more."
            )


def _in_memory(
    records: Iterable[Record],
    worker: VariantScorer,
    outs: Sequence[str],
    limit: float,
    part_size: int,
    prefix: str,
    progress: bool | None,
    workers: int,
) -> ScoreTable:
    guard, bar = _Guard(limit), Progress("variants", show=progress)
    found = []
    for _, block, rows in _prepared(_blocks(records, part_size), worker, workers):
        guard.see(rows or ())
        found.append(worker.score(rows or ()))
        bar.add(len(block))
    guard.close()
    bar.close()
    table = ScoreTable(_concat(found, worker), _facts(worker, worker.reference))
    for out in outs:
        write_scores(out, lambda: [([], dict(table))], worker.columns, header=(), facts=table.facts, prefix=prefix)
    return table


def _finish(
    parts: Parts,
    file: VariantFile,
    outs: Sequence[str],
    prefix: str,
    columns: Sequence[str],
    facts: dict[str, Any],
    contigs: ContigMap,
) -> ScoreTable:
    """Write the outputs from all parts, then delete these."""

    def blocks() -> Iterator[tuple[list[Record], Columns]]:
        for number, records in enumerate(_blocks(file, parts.manifest["part_size"])):
            found = parts.read(number)
            if found is None or len(found["status"]) != sum(len(record.alts) for record in records):
                raise ValueError(
                    f"part {number} is missing in {str(parts.folder)!r}: a shard is unfinished or elsewhere"
                )
            yield records, found

    kept = []
    for records, block in blocks():
        kept.append(block)
        for chrom in {record.chrom for record in records}:
            with contextlib.suppress(ValueError):  # ambiguous: its rows have the status `failed`
                contigs.find(chrom)
    facts = facts | {"aliases": dict(sorted(contigs.aliases().items()))}
    if facts["aliases"]:
        log.info("contig names: %s", facts["aliases"])
    for out in outs:
        write_scores(out, blocks, columns, header=file.header, facts=facts, prefix=prefix)
    table = ScoreTable({name: np.concatenate([b[name] for b in kept]) for name in columns} if kept else _empty(columns))
    table.facts = facts
    parts.remove()
    return table


def _empty(columns: Sequence[str]) -> Columns:
    text = ("chrom", "id", "ref", "alt", "status", "contig")
    return {name: np.empty(0, "<U1" if name in text else np.float64) for name in columns}


def _concat(found: list[Columns], worker: VariantScorer) -> Columns:
    found = found or [worker.score([])]
    return {name: np.concatenate([block[name] for block in found]) for name in worker.columns}


def _blocks(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    iterator = iter(records)
    while block := list(itertools.islice(iterator, size)):
        yield block


def _prepared(
    blocks: Iterable[list[Record]],
    worker: VariantScorer,
    workers: int,
    is_open: Callable[[int], bool] = lambda number: True,
) -> Iterator[tuple[int, list[Record], list[Any] | None]]:
    """Number, records and prepared rows of each block in order, without rows where nothing is open."""
    if not workers:
        for number, block in enumerate(blocks):
            yield number, block, worker.prepare(block) if is_open(number) else None
        return
    with ThreadPoolExecutor(workers, "windows") as pool:
        ahead: deque[tuple[int, list[Record], Future[list[Any]] | None]] = deque()
        for number, block in enumerate(blocks):
            ahead.append((number, block, pool.submit(worker.prepare, block) if is_open(number) else None))
            if len(ahead) > workers:
                first, records, rows = ahead.popleft()
                yield first, records, None if rows is None else rows.result()
        for first, records, rows in ahead:
            yield first, records, None if rows is None else rows.result()


def _records(variants: Iterable[Variant]) -> Iterator[Record]:
    for index, variant in enumerate(variants):
        yield Record(
            index, variant.chrom, variant.start, variant.id, variant.ref.upper() or "-", (variant.alt.upper() or "-",)
        )


def _lengths(genome: Reference, contigs: ContigMap, region: str) -> dict[str, int]:
    """Lengths by the reference's names, and by the name that the region uses."""
    contig = contigs.find(region)
    return genome.lengths | ({region: genome.lengths[contig]} if contig else {})


def _look_through(file: VariantFile, outs: Sequence[str]) -> int:
    """Number of records; what an output cannot hold is said before the work, not after it."""
    count = 0
    for record in file:
        count += 1
        if not file.is_vcf and any(map(is_vcf, outs)):
            vcf_line(record)
        if record.problem and any(out.endswith(".bcf") for out in outs):
            raise ValueError(
                f"record {record.index + 1} could not be read, which BCF cannot hold; write .vcf.gz ({record.problem})"
            )
    return count


def _spool(path: Path) -> None:
    """Keep standard input, which is read twice and from which a killed run must go on."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _facts(worker: VariantScorer, genome: Reference) -> dict[str, Any]:
    return {
        "model": worker.scorer.name,
        "model_sha256": worker.scorer.digest(),
        "version": version("omnissm"),
        "reference_md5": genome.digest(),
        "contigs": dict(genome.lengths),
        "circular": sorted(genome.circular),
        "columns": list(worker.columns),
        "dtype": worker.scorer.dtype,
        "device": worker.scorer.device.type,
        "restrict": worker.scorer.restrict,
        "batch_tokens": worker.scorer.batch_tokens,
        **worker.options.as_dict(),
    }


def _said(manifest: dict[str, Any]) -> dict[str, Any]:
    """The facts of a manifest."""
    own = ("input_sha256", "regions", "contig_map", "coordinates", "part_size")
    return {key: value for key, value in manifest.items() if key not in own}
