"""GenBank and EMBL records, and genetic codes, through Biopython."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .annotation import Feature, write_gff3
from .files import atomic_path, open_lines
from .sequence import normalise


@dataclass(frozen=True)
class SequenceRecord:
    """One record of a GenBank or EMBL file.

    Attributes:
        name: Accession with version.
        sequence: Upper-case bases.
        circular: Whether the topology is circular.
        features: Genes, CDS and all other features.
    """

    name: str
    sequence: bytes = field(repr=False)
    circular: bool
    features: list[Feature] = field(repr=False)


@dataclass(frozen=True)
class GeneticCode:
    """A translation table of NCBI.

    Attributes:
        table: NCBI number, such as 11 for bacteria or 4 for Mycoplasma.
        amino_acids: One-letter amino acid by codon; "*" for stops.
        starts: Codons that may begin a gene.
        stops: Codons that end one.
    """

    table: int
    amino_acids: dict[str, str] = field(repr=False)
    starts: tuple[str, ...]
    stops: tuple[str, ...]


@functools.cache
def genetic_code(table: int = 11) -> GeneticCode:
    """A genetic code by its NCBI number.

    Args:
        table: The number.

    Raises:
        ValueError: if there is no such table.
    """
    from Bio.Data.CodonTable import unambiguous_dna_by_id

    if table not in unambiguous_dna_by_id:
        known = ", ".join(str(number) for number in sorted(unambiguous_dna_by_id))
        raise ValueError(f"no genetic code {table}; NCBI's tables are {known}")
    found = unambiguous_dna_by_id[table]
    acids = dict(found.forward_table) | dict.fromkeys(found.stop_codons, "*")
    return GeneticCode(table, acids, tuple(found.start_codons), tuple(found.stop_codons))


def translate(seq: str | bytes, table: int = 11) -> str:
    """Amino acids of whole codons; X for a codon with another letter than A, C, G, T.

    Args:
        seq: Coding sequence on its own strand.
        table: NCBI number of the genetic code.
    """
    text = normalise(seq).decode()
    acids = genetic_code(table).amino_acids
    return "".join(acids.get(text[k : k + 3], "X") for k in range(0, len(text) - 2, 3))


def read_genbank(path: str | Path) -> list[SequenceRecord]:
    """All records of a GenBank or EMBL file, plain or gzip.

    Args:
        path: The file; ".embl" names EMBL, all else is GenBank.

    Raises:
        ValueError: if there is no record, a record has no sequence, or the file is damaged.
    """
    from Bio import SeqIO

    kind = "embl" if Path(path).name.lower().removesuffix(".gz").endswith(".embl") else "genbank"
    with open_lines(path) as file:
        text = file.read().decode("latin-1")
    try:
        parsed = [(record, list(_features(record))) for record in SeqIO.parse(io.StringIO(text), kind)]
    except Exception as error:  # Biopython's parser raises anything on a damaged file
        raise ValueError(f"{path} is damaged or no {kind} file ({error!r})") from error
    records = []
    for record, features in parsed:
        try:
            bases = normalise(bytes(record.seq))
        except Exception as error:
            raise ValueError(f"{path}: record {record.id!r} holds no sequence ({error})") from error
        circular = record.annotations.get("topology") == "circular"
        records.append(SequenceRecord(record.id, bases, circular, features))
    if not records:
        raise ValueError(f"{path} holds no {kind} record; is it another format?")
    return records


def _features(record: Any) -> Iterator[Feature]:
    for feature in record.features:
        if feature.location is None or feature.type == "source":
            continue
        qualifiers = {key: ",".join(str(value) for value in values) for key, values in feature.qualifiers.items()}
        parts = tuple(sorted((int(part.start), int(part.end)) for part in feature.location.parts))
        yield Feature(
            record.id,
            min(start for start, _ in parts),
            max(end for _, end in parts),
            {1: "+", -1: "-"}.get(feature.location.strand, "."),
            feature.type,
            qualifiers.get("locus_tag") or qualifiers.get("gene") or qualifiers.get("protein_id", ""),
            parts if len(parts) > 1 else (),
            qualifiers,
        )


def genbank_to_fasta_gff(path: str | Path, fasta: str | Path, gff: str | Path) -> None:
    """Write the sequences of a GenBank file as FASTA and its features as GFF3.

    Args:
        path: GenBank or EMBL file.
        fasta: FASTA file to write, 80 bases a line.
        gff: GFF3 file to write.
    """
    records = read_genbank(path)
    with atomic_path(fasta) as temporary, open(temporary, "w") as file:
        for record in records:
            text = record.sequence.decode()
            lines = "\n".join(text[k : k + 80] for k in range(0, len(text), 80))
            file.write(f">{record.name}\n{lines}\n")
    write_gff3(gff, [feature for record in records for feature in record.features])
