"""Whether an alternative allele can be scored, and if not, why: one status for every allele."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from .contigs import ContigMap
from .intervals import Variant
from .reference import Reference
from .sequence import is_acgt, is_iupac, normalise
from .variants import Record

STATUSES = {
    "ok": "scored",
    "swapped": "REF and ALT were exchanged, because ALT is what the reference has; scored with the sign turned",
    "contig_missing": "the reference has no such contig",
    "out_of_range": "REF lies beyond the contig's ends",
    "no_alt": "no alternative allele ('.', empty, <NON_REF>, <*>)",
    "star": "the allele '*' (deleted by a variant upstream)",
    "symbolic": "a symbolic allele such as <DEL>",
    "breakend": "a breakend",
    "bad_allele": "letters that are no IUPAC bases",
    "n_allele": "an ambiguity code in REF or ALT",
    "allele_too_long": "longer than the longest allele allowed",
    "ref_mismatch": "REF differs from the reference",
    "same_allele": "REF and ALT are the same",
    "n_context": "too many N in the window",
    "unsupported": "the model or the asked score does not cover this kind of variant",
    "failed": "the line could not be read, or the model raised an error; the log says which",
}
SCORED = ("ok", "swapped")

OnMismatch = Literal["skip", "error", "swap", "trust"]


class RefMismatchError(ValueError):
    """REF differs from the reference, or does so too often."""


@dataclass(frozen=True)
class Policy:
    """What is scored.

    Attributes:
        on_ref_mismatch: "skip" gives such rows a status; "error" stops; "swap" exchanges REF and ALT where ALT is what
            the reference has; "trust" puts the file's REF into the window.
        max_allele: Longest allele.
        normalise: Trim shared bases and shift indels to the left, so that one haplotype gets one score.

    Raises:
        ValueError: for a longest allele below 1.
    """

    on_ref_mismatch: OnMismatch = "skip"
    max_allele: int = 1000
    normalise: bool = True

    def __post_init__(self) -> None:
        if self.max_allele < 1:
            raise ValueError(f"expected a longest allele (max_allele) of at least 1 base, got {self.max_allele}")


class Checked(NamedTuple):
    """Result of `check`.

    Attributes:
        status: Key of `STATUSES`.
        contig: The reference's name of the contig, "" where it has none.
        variant: What to score, on `contig`; None where there is nothing to score.
        compared: Whether REF was compared with the reference.
        trusted: Whether the file's REF goes into the window.
    """

    status: str
    contig: str = ""
    variant: Variant | None = None
    compared: bool = False
    trusted: bool = False


def check(record: Record, alt: str, reference: Reference, contigs: ContigMap, policy: Policy) -> Checked:
    """Status of one alternative allele of a record, and what to score.

    Args:
        record: The line.
        alt: One of its alternative alleles.
        reference: The genome.
        contigs: How names of the file become the reference's.
        policy: What is scored.

    Raises:
        RefMismatchError: for a mismatch under the policy "error".
        ValueError: if the name of a contig fits two of the reference.
    """
    if record.problem:
        return Checked("failed")
    contig = contigs.find(record.chrom)
    if contig is None:
        return Checked("contig_missing")
    ref = "" if record.ref == "-" else record.ref
    alt = "" if alt == "-" else alt
    if not record.ref:
        return Checked("bad_allele", contig)
    if record.start < 0 or record.start + max(1, len(ref)) > reference.lengths[contig] + (not ref):
        return Checked("out_of_range", contig)
    if status := _kind_of_allele(ref, alt, empty=alt == "" and bool(ref) and "-" in record.alts):
        return Checked(status, contig)
    if max(len(ref), len(alt)) > policy.max_allele:
        return Checked("allele_too_long", contig)
    ref, alt = normalise(ref).decode(), normalise(alt).decode()
    variant = Variant(contig, record.start, ref, alt, record.id)
    here = reference.fetch(contig, variant.start, variant.end).decode()
    status, trusted = "ok", False
    if here != ref:
        if policy.on_ref_mismatch == "error":
            raise RefMismatchError(
                f"record {record.index + 1} ({record.chrom}:{variant.position}): REF is {ref}, the reference has {here}"
            )
        swapped = reference.fetch(contig, variant.start, variant.start + len(alt)).decode() == alt
        if policy.on_ref_mismatch == "swap" and swapped and alt:
            status, variant = "swapped", replace(variant, ref=alt, alt=ref)
        elif policy.on_ref_mismatch == "trust":
            trusted = True
        else:
            return Checked("ref_mismatch", contig, compared=True)
    if ref == alt:
        return Checked("same_allele", contig, compared=True)
    variant = _anchored(variant, reference)
    if policy.normalise:
        variant = variant.trim() if trusted else variant.left_align(reference)
    return Checked(status, contig, variant, True, trusted)


def _kind_of_allele(ref: str, alt: str, *, empty: bool) -> str:
    if not empty and alt in ("", ".", "<NON_REF>", "<*>"):
        return "no_alt" if ref or alt else "bad_allele"
    if alt == "*":
        return "star"
    if alt.startswith("<"):
        return "symbolic"
    if "[" in alt or "]" in alt or alt.startswith(".") or alt.endswith("."):
        return "breakend"
    if not is_iupac(ref) or not is_iupac(alt):
        return "bad_allele"
    return "" if is_acgt(normalise(ref + alt)).all() else "n_allele"


def _anchored(variant: Variant, reference: Reference) -> Variant:
    """A variant with an empty allele, with the base before it (or, at the contig's start, after it) in both."""
    if variant.ref and variant.alt:
        return variant
    if variant.start > 0:
        base = reference.fetch(variant.chrom, variant.start - 1, variant.start).decode()
        return replace(variant, start=variant.start - 1, ref=base + variant.ref, alt=base + variant.alt)
    base = reference.fetch(variant.chrom, variant.end, variant.end + 1).decode()
    return replace(variant, ref=variant.ref + base, alt=variant.alt + base)
