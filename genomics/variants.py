"""Variants in files: VCF, BCF, tables and HGVS-like text in; a record for each line, whatever is in it.

A record keeps what the file says. Whether an alternative allele can be scored is asked of `status.check`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .contigs import ContigMap
from .files import open_lines, table_rows, text_lines
from .intervals import Interval, Variant, from_one_based
from .reference import Reference

log = logging.getLogger(__name__)

Format = Literal["vcf", "bcf", "tsv", "csv", "parquet", "hgvs"]
COLUMNS = {
    "chrom": ("chrom", "chr", "CHROM", "#CHROM", "contig"),
    "pos": ("pos", "POS", "position"),
    "start0": ("start0",),
    "ref": ("ref", "REF", "allele1"),
    "alt": ("alt", "ALT", "allele2"),
    "id": ("id", "ID", "variant_id"),
    "hgvs": ("hgvs", "HGVS"),
}
_SUFFIXES: dict[str, Format] = {
    ".vcf": "vcf",
    ".bcf": "bcf",
    ".tsv": "tsv",
    ".txt": "hgvs",
    ".csv": "csv",
    ".parquet": "parquet",
}
_NUMBER = "[0-9]{1,18}"  # what fits 64 bits
_HGVS = re.compile(
    rf"(?P<chrom>\S+):(?P<type>[a-z])\.(?P<first>{_NUMBER})(?:_(?P<last>{_NUMBER}))?(?P<edit>[^0-9\s]\S*)$"
)
UNKNOWN = -1  # start of a record whose position cannot be read


@dataclass(frozen=True, slots=True)
class Record:
    """One line of an input.

    Attributes:
        index: Its number in the input, from 0.
        chrom: Contig, as the file writes it.
        start: 0-based position; -1 where it could not be read.
        id: Its name, "." without.
        ref: Reference allele, upper case; "-" for an empty one, "" where there is none.
        alts: Alternative alleles, upper case; "-" for an empty one.
        line: The line of a VCF or BCF file as text, else "".
        problem: Why the line could not be read, else "".
    """

    index: int
    chrom: str
    start: int
    id: str
    ref: str
    alts: tuple[str, ...]
    line: str = ""
    problem: str = ""


class VariantFile:
    """A file of variants, or `-` for a VCF on standard input; iterating gives records in file order.

    Args:
        path: .vcf, .vcf.gz, .bcf, .tsv, .csv (also .gz), .parquet, or .txt with one HGVS-like variant a line.
        format: What it is; None looks at the name.
        reference: Needed for HGVS-like deletions and duplications, whose bases it gives.
        regions: Keep records that overlap one of these.
        coordinates: Of a table without a column `start0`: 1 where positions count from 1.
        contigs: Which names of the file and of `regions` mean the same contig; None: equal ones.

    Attributes:
        header: Header lines of a VCF or BCF file.
        columns: Columns of a table by what they mean.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of no known kind or lacks its header or columns.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        format: Format | None = None,
        reference: Reference | None = None,
        regions: Iterable[Interval] = (),
        coordinates: Literal[0, 1] = 1,
        contigs: ContigMap | None = None,
    ) -> None:
        self.path, self.reference, self.regions = str(path), reference, list(regions)
        self.contigs = contigs
        self.format: Format = format or _format(self.path)
        self.coordinates = coordinates
        self.header: list[str] = []
        self.columns: dict[str, str] = {}
        if self.path != "-" and not Path(self.path).is_file():
            raise FileNotFoundError(2, "No such file of variants", self.path)
        if self.format in ("vcf", "bcf") and self.path != "-":
            self.header = list(self._header())

    @property
    def is_vcf(self) -> bool:
        """Whether records have VCF lines."""
        return self.format in ("vcf", "bcf")

    def _header(self) -> Iterator[str]:
        for line in self._vcf_lines():
            if not line.startswith("#"):
                raise ValueError(f"{self.path} is no VCF file: the line #CHROM is missing before {line[:40]!r}")
            yield line
            if line.startswith("#CHROM"):
                return
        raise ValueError(f"{self.path} is no VCF file: it has no line #CHROM")

    def _vcf_lines(self) -> Iterator[str]:
        if self.format == "bcf":
            import pysam

            quiet = pysam.set_verbosity(0)  # it complains of a missing index, which is not used
            try:
                with pysam.VariantFile(self.path) as file:
                    pysam.set_verbosity(quiet)
                    yield from str(file.header).splitlines()
                    for record in file:
                        yield str(record).rstrip("\n")
            except PermissionError:
                raise
            except Exception as error:  # htslib's errors come as anything up to NotImplementedError
                raise ValueError(f"{self.path} is damaged or no BCF file ({error})") from error
            finally:
                pysam.set_verbosity(quiet)
            return
        with open_lines(self.path) as file:
            for raw in file:
                yield raw.decode("utf-8", "surrogateescape").rstrip("\r\n")

    def __iter__(self) -> Iterator[Record]:
        if self.is_vcf:
            records = self._vcf_records()
        elif self.format == "hgvs":
            records = self._hgvs_records()
        else:
            records = self._table_records()
        if not self.regions:
            return records
        kept = (record for record in records if self._in_region(record))
        return (Record(k, r.chrom, r.start, r.id, r.ref, r.alts, r.line, r.problem) for k, r in enumerate(kept))

    def _in_region(self, record: Record) -> bool:
        end = record.start + max(1, len(record.ref))
        return any(record.start < r.end and end > r.start and self._same(r.chrom, record.chrom) for r in self.regions)

    def _same(self, a: str, b: str) -> bool:
        if a == b or self.contigs is None:
            return a == b
        try:
            contig = self.contigs.find(a)
            return contig is not None and contig == self.contigs.find(b)
        except ValueError:  # a name that could be two contigs
            return False

    def _vcf_records(self) -> Iterator[Record]:
        in_header, index = True, 0
        for line in self._vcf_lines():
            if in_header:
                in_header = not line.startswith("#CHROM")
                if in_header and not line.startswith("#"):
                    raise ValueError(f"{self.path} is no VCF file: the line #CHROM is missing before {line[:40]!r}")
                continue
            if line:
                yield parse_vcf_line(line, index)
                index += 1

    def _rows(self) -> Iterator[dict[str, str]]:
        if self.format == "parquet":
            try:
                import pyarrow as pa
                import pyarrow.parquet as pq
            except ImportError as error:
                raise ImportError('Parquet needs pyarrow; run: pip install "omnissm[io]"') from error
            try:
                with pq.ParquetFile(self.path) as file:
                    self._find_columns(file.schema_arrow.names)
                    for batch in file.iter_batches(columns=list(self.columns.values())):
                        for row in batch.to_pylist():
                            yield {key: "" if value is None else str(value) for key, value in row.items()}
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{self.path} is damaged or no Parquet file ({error}); fetch it again") from error
            return
        rows = table_rows(self.path, "," if self.format == "csv" else "\t")
        _, names = next(rows)
        self._find_columns(names)
        for _, row in rows:
            yield dict(zip(names, row))

    def _find_columns(self, names: Iterable[str]) -> None:
        names = list(names)
        found = {key: name for key, spellings in COLUMNS.items() for name in names if name in spellings}
        if not _has_places(found) and "hgvs" not in found:
            raise ValueError(f"{self.path}: expected columns chrom, pos (1-based) or start0, ref, alt; got {names}")
        self.columns = found

    def _table_records(self) -> Iterator[Record]:
        for index, row in enumerate(self._rows()):
            fields = {key: (row.get(name) or "").strip() for key, name in self.columns.items()}
            if not _has_places(fields):
                yield self._hgvs_record(fields["hgvs"], index, fields.get("id") or ".")
                continue
            place = fields["start0"] if "start0" in fields else fields["pos"]
            if not re.fullmatch(_NUMBER, place):
                problem = f"position {place[:40]!r} is no whole number"
                name = fields.get("id") or "."
                yield Record(index, fields["chrom"], UNKNOWN, name, fields["ref"], (fields["alt"],), "", problem)
                continue
            start = int(place) if "start0" in fields or self.coordinates == 0 else from_one_based(int(place))
            alts = tuple(fields["alt"].upper().split(","))
            yield Record(index, fields["chrom"], start, fields.get("id") or ".", fields["ref"].upper(), alts)

    def _hgvs_records(self) -> Iterator[Record]:
        lines = (line.strip() for line in text_lines(self.path))
        for index, line in enumerate(line for line in lines if line and not line.startswith("#")):
            yield self._hgvs_record(line, index, line)

    def _hgvs_record(self, text: str, index: int, name: str) -> Record:
        try:
            variant = parse_hgvs(text, self.reference)
        except ValueError as error:
            return Record(index, text.partition(":")[0], UNKNOWN, name, "", ("",), "", str(error))
        return Record(index, variant.chrom, variant.start, name, variant.ref or "-", (variant.alt or "-",))


