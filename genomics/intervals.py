"""Places on a genome, and the one module that converts between 0- and 1-based coordinates.

Everywhere in Python a place is 0-based half-open. Text of VCF, GFF3, HGVS and regions such as "chr1:100-200" is 1-based
with both ends included; `from_one_based` and `to_one_based` are the only lines that add or subtract one.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from .sequence import is_acgt, reverse_complement, upper

Kind = Literal["snv", "mnv", "ins", "del", "delins"]


def from_one_based(position: int) -> int:
    """0-based index of a 1-based position."""
    return position - 1


def to_one_based(index: int) -> int:
    """1-based position of a 0-based index."""
    return index + 1


def is_position(text: str) -> bool:
    """Whether a text is a number that can be a place on a contig: digits 0 to 9 alone, and within 64 bits."""
    return text.isascii() and text.isdigit() and len(text) < 19


class Bases(Protocol):
    """What gives reference bases, see `reference.Reference`."""

    def fetch(self, chrom: str, start: int, end: int) -> bytes:
        """Upper-case bases of a 0-based half-open range."""
        ...


@dataclass(frozen=True, order=True)
class Interval:
    """A stretch of a contig.

    Attributes:
        chrom: Contig name.
        start: First base, 0-based.
        end: One past the last base.
        strand: "+", "-" or "." where it does not matter.

    Raises:
        ValueError: if it ends before it starts, or the strand is none of the three.
    """

    chrom: str
    start: int
    end: int
    strand: str = "."

    def __post_init__(self) -> None:
        if self.end < self.start:
            raise ValueError(f"expected start <= end, got {self.chrom}:{self.start}-{self.end} (0-based)")
        if self.strand not in ("+", "-", "."):
            raise ValueError(f"expected strand '+', '-' or '.', got {self.strand!r}")

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.chrom}:{to_one_based(self.start)}-{self.end}"

    def resize(self, length: int) -> Interval:
        """The interval of another length around the same centre; may start below 0."""
        start = self.start + (len(self) - length) // 2
        return replace(self, start=start, end=start + length)

    def shift(self, offset: int) -> Interval:
        """Moved to the right by `offset` bases."""
        return replace(self, start=self.start + offset, end=self.end + offset)

    def overlap(self, other: Interval) -> int:
        """Number of bases in common, whatever the strands."""
        if self.chrom != other.chrom:
            return 0
        return max(0, min(self.end, other.end) - max(self.start, other.start))

    @classmethod
    def from_str(cls, text: str, contigs: Collection[str] = (), lengths: dict[str, int] | None = None) -> Interval:
        """Parse "chr1:100-200" (1-based, both ends included), "chr1:100" (one base) or a whole contig.

        Args:
            text: The region; commas in numbers are ignored. It is split at the last colon.
            contigs: Known names: a text that is one of them means the whole contig.
            lengths: Lengths of contigs, needed for a whole one.

        Raises:
            ValueError: if the text has no such form, or the whole contig's length is unknown.
        """
        lengths = lengths or {}
        if text in contigs or text in lengths:
            if text not in lengths:
                raise ValueError(f"region {text!r} is a whole contig whose length is unknown here; add :START-END")
            return cls(text, 0, lengths[text])
        chrom, _, rest = text.rpartition(":")
        match = re.fullmatch(r"(\d[\d,]*)(?:-(\d[\d,]*))?", rest)
        if not chrom or not match:
            known = f"; contigs are {', '.join(list(lengths or contigs)[:5])}" if lengths or contigs else ""
            raise ValueError(f"expected a region such as chr1:100-200 (1-based) or a contig, got {text!r}{known}")
        first = int(match[1].replace(",", ""))
        last = int(match[2].replace(",", "")) if match[2] else first
        if first < 1 or last < first:
            raise ValueError(f"expected 1 <= start <= end in region {text!r} (1-based, both included)")
        return cls(chrom, from_one_based(first), last)


@dataclass(frozen=True, order=True)
class Variant:
    """A replacement of reference bases.

    Attributes:
        chrom: Contig name.
        start: First replaced base, 0-based.
        ref: Replaced bases.
        alt: Bases put in their place.
        id: Name, "." where it has none.
    """

    chrom: str
    start: int
    ref: str
    alt: str
    id: str = "."

    @property
    def end(self) -> int:
        """One past the last replaced base."""
        return self.start + len(self.ref)

    @property
    def position(self) -> int:
        """1-based position, as in VCF."""
        return to_one_based(self.start)

    @property
    def kind(self) -> Kind:
        """Kind of the trimmed variant: "snv", "mnv", "ins", "del" or "delins"."""
        ref, alt = self.ref.upper(), self.alt.upper()
        while ref and alt and ref[-1] == alt[-1]:
            ref, alt = ref[:-1], alt[:-1]
        while ref and alt and ref[0] == alt[0]:
            ref, alt = ref[1:], alt[1:]
        if len(ref) == len(alt):
            return "snv" if len(ref) == 1 else "mnv"
        return "ins" if not ref else "del" if not alt else "delins"

    def __str__(self) -> str:
        return f"{self.chrom}:{self.position}:{self.ref}>{self.alt}"

    def trim(self) -> Variant:
        """Without the suffix, then the prefix that both alleles share; each keeps one base at least."""
        ref, alt, start = self.ref, self.alt, self.start
        while len(ref) > 1 and len(alt) > 1 and ref[-1].upper() == alt[-1].upper():
            ref, alt = ref[:-1], alt[:-1]
        while len(ref) > 1 and len(alt) > 1 and ref[0].upper() == alt[0].upper():
            ref, alt, start = ref[1:], alt[1:], start + 1
        return replace(self, start=start, ref=ref, alt=alt)

    def left_align(self, reference: Bases, block: int = 256) -> Variant:
        """The leftmost way to write the same haplotype; a shift stops at the contig's start and at N.

        Args:
            reference: Where the bases on the left come from.
            block: Bases fetched at once.
        """
        here = self.trim()
        ref, alt, start = here.ref.upper(), here.alt.upper(), here.start
        left, left_start = b"", start
        while ref[-1] == alt[-1] and (len(ref) > 1 or len(alt) > 1 or ref != alt):
            if len(ref) > 1 and len(alt) > 1:
                ref, alt = ref[:-1], alt[:-1]
                continue
            if start == 0 or not is_acgt(ref[-1]).all():
                break
            if start == left_start:
                left_start = max(0, start - block)
                left = upper(reference.fetch(self.chrom, left_start, start))
            base = chr(left[start - left_start - 1])
            ref, alt, start = base + ref[:-1], base + alt[:-1], start - 1
        return replace(self, start=start, ref=ref, alt=alt).trim()

    def reverse_complement(self, length: int) -> Variant:
        """The same change on the reverse complement of a contig of `length` bases."""
        ref, alt = (reverse_complement(allele).decode() for allele in (self.ref, self.alt))
        return replace(self, start=length - self.end, ref=ref, alt=alt)
