"""Windows of a variant: the two sequences whose likelihoods are compared, for each reading direction.

    forward, fixed:  R = ref[s : s + W],   A = ref[s : v] + alt + ref[v + len(ref) : ...], cut or extended on the right
    reverse, fixed:  both keep their right end, A is cut or extended on the left; then both are reverse-complemented
    flank:           both flanks are kept, A has W + len(alt) - len(ref) bases

In reading direction both sequences share all that lies before the variant, and "fixed" compares equally many bases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .intervals import Variant
from .reference import Reference
from .sequence import reverse_complement

Mode = Literal["fixed", "flank"]


@dataclass(frozen=True)
class Haplotypes:
    """Reference and alternative of one variant in one reading direction.

    Attributes:
        ref, alt: Bases, in reading direction.
        site: Index of the first base that may differ.
        ref_end, alt_end: One past the allele in each.
        limit: Bases of each that are summed: less than the window only at a contig's end.
        start: 0-based start of the reference window on the contig; of a circular one taken modulo its length.
    """

    ref: bytes
    alt: bytes
    site: int
    ref_end: int
    alt_end: int
    limit: int | None
    start: int


def window_start(
    variant: Variant, length: int, window: int, *, placement: float, left: int, right: int, circular: bool, share: int
) -> int:
    """Start of the reference window.

    Args:
        variant: The variant.
        length: Bases of the contig.
        window: Bases of the window, at most `length`.
        placement: Share of the window's free bases on the left of the variant.
        left, right: Bases that must exist on each side of the window, where the contig is long enough.
        circular: Whether the contig is.
        share: Variants within a stretch of so many bases get one window; 1 gives each its own.
    """
    anchor = variant.start if share <= 1 else variant.start // share * share + share // 2
    start = anchor - int((window - len(variant.ref)) * placement // 1)
    if not circular:
        start = min(start, length - window - right)
        start = max(start, min(left, length - window), 0)
    return max(min(start, variant.start), variant.end - window)  # the window holds the variant in any case


def haplotypes(
    variant: Variant,
    reference: Reference,
    window: int,
    *,
    strand: Literal["+", "-"] = "+",
    placement: float = 0.5,
    mode: Mode = "fixed",
    share: int = 1,
) -> Haplotypes:
    """The two sequences of a variant.

    Args:
        variant: On a contig of the reference; its `ref` goes into the window in place of what stands there.
        reference: The genome.
        window: Bases of the reference window; at most the contig is used.
        strand: "+" reads forward, "-" the reverse complement.
        placement: Share of the window's free bases on the left of the variant.
        mode: "fixed" or "flank".
        share: See `window_start`.
    """
    chrom, length = variant.chrom, reference.lengths[variant.chrom]
    window = min(window, length)
    circular = chrom in reference.circular
    missing = max(0, len(variant.ref) - len(variant.alt)) if mode == "fixed" else 0
    forward = strand == "+"
    start = window_start(
        variant,
        length,
        window,
        placement=placement,
        left=0 if forward else missing,
        right=missing if forward else 0,
        circular=circular,
        share=share,
    )
    end = start + window
    low, high = (start, end + missing) if forward else (start - missing, end)
    if not circular:
        low, high = max(low, 0), min(high, length)
    before = reference.fetch(chrom, low, variant.start)
    after = reference.fetch(chrom, variant.end, high)
    old, new = variant.ref.encode(), variant.alt.encode()
    ref, alt = before + old + after, before + new + after
    if forward:
        ref = ref[:window]
        alt = alt if mode == "flank" else alt[:window]
    else:
        ref = reverse_complement(ref[-window:])
        alt = reverse_complement(alt if mode == "flank" else alt[-window:])
    site = variant.start - start if forward else end - variant.end
    limit = min(len(ref), len(alt)) if mode == "fixed" else None
    return Haplotypes(ref, alt, site, site + len(old), site + len(new), limit, start % length if circular else start)
