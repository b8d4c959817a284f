"""Genes in files: what their last base is, and on which strand they lie."""

import numpy as np
import pytest

from omnissm.genomics.annotation import Feature, read_features
from omnissm.genomics.boundaries import BoundaryTrace, annotate, plot_region
from omnissm.genomics.intervals import Interval
from omnissm.genomics.likelihood import Stage


def gtf(kind, start, end, strand, transcript):
    return f'c\tx\t{kind}\t{start}\t{end}\t.\t{strand}\t0\tgene_id "g"; transcript_id "{transcript}";\n'


def test_coding_sequences_of_gtf_end_with_their_stop_codon(tmp_path):
    """GTF leaves the stop codon out of CDS; GFF3 and GenBank do not."""
    (tmp_path / "a.gtf").write_text(
        gtf("CDS", 11, 40, "+", "plus")
        + gtf("stop_codon", 41, 43, "+", "plus")
        + gtf("CDS", 104, 130, "-", "minus")
        + gtf("stop_codon", 101, 103, "-", "minus")
        + gtf("CDS", 201, 220, "+", "joined")
        + gtf("CDS", 241, 250, "+", "joined")
        + gtf("stop_codon", 251, 253, "+", "joined")
        + gtf("CDS", 301, 330, "+", "open")
    )
    found = {feature.id: feature for feature in read_features(tmp_path / "a.gtf", ["CDS"])}
    assert {name: (f.start, f.end) for name, f in found.items()} == {
        "plus": (10, 43),
        "minus": (100, 130),
        "joined": (200, 253),
        "open": (300, 330),
    }
    assert found["joined"].parts == ((200, 220), (240, 253))


def test_strands(tmp_path):
    (tmp_path / "a.bed").write_text("c\t1\t9\tn\t0\t\n")
    assert read_features(tmp_path / "a.bed")[0].interval == Interval("c", 1, 9, ".")
    (tmp_path / "a.tsv").write_text("chrom\tstart0\tend\tstrand\nc\t1\t9\t-1\n")
    with pytest.raises(ValueError, match="line 2: expected strand"):
        read_features(tmp_path / "a.tsv")


def stages(length, outer, inner):
    """Two stages: cuts of the outer one are what the inner one may choose from."""
    ones = np.ones(length, bool)
    level = np.zeros(length, np.float32)
    return [Stage(outer, ones, level, level), Stage(inner, outer, level, level)]


def rates(trace, genes):
    return {(rate.stage, rate.name): rate for rate in annotate([trace], genes)}


def test_bases_of_genes_that_are_left_out_are_not_intergenic():
    length = 300
    mask = np.zeros(length, bool)
    mask[:60] = mask[250:] = True  # in genes that cross the borders, and nowhere else
    found = stages(length, mask, mask)
    genes = [
        Feature("c", 950, 1060, "+"),
        Feature("c", 1250, 1400, "-"),
        Feature("c", 0, 5000, "+", "CDS", "", ((0, 9), (4000, 5000))),
    ]
    table = rates(BoundaryTrace(Interval("c", 1000, 1300), found, found), genes)
    assert table[0, "intergenic"].eligible == 2 * 190  # both strands
    assert table[0, "intergenic"].rate == 0


def test_shifted_rates_are_shares():
    """Cuts only at the third codon position, half of them kept by the stage inside: shifts wash the position out."""
    length, genes = 4000, [Feature("c", start, start + 603, "+") for start in range(100, 3300, 800)]
    outer = np.zeros(length, bool)
    for gene in genes:
        outer[gene.start + 2 : gene.end : 3] = True
    inner = outer & (np.cumsum(outer) % 2 == 0)
    found = stages(length, outer, inner)
    table = rates(BoundaryTrace(Interval("c", 0, length), found, found), genes)
    assert table[0, "codon position 3"].rate == 1
    assert table[0, "codon position 1"].rate == 0
    assert table[0, "promoter"].rate == 0
    assert table[0, "promoter"].null > 0  # promoters take part in the shift
    assert table[1, "codon position 3"].rate == pytest.approx(0.5, abs=0.01)
    nulls = [rate.null for rate in table.values()]
    assert all(0 <= null <= 1 or np.isnan(null) for null in nulls)
    total = sum(
        table[0, name].null * table[0, name].eligible for name in ("promoter", "start codon", "coding", "stop codon")
    )
    assert total == pytest.approx(sum(len(range(g.start + 2, g.end, 3)) for g in genes), rel=1e-9)


def test_intervals_come_from_genes_and_gaps():
    """Every second base is cut everywhere: no resampling gives another rate, though few blocks are intergenic."""
    length, genes = 6000, [Feature("c", start, start + 300, "+") for start in range(100, 5000, 361)]
    mask = np.arange(length) % 2 == 0
    found = stages(length, mask, mask)
    table = rates(BoundaryTrace(Interval("c", 0, length), found, found), genes)
    for name in ("all", "coding", "promoter", "intergenic"):
        rate = table[0, name]
        assert 0.45 <= rate.low <= rate.rate <= rate.high <= 0.55, name


def test_pictures_of_long_regions_show_means(tmp_path, monkeypatch):
    """600 points at most: a region of 6,000 bases is drawn as shares of ten bases, a short one as its cuts."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    lines, ticks = [], []
    plot, vlines = Axes.plot, Axes.vlines
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **k: lines.append((x, y)) or plot(self, x, y, **k))
    monkeypatch.setattr(Axes, "vlines", lambda self, x, *a, **k: ticks.append(x) or vlines(self, x, *a, **k))
    for length in (6005, 60):
        mask = np.arange(length) % 5 == 0
        found = [Stage(mask, np.ones(length, bool), mask.astype(np.float32), mask.astype(np.float32))]
        plot_region(BoundaryTrace(Interval("c", 1000, 1000 + length), found, found), [], tmp_path / f"{length}.png")
    (x, y), (short, _) = lines
    assert len(x) == len(y) == 546  # of 11 bases, the last of 10
    assert y.mean() == pytest.approx(0.2, abs=0.01)
    assert x[0] == 1005
    assert x[-1] == 1000 + 545 * 11 + 4.5
    assert short.tolist() == list(range(1000, 1060))
    assert [cuts.tolist() for cuts in ticks] == [list(range(1000, 1060, 5))]