def _has_places(columns: Collection[str]) -> bool:
    """Whether a table with these columns says in numbers where its variants are."""
    return {"chrom", "ref", "alt"} <= set(columns) and not {"pos", "start0"}.isdisjoint(columns)


def _format(path: str) -> Format:
    if path == "-":
        return "vcf"
    stem = path.lower().removesuffix(".gz").removesuffix(".bgz")
    for suffix, name in _SUFFIXES.items():
        if stem.endswith(suffix):
            return name
    raise ValueError(
        f"unknown kind of variants {path!r}; expected a name ending in {', '.join(_SUFFIXES)} (also with .gz), or -"
    )


def parse_vcf_line(line: str, index: int) -> Record:
    """A data line of a VCF file; of one that cannot be read, `problem` says why."""
    words = line.split("\t", 8)
    if len(words) < 8 or not (words[1].isascii() and words[1].isdigit() and len(words[1]) < 19) or not words[3]:
        problem = f"expected 8 columns in tabs or more and a whole number as position, got {line[:60]!r}"
        return Record(index, words[0], UNKNOWN, ".", "", ("",), line, problem)
    alts = tuple(words[4].upper().split(","))
    return Record(index, words[0], from_one_based(int(words[1])), words[2], words[3].upper(), alts, line)


def parse_hgvs(text: str, reference: Reference | None = None) -> Variant:
    """A genomic HGVS-like name, such as `chr1:g.123A>G`, `g.5_7del`, `g.5_6insACG`, `g.5dup` or `g.5_7delinsTT`.

    Args:
        text: Contig, colon, `g.` or `m.`, and the change with 1-based positions.
        reference: Gives the bases that `del`, `dup` and `delins` leave unsaid.

    Returns:
        The variant; an empty allele is "".

    Raises:
        ValueError: for another form; `c.`, `n.`, `p.` and `r.` would need a model of the transcript.
    """
    match = _HGVS.match(text.strip())
    if not match:
        raise ValueError(f"expected a name such as chr1:g.123A>G, got {text!r}")
    if match["type"] not in "gm":
        raise ValueError(f"{text!r}: {match['type']}. positions need a transcript model; give genomic g. positions")
    chrom, start = match["chrom"], from_one_based(int(match["first"]))
    end = int(match["last"] or match["first"])
    edit = match["edit"]
    if found := re.fullmatch(r"([A-Za-z]+)>([A-Za-z]+)", edit):
        if match["last"] and len(found[1]) != end - start:
            raise ValueError(f"{text!r}: {len(found[1])} bases do not span {end - start} positions")
        return Variant(chrom, start, found[1].upper(), found[2].upper(), text)
    if found := re.fullmatch(r"ins([A-Za-z]+)", edit):
        if end != start + 2:
            raise ValueError(f"{text!r}: an insertion lies between two neighbours, such as g.5_6insA")
        return Variant(chrom, start + 1, "", found[1].upper(), text)
    found = re.fullmatch(r"(del|dup)([A-Z]*)(?:ins([A-Za-z]+))?", edit)
    if not found or end <= start or (found[1] == "dup" and found[3]):
        raise ValueError(f"{text!r}: unknown change {edit!r}; expected A>G, del, ins, dup or delins")
    bases = found[2].upper()
    if not bases:
        if reference is None or chrom not in reference.lengths:
            raise ValueError(f"{text!r}: {found[1]} without bases needs a reference with contig {chrom!r}")
        bases = reference.fetch(chrom, start, end).decode()
    if len(bases) != end - start:
        raise ValueError(f"{text!r}: {len(bases)} bases do not span {end - start} positions")
    if found[1] == "dup":
        return Variant(chrom, end, "", bases, text)
    return Variant(chrom, start, bases, (found[3] or "").upper(), text)


def read_variants(
    path: str | Path, reference: Reference | None = None, regions: Iterable[Interval] = ()
) -> Iterator[Record]:
    """Records of a file of variants, in file order.

    Args:
        path: See `VariantFile`.
        reference: For HGVS-like names without bases.
        regions: Keep records that overlap one of these.
    """
    return iter(VariantFile(path, reference=reference, regions=regions))


def read_vcf(path: str | Path) -> Iterator[Variant]:
    """Every alternative allele made of bases in a VCF or BCF file, as a variant.

    Args:
        path: .vcf, .vcf.gz, .bcf, or - for standard input.
    """
    for record in VariantFile(path):
        if record.problem:
            raise ValueError(f"{path}, record {record.index + 1}: {record.problem}")
        for alt in record.alts:
            if alt.isalpha():
                yield Variant(record.chrom, record.start, record.ref, alt, record.id)
