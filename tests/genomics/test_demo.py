"""The quick start on DNA, small."""

import csv

import numpy as np
import pytest

from omnissm.genomics import Reference
from omnissm.genomics.annotation import read_features
from omnissm.genomics.demo import _effect, demo, write_variants
from omnissm.genomics.models import PACKAGED

DATA = PACKAGED / "ecoli_part"


def test_packaged_genes_are_open_reading_frames():
    genome = Reference(DATA / "ecoli_part.fa.gz")
    assert genome.lengths == {"ecoli_part": 49_152}
    genes = read_features(DATA / "genes.gff3", ["CDS"])
    assert len(genes) == 34
    for gene in genes:
        coding = genome.fetch_interval(gene.interval).decode()
        assert coding[:3] in ("ATG", "GTG", "TTG"), gene
        codons = [coding[k : k + 3] for k in range(0, len(coding), 3)]
        assert [codon in ("TAA", "TAG", "TGA") for codon in codons] == [False] * (len(codons) - 1) + [True], gene


def test_packaged_part_is_that_of_the_genome(shared_data):
    genome = Reference(shared_data / "genomics" / "ecoli_k12_mg1655" / "ecoli_k12_mg1655.fna.gz")
    part = Reference(DATA / "ecoli_part.fa.gz")
    assert part.fetch("ecoli_part", 0, 49_152) == genome.fetch("U00096.2", 4_175_708, 4_175_708 + 49_152)


@pytest.mark.parametrize(
    ("codon", "position", "base", "effect"),
    [("TAC", 2, "A", "stop"), ("TAC", 2, "T", "silent"), ("TAC", 0, "C", "missense"), ("CTG", 0, "T", "silent")],
)
def test_effects_on_the_protein(codon, position, base, effect):
    assert _effect(codon, position, base) == effect


def test_variants_fit_the_genome_and_do_what_they_say(tmp_path):
    kinds = write_variants(tmp_path / "v.vcf", DATA / "ecoli_part.fa.gz", DATA / "genes.gff3", 20, seed=1)
    assert [int((kinds == kind).sum()) for kind in ("stop", "missense", "silent")] == [20, 20, 20]
    genome = Reference(DATA / "ecoli_part.fa.gz")
    genes = {gene.attributes["Name"]: gene for gene in read_features(DATA / "genes.gff3", ["CDS"])}
    rows = [line.split("\t") for line in (tmp_path / "v.vcf").read_text().splitlines() if line[0] != "#"]
    assert [row[7].partition("EFFECT=")[2] for row in rows] == list(kinds)
    whole = bytearray(genome.fetch("ecoli_part", 0, 49_152))
    for row, kind in zip(rows, kinds, strict=True):
        at, gene = int(row[1]) - 1, genes[row[7].partition(";")[0].removeprefix("GENE=")]
        assert chr(whole[at]) == row[3] != row[4]
        changed = whole.copy()
        changed[at] = ord(row[4])
        new = Reference.from_sequences({"ecoli_part": changed.decode()}).fetch_interval(gene.interval).decode()
        early = any(new[k : k + 3] in ("TAA", "TAG", "TGA") for k in range(0, len(new) - 3, 3))
        assert early == (kind == "stop")


def test_small_demo_leaves_its_files(tmp_path, capsys):
    for name in ("matplotlib", "pysam"):
        pytest.importorskip(name)
    demo(tmp_path, count=4, window=64, bases=6144)
    with open(tmp_path / "scored.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["status"] for row in rows] == ["ok"] * 12
    assert np.isfinite([float(row["llr"]) for row in rows]).all()
    text = (tmp_path / "summary.md").read_text()
    for name in ("scores.png", "boundaries.png", "rates.png"):
        assert f"({name})" in text
        assert (tmp_path / name).stat().st_size > 10_000
    assert "$ omnissm genomics boundaries" in capsys.readouterr().out
