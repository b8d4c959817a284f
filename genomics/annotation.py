"""Features on contigs: reading GFF3, GTF, BED and gene tables, writing GFF3 and BED."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote, unquote

from .files import open_lines, open_out, table_rows
from .intervals import Interval, from_one_based, is_position, to_one_based


@dataclass(frozen=True)
class Feature:
    """A gene, transcript, CDS or any other labelled stretch.

    Attributes:
        chrom, start, end, strand: Place, 0-based half-open.
        type: "gene", "CDS", ...; "region" of a BED file.
        id: Its name, "" where it has none.
        parts: (start, end) of the pieces of a joined feature, ascending; () where it is one piece.
        attributes: Further facts by name.
    """

    chrom: str
    start: int
    end: int
    strand: str = "."
    type: str = "region"
    id: str = ""
    parts: tuple[tuple[int, int], ...] = ()
    attributes: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def interval(self) -> Interval:
        """Its place."""
        return Interval(self.chrom, self.start, self.end, self.strand)

    def __len__(self) -> int:
        return self.end - self.start


def read_features(path: str | Path, types: Iterable[str] | None = None) -> list[Feature]:
    """Features of a file; its name tells the format: .gff, .gff3, .gtf, .bed, .tsv, .csv or GenBank, also with .gz.

    Args:
        path: The file. A table has columns chrom (or contig), start0 and end or start (1-based) and end, and optionally
            strand, type and id; its other columns become attributes.
        types: Keep these types only.

    Raises:
        ValueError: for an unknown kind of file or a line that does not fit, with its number.
    """
    stem = Path(path).name.lower().removesuffix(".gz")
    if stem.endswith((".gb", ".gbk", ".gbff", ".genbank", ".embl")):
        from .genbank import read_genbank

        found: Iterable[Feature] = [feature for record in read_genbank(path) for feature in record.features]
    elif stem.endswith((".gff", ".gff3")):
        found = _joined(_read_gff(path, gtf=False))
    elif stem.endswith(".gtf"):
        found = _joined(_with_stops(list(_read_gff(path, gtf=True))))
    elif stem.endswith(".bed"):
        found = _read_bed(path)
    elif stem.endswith((".tsv", ".csv")):
        found = _read_table(path, "," if stem.endswith(".csv") else "\t")
    else:
        raise ValueError(f"unknown kind of annotation {str(path)!r}; expected .gff3, .gtf, .bed, .tsv, .csv or .gbk")
    wanted = set(types) if types is not None else None
    return [feature for feature in found if wanted is None or feature.type in wanted]


def read_bed(path: str | Path) -> list[Interval]:
    """Intervals of a BED file, plain or gzip."""
    return [feature.interval for feature in _read_bed(path)]


def _lines(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    with open_lines(path) as file:
        for number, raw in enumerate(file, 1):
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            if line.startswith("##FASTA"):
                return
            if line.strip() and not line.startswith(("#", "track", "browser")):
                yield number, line.split("\t")


def _read_bed(path: str | Path) -> Iterator[Feature]:
    for number, words in _lines(path):
        if len(words) < 3 or not all(map(is_position, words[1:3])) or int(words[2]) < int(words[1]):
            raise ValueError(f"{path}, line {number}: expected chrom, start, end (0-based) in tabs, got {words[:4]}")
        name, strand = (words[3] if len(words) > 3 else ""), (words[5] if len(words) > 5 else ".")
        yield Feature(words[0], int(words[1]), int(words[2]), strand if strand in ("+", "-") else ".", "region", name)


def _read_gff(path: str | Path, *, gtf: bool) -> Iterator[Feature]:
    for number, words in _lines(path):
        if len(words) != 9 or not all(map(is_position, words[3:5])):
            raise ValueError(f"{path}, line {number}: expected 9 columns in tabs with start and end, got {words[:5]}")
        attributes = _gtf_attributes(words[8]) if gtf else _gff_attributes(words[8])
        attributes["phase"] = words[7]
        name = attributes.get("ID") or attributes.get("locus_tag") or attributes.get("gene_id") or ""
        if gtf and words[2] in ("CDS", "stop_codon"):
            name = attributes.get("transcript_id") or name
        start, end = from_one_based(int(words[3])), int(words[4])
        if not 0 <= start < end:
            raise ValueError(f"{path}, line {number}: expected 1 <= start <= end, got {words[3]} and {words[4]}")
        strand = words[6] if words[6] in ("+", "-") else "."
        yield Feature(words[0], start, end, strand, words[2], name, (), attributes)


def _gff_attributes(text: str) -> dict[str, str]:
    pairs = (part.partition("=") for part in text.split(";") if "=" in part)
    return {key.strip(): unquote(value.strip()) for key, _, value in pairs}


def _gtf_attributes(text: str) -> dict[str, str]:
    pairs = (part.strip().partition(" ") for part in text.split(";") if part.strip())
    return {key: value.strip().strip('"') for key, _, value in pairs}


def _with_stops(features: list[Feature]) -> list[Feature]:
    """Coding sequences that end with their stop codon, as in GFF3 and GenBank; GTF has it as a line of its own."""
    stops: dict[tuple[str, str, int], Feature] = {}
    for stop in features:
        if stop.type == "stop_codon":
            stops[stop.id, stop.chrom, stop.end if stop.strand == "-" else stop.start] = stop
    found = []
    for feature in features:
        last = feature.start if feature.strand == "-" else feature.end
        beside = stops.get((feature.id, feature.chrom, last)) if feature.type == "CDS" else None
        if beside is not None and beside.strand == feature.strand:
            start, end = min(feature.start, beside.start), max(feature.end, beside.end)
            feature = replace(feature, start=start, end=end)
        found.append(feature)
    return found


def _joined(features: Iterable[Feature]) -> list[Feature]:
    """Lines of one CDS (same ID, contig and strand) as one feature with parts."""
    found: dict[tuple[str, str, str, str], Feature] = {}
    single = 0
    for feature in features:
        name = feature.id
        if feature.type != "CDS" or not name:
            single += 1
            name = f"\0{single}"
        key = (feature.chrom, feature.type, feature.strand, name)
        if key in found:
            old = found[key]
            parts = tuple(sorted((*(old.parts or ((old.start, old.end),)), (feature.start, feature.end))))
            found[key] = replace(old, start=parts[0][0], end=max(end for _, end in parts), parts=parts)
        else:
            found[key] = feature
    return list(found.values())


def _read_table(path: str | Path, delimiter: str) -> Iterator[Feature]:
    rows = table_rows(path, delimiter)
    _, names = next(rows)
    chrom = next((name for name in ("chrom", "contig", "chr", "seqid") if name in names), None)
    if chrom is None or "end" not in names or not {"start0", "start"} & set(names):
        raise ValueError(f"{path}: expected columns chrom, start0 (or 1-based start) and end, got {names}")
    for number, words in rows:
        if len(words) != len(names):
            raise ValueError(f"{path}, line {number}: expected {len(names)} columns, got {len(words)}")
        row = dict(zip(names, words))
        first, last = row["start0" if "start0" in names else "start"].strip(), row["end"].strip()
        if not is_position(first) or not is_position(last):
            raise ValueError(f"{path}, line {number}: expected whole numbers as start and end, got {first!r}, {last!r}")
        start = int(first) if "start0" in names else from_one_based(int(first))
        end = int(last)
        if not 0 <= start <= end:
            raise ValueError(f"{path}, line {number}: expected a start before the end, got {first} and {last}")
        strand = row.get("strand") or "."
        if strand not in ("+", "-", "."):
            raise ValueError(f"{path}, line {number}: expected strand +, - or ., got {strand!r}")
        name = next((row[key] for key in ("id", "gene", "locus_tag", "b_number", "name") if row.get(key)), "")
        yield Feature(row[chrom], start, end, strand, row.get("type") or "gene", name, (), row)


def write_gff3(path: str | Path, features: Iterable[Feature]) -> None:
    """Write features as GFF3; a joined one takes a line for each part."""
    with open_out(path) as file:
        file.write("##gff-version 3\n")
        for feature in features:
            facts = {"ID": feature.id} if feature.id else {}
            facts |= {
                key: value for key, value in feature.attributes.items() if key not in ("ID", "phase", "translation")
            }
            text = ";".join(f"{quote(key, safe='')}={quote(value, safe=' :/+()[]')}" for key, value in facts.items())
            for start, end in feature.parts or ((feature.start, feature.end),):
                phase = feature.attributes.get("phase", "0" if feature.type == "CDS" else ".")
                words = (feature.chrom, "omnissm", feature.type, to_one_based(start), end, ".", feature.strand, phase)
                file.write("\t".join(str(word) for word in (*words, text or ".")) + "\n")
