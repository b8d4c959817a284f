"""Intervals and variants, and the one place that converts coordinates."""

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnissm.genomics import intervals
from omnissm.genomics.intervals import Interval, Variant
from omnissm.genomics.reference import Reference
from omnissm.genomics.sequence import reverse_complement


def test_regions():
    assert Interval.from_str("chr1:100-200") == Interval("chr1", 99, 200)
    assert Interval.from_str("chr1:1,000-2,000") == Interval("chr1", 999, 2000)
    assert Interval.from_str("chr1:7") == Interval("chr1", 6, 7)
    assert Interval.from_str("HLA-A*01:01", lengths={"HLA-A*01:01": 30}) == Interval("HLA-A*01:01", 0, 30)
    assert Interval.from_str("HLA:01:5-9") == Interval("HLA:01", 4, 9)
    assert str(Interval("chr1", 99, 200)) == "chr1:100-200"


@pytest.mark.parametrize("text", ["chr1", "chr1:0-5", "chr1:9-5", "chr1:a-b", ""])
def test_bad_regions(text):
    with pytest.raises(ValueError, match="expected"):
        Interval.from_str(text)


def test_interval_arithmetic():
    a = Interval("c", 10, 20)
    assert a.resize(4) == Interval("c", 13, 17)
    assert a.resize(14) == Interval("c", 8, 22)
    assert a.shift(-3) == Interval("c", 7, 17)
    assert a.overlap(Interval("c", 15, 40)) == 5
    assert a.overlap(Interval("d", 15, 40)) == 0
    with pytest.raises(ValueError, match="start <= end"):
        Interval("c", 5, 4)


@pytest.mark.parametrize(
    ("ref", "alt", "kind"),
    [
        ("A", "C", "snv"),
        ("AC", "GT", "mnv"),
        ("ACA", "ATA", "snv"),
        ("A", "AT", "ins"),
        ("AT", "A", "del"),
        ("AT", "GCC", "delins"),
    ],
)
def test_kinds(ref, alt, kind):
    assert Variant("c", 0, ref, alt).kind == kind


def test_trim():
    assert Variant("c", 10, "GCACA", "GCA").trim() == Variant("c", 10, "GCA", "G")
    assert Variant("c", 10, "TACG", "TATG").trim() == Variant("c", 12, "C", "T")


def test_left_align_in_a_repeat():
    reference = Reference.from_sequences({"c": "GGCACACACATT"})
    found = {
        Variant("c", k, ref, alt).left_align(reference)
        for k, ref, alt in ((8, "CAT", "T"), (2, "CAC", "C"), (3, "ACA", "A"))
    }
    assert found == {Variant("c", 1, "GCA", "G")}


def apply(sequence, variant):
    assert sequence[variant.start : variant.end] == variant.ref
    return sequence[: variant.start] + variant.alt + sequence[variant.end :]


@given(st.text("AC", min_size=8, max_size=30), st.data())
def test_left_align_keeps_the_haplotype(sequence, data):
    start = data.draw(st.integers(1, len(sequence) - 3))
    length = data.draw(st.integers(1, 3))
    ref = sequence[start : start + length]
    alt = data.draw(st.text("AC", min_size=1, max_size=4).filter(lambda text: text != ref))
    variant = Variant("c", start, ref, alt)
    reference = Reference.from_sequences({"c": sequence})
    left = variant.left_align(reference, block=2)
    assert apply(sequence, left) == apply(sequence, variant)
    assert left == left.left_align(reference)
    assert left.start <= variant.trim().start
    # Every other single replacement of that haplotype with equal allele lengths starts no further left.
    other = [k for k in range(left.start) if _same(sequence, k, left, apply(sequence, variant))]
    assert not other


def _same(sequence, start, variant, haplotype):
    end = start + len(variant.ref)
    alt = haplotype[start : start + len(variant.alt)]
    return (
        sequence[:start] + alt + sequence[end:] == haplotype
        and Variant("c", start, sequence[start:end], alt).trim().start == start
    )


def test_reverse_complement():
    sequence = "AACGTTTGCA"
    variant = Variant("c", 2, "CG", "T")
    flipped = variant.reverse_complement(len(sequence))
    assert apply(reverse_complement(sequence).decode(), flipped).encode() == reverse_complement(
        apply(sequence, variant)
    )


def test_only_one_module_converts_coordinates():
    """Nobody else calls a 1-based number by adding or subtracting one to something named so."""
    folder = Path(intervals.__file__).parent
    found = []
    for path in sorted(folder.rglob("*.py")):
        if path.name == "intervals.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.BinOp) and isinstance(node.right, ast.Constant) and node.right.value == 1:
                left = ast.unparse(node.left).lower()
                if isinstance(node.op, (ast.Add, ast.Sub)) and (
                    left.split(".")[-1] in ("pos", "position") or "int(words" in left
                ):
                    found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not found, found
