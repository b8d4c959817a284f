"""Parts of a genome for training, validation and test, as intervals that never overlap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..files import text_lines
from ..intervals import Interval, is_position

PARTS = ("train", "val", "test")
ALIASES = {"valid": "val", "validation": "val", "dev": "val"}

Regions = dict[str, list[Interval]]


def split_by_share(lengths: Mapping[str, int], shares: Sequence[float]) -> Regions:
    """Successive shares of all bases in file order: train, val, test.

    Args:
        lengths: Bases by contig.
        shares: Three shares that sum to 1 or less.

    Raises:
        ValueError: if a share is negative or their sum is above 1.
    """
    if min(shares) < 0 or sum(shares) > 1 + 1e-9:
        raise ValueError(f"expected shares of train, val and test that sum to at most 1, got {list(shares)}")
    total, parts = sum(lengths.values()), Regions()
    at = 0.0
    for name, share in zip(PARTS, shares):
        first, last = round(at * total), round((at + share) * total)
        parts[name] = _slice(lengths, first, last)
        at += share
    return parts


def _slice(lengths: Mapping[str, int], first: int, last: int) -> list[Interval]:
    """What lies between two bases, counted over all contigs."""
    found, offset = [], 0
    for chrom, length in lengths.items():
        start, end = max(first - offset, 0), min(last - offset, length)
        if start < end:
            found.append(Interval(chrom, start, end))
        offset += length
    return found


def split_by_name(lengths: Mapping[str, int], named: Mapping[str, Sequence[str] | None]) -> Regions:
    """Contigs or regions (1-based, such as chr1:1-5000) by part; a part that is None gets the contigs nobody named.

    Args:
        lengths: Bases by contig.
        named: Contigs and regions of each part.

    Raises:
        ValueError: if a contig is unknown, a region lies outside, or two parts overlap.
    """
    parts = Regions()
    for part, names in named.items():
        parts[part] = [Interval.from_str(name, lengths=dict(lengths)) for name in names or ()]
    taken = {interval.chrom for intervals in parts.values() for interval in intervals}
    rest = [Interval(chrom, 0, length) for chrom, length in lengths.items() if chrom not in taken]
    if named.get("train") is None:
        parts["train"] = rest
    return check_regions(parts, lengths)


def split_by_bed(path: str | Path, lengths: Mapping[str, int]) -> Regions:
    """Regions of a file with columns chrom, start (0-based), end, split; with or without a header line.

    Args:
        path: The file, plain or gzip.
        lengths: Bases by contig.

    Raises:
        ValueError: for a line that does not fit.
    """
    parts: Regions = {part: [] for part in PARTS}
    for number, line in enumerate(text_lines(path), 1):
        words = line.split()
        if not words or words[0].startswith("#") or (number == 1 and len(words) > 1 and not is_position(words[1])):
            continue
        split = ALIASES.get(words[3].lower(), words[3].lower()) if len(words) > 3 else ""
        if split not in PARTS or not is_position(words[1]) or not is_position(words[2]):
            raise ValueError(f"{path}, line {number}: expected chrom, start, end and train, val or test, got {words}")
        parts[split].append(Interval(words[0], int(words[1]), int(words[2])))
    return check_regions(parts, lengths)


def split_by_blocks(lengths: Mapping[str, int], block: int, pattern: str) -> Regions:
    """Blocks of each contig dealt out in turn, for genomes of one contig.

    Args:
        lengths: Bases by contig.
        block: Bases of a block.
        pattern: Blocks for train, val and test, such as "7:1:2".

    Raises:
        ValueError: for another pattern.
    """
    words = pattern.split(":")
    if len(words) != 3 or not all(word.isdigit() for word in words) or not sum(map(int, words)):
        raise ValueError(f"expected a pattern such as '7:1:2' (train:val:test), got {pattern!r}")
    turn = [part for part, word in zip(PARTS, words) for _ in range(int(word))]
    parts: Regions = {part: [] for part in PARTS}
    number = 0
    for chrom, length in lengths.items():
        for start in range(0, length, block):
            found = parts[turn[number % len(turn)]]
            end = min(start + block, length)
            if found and found[-1].chrom == chrom and found[-1].end == start:
                found[-1] = Interval(chrom, found[-1].start, end)
            else:
                found.append(Interval(chrom, start, end))
            number += 1
    return parts


def check_regions(parts: Regions, lengths: Mapping[str, int]) -> Regions:
    """Refuse regions outside their contig, and parts that overlap.

    Raises:
        ValueError: naming the first of either.
    """
    everything = sorted((i.chrom, i.start, i.end, part) for part, found in parts.items() for i in found)
    for chrom, start, end, part in everything:
        if chrom not in lengths or end > lengths[chrom]:
            raise ValueError(f"region {Interval(chrom, start, end)} of {part} is not in the reference")
    reach: dict[str, tuple[int, str]] = {}
    for chrom, start, end, part in everything:
        last, owner = reach.get(chrom, (0, part))
        if start < last and owner != part:
            raise ValueError(f"{owner} and {part} overlap at {Interval(chrom, start, min(end, last))}")
        if end > last:
            reach[chrom] = (end, part)
    return parts


def intersect(regions: Iterable[Interval], kept: Iterable[Interval]) -> list[Interval]:
    """What of `regions` lies in `kept`."""
    joined = merge(kept)
    found = []
    for region in regions:
        for other in joined:
            start, end = max(region.start, other.start), min(region.end, other.end)
            if region.chrom == other.chrom and start < end:
                found.append(Interval(region.chrom, start, end))
    return found


def subtract(regions: Iterable[Interval], removed: Iterable[Interval]) -> list[Interval]:
    """What of `regions` lies outside `removed`."""
    joined = merge(removed)
    found = []
    for region in regions:
        start = region.start
        for other in joined:
            if other.chrom != region.chrom or other.end <= start or other.start >= region.end:
                continue
            if other.start > start:
                found.append(Interval(region.chrom, start, other.start))
            start = max(start, other.end)
        if start < region.end:
            found.append(Interval(region.chrom, start, region.end))
    return found


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """The same bases as sorted intervals that neither overlap nor touch."""
    found: list[Interval] = []
    for interval in sorted(intervals):
        if found and found[-1].chrom == interval.chrom and interval.start <= found[-1].end:
            found[-1] = Interval(interval.chrom, found[-1].start, max(found[-1].end, interval.end))
        else:
            found.append(Interval(interval.chrom, interval.start, interval.end))
    return found


def with_gap(regions: Iterable[Interval], gap: int, lengths: Mapping[str, int]) -> list[Interval]:
    """Regions without `gap` bases at each border that is no contig's end."""
    found = []
    for region in regions:
        start = region.start + gap if region.start > 0 else 0
        end = region.end - gap if region.end < lengths[region.chrom] else region.end
        if start < end:
            found.append(Interval(region.chrom, start, end))
    return found
