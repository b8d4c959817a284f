"""Files of variants: every format gives the same records, every kind of allele its status."""

import gzip
import io
import sys

import pytest

from omnissm.genomics.contigs import ContigMap
from omnissm.genomics.intervals import Interval, Variant
from omnissm.genomics.reference import Reference
from omnissm.genomics.status import STATUSES, Policy, RefMismatchError, check
from omnissm.genomics.variants import Record, VariantFile, parse_hgvs, read_variants, read_vcf

HEADER = "##fileformat=VCFv4.2\n##contig=<ID=c,length=30>\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
ROWS = [("c", 1, "a", "A", "C"), ("c", 5, "b", "AC", "A,ACC"), ("c", 9, ".", "a", "t")]
#           0         1         2
#           012345678901234567890123456789
SEQUENCE = "ACGTACGTACGGGGGGTNCATTTTRACGTA"


@pytest.fixture
def reference():
    return Reference.from_sequences({"c": SEQUENCE, "n": "N" * 40})


def vcf(rows):
    return HEADER + "".join(f"{c}\t{p}\t{i}\t{r}\t{a}\t.\t.\t.\n" for c, p, i, r, a in rows)


def facts(records):
    return [(r.index, r.chrom, r.start, r.id, r.ref, r.alts) for r in records]


EXPECTED = [(0, "c", 0, "a", "A", ("C",)), (1, "c", 4, "b", "AC", ("A", "ACC")), (2, "c", 8, ".", "A", ("T",))]


def test_all_formats_give_the_same_records(tmp_path, monkeypatch):
    pysam = pytest.importorskip("pysam")
    text = vcf(ROWS)
    (tmp_path / "a.vcf").write_text(text)
    (tmp_path / "b.vcf.gz").write_bytes(gzip.compress(text.encode()))
    with pysam.BGZFile(str(tmp_path / "c.vcf.gz"), "wb") as file:
        file.write(text.encode())
    with (
        pysam.VariantFile(str(tmp_path / "a.vcf")) as source,
        pysam.VariantFile(str(tmp_path / "d.bcf"), "wb", header=source.header) as target,
    ):
        for record in source:
            target.write(record)
    table = "".join(f"{c}\t{p}\t{i}\t{r}\t{a}\n" for c, p, i, r, a in ROWS)
    (tmp_path / "e.tsv").write_text("chr\tPOS\tvariant_id\tallele1\tallele2\n" + table)
    (tmp_path / "f.csv").write_text(
        "chrom,start0,id,ref,alt\n" + "".join(f'{c},{p - 1},{i},{r},"{a}"\n' for c, p, i, r, a in ROWS)
    )
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("chrom", "pos", "id", "ref", "alt")
    pq.write_table(pa.table({name: [row[k] for row in ROWS] for k, name in enumerate(names)}), tmp_path / "g.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert facts(read_variants(path)) == EXPECTED, path.name
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert facts(read_variants("-")) == EXPECTED


def test_regions_keep_what_overlaps(tmp_path):
    (tmp_path / "a.vcf").write_text(vcf(ROWS))
    assert [r.id for r in read_variants(tmp_path / "a.vcf", regions=[Interval("c", 5, 6)])] == ["b"]
    assert not list(read_variants(tmp_path / "a.vcf", regions=[Interval("d", 0, 99)]))


def test_zero_based_tables(tmp_path):
    (tmp_path / "a.tsv").write_text("chrom\tpos\tref\talt\nc\t4\tA\tC\n")
    assert next(iter(VariantFile(tmp_path / "a.tsv", coordinates=0))).start == 4
    assert next(iter(VariantFile(tmp_path / "a.tsv"))).start == 3


@pytest.mark.parametrize("more", [("chrom", "ref"), ("chrom", "ref", "alt"), ("chrom", "pos", "ref")])
def test_names_serve_where_columns_do_not_say_the_place(tmp_path, more):
    values = {"chrom": "c", "pos": "9", "ref": "G", "alt": "T"}
    rows = [("hgvs", *more), ("c:g.3G>A", *(values[name] for name in more))]
    (tmp_path / "a.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    (record,) = VariantFile(tmp_path / "a.tsv")
    assert (record.chrom, record.start, record.ref, record.alts) == ("c", 2, "G", ("A",))


def test_a_row_without_a_readable_place_keeps_its_name(tmp_path):
    (tmp_path / "a.tsv").write_text("chrom\tpos\tref\talt\tid\nc\t1e3\tA\tC\trs7\n")
    (record,) = VariantFile(tmp_path / "a.tsv")
    assert (record.id, record.start) == ("rs7", -1)
    assert "'1e3' is no whole number" in record.problem


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.vcf", "c\t1\t.\tA\tC\n", "is no VCF file: the line #CHROM is missing"),
        ("a.vcf", "##fileformat=VCFv4.2\n", "has no line #CHROM"),
        ("a.tsv", "chrom\tref\talt\nc\tA\tC\n", "expected columns chrom, pos"),
        ("a.xls", "", "unknown kind of variants"),
        ("a.bcf", "nothing", "is damaged or no BCF file"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        list(VariantFile(tmp_path / name))


def test_truncated_gzip(tmp_path):
    packed = gzip.compress(vcf(ROWS * 500).encode())
    (tmp_path / "a.vcf.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match="damaged or cut off"):
        list(VariantFile(tmp_path / "a.vcf.gz"))
    with pytest.raises(FileNotFoundError):
        VariantFile(tmp_path / "none.vcf")


@pytest.mark.parametrize("line", ["c\t1\t.\tA", "c\tx\t.\tA\tC\t.\t.\t.", "c 1 . A C . . ."])
def test_a_malformed_line_is_a_record_with_a_problem(tmp_path, line):
    (tmp_path / "a.vcf").write_text(vcf(ROWS[:1]) + line + "\n" + vcf(ROWS)[len(HEADER) :])
    records = list(VariantFile(tmp_path / "a.vcf"))
    assert len(records) == 5
    assert "expected 8 columns" in records[1].problem
    assert not any(record.problem for record in records[2:])


@pytest.mark.parametrize(
    ("text", "variant"),
    [
        ("c:g.3G>A", ("c", 2, "G", "A")),
        ("c:g.5_7del", ("c", 4, "ACG", "")),
        ("c:g.5_6insACG", ("c", 5, "", "ACG")),
        ("c:g.5dup", ("c", 5, "", "A")),
        ("c:g.5_7delinsTT", ("c", 4, "ACG", "TT")),
        ("c:m.5delA", ("c", 4, "A", "")),
        ("c:g.5_6AC>GT", ("c", 4, "AC", "GT")),
    ],
)
def test_hgvs(text, variant, reference):
    found = parse_hgvs(text, reference)
    assert (found.chrom, found.start, found.ref, found.alt) == variant


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("c:c.3G>A", "need a transcript model"),
        ("NM_1:p.3", "expected a name such as|transcript model"),
        ("c:g.5_9insA", "between two neighbours"),
        ("c:g.5_7delAC", "2 bases do not span 3 positions"),
        ("c:g.5_7A>G", "1 bases do not span 3 positions"),
        ("x:g.5del", "needs a reference with contig 'x'"),
        ("c:g.5inv", "unknown change 'inv'"),
        ("nonsense", "expected a name such as"),
    ],
)
def test_hgvs_that_is_refused(text, message, reference):
    with pytest.raises(ValueError, match=message):
        parse_hgvs(text, reference)


STATUS_OF = [
    ("zzz", 0, "A", "C", "contig_missing"),
    ("c", -1, "A", "C", "out_of_range"),
    ("c", 29, "AC", "A", "out_of_range"),
    ("c", 30, "A", "C", "out_of_range"),
    ("c", 0, "A", ".", "no_alt"),
    ("c", 0, "A", "<NON_REF>", "no_alt"),
    ("c", 0, "A", "<*>", "no_alt"),
    ("c", 0, "A", "", "no_alt"),
    ("c", 0, "A", "*", "star"),
    ("c", 0, "A", "<DEL>", "symbolic"),
    ("c", 0, "A", "A[c:7[", "breakend"),
    ("c", 0, "A", ".A", "breakend"),
    ("c", 0, "A", "AX", "bad_allele"),
    ("c", 0, "A", "N", "n_allele"),
    ("c", 24, "R", "A", "n_allele"),
    ("c", 0, "A", "C" * 41, "allele_too_long"),
    ("c", 0, "G", "C", "ref_mismatch"),
    ("c", 0, "A", "A", "same_allele"),
    ("c", 0, "A", "C", "ok"),
    ("c", 0, "a", "c", "ok"),
    ("c", 3, "U", "C", "ok"),
    ("chrc", 0, "A", "C", "ok"),
    ("c", 0, "A", "AGG", "ok"),
    ("c", 0, "AC", "-", "ok"),
    ("c", 30, "-", "G", "ok"),
]


@pytest.mark.parametrize(("chrom", "start", "ref", "alt", "status"), STATUS_OF)
def test_statuses(chrom, start, ref, alt, status, reference):
    record = Record(0, chrom, start, ".", ref.upper(), (alt.upper(),))
    found = check(record, record.alts[0], reference, ContigMap(reference.lengths), Policy(max_allele=40))
    assert found.status == status
    assert status in STATUSES
    assert (found.variant is not None) == (status == "ok")


def test_first_match_wins(reference):
    record = Record(0, "zzz", 999, ".", "A", ("*",))
    assert check(record, "*", reference, ContigMap(reference.lengths), Policy()).status == "contig_missing"
    record = Record(0, "c", 0, ".", "G", ("<DEL>",))
    assert check(record, "<DEL>", reference, ContigMap(reference.lengths), Policy()).status == "symbolic"
    assert (
        check(Record(0, "c", 0, ".", "", ("",), "", "why"), "", reference, ContigMap([]), Policy()).status == "failed"
    )


def test_policies_for_a_mismatch(reference):
    contigs = ContigMap(reference.lengths)
    record = Record(0, "c", 0, ".", "G", ("A",))  # the reference has A
    assert check(record, "A", reference, contigs, Policy("skip")).status == "ref_mismatch"
    swapped = check(record, "A", reference, contigs, Policy("swap"))
    assert (swapped.status, swapped.variant) == ("swapped", Variant("c", 0, "A", "G", "."))
    trusted = check(record, "A", reference, contigs, Policy("trust"))
    assert (trusted.status, trusted.trusted, trusted.variant.ref) == ("ok", True, "G")
    with pytest.raises(RefMismatchError, match=r"record 1 \(c:1\): REF is G, the reference has A"):
        check(record, "A", reference, contigs, Policy("error"))
    other = Record(0, "c", 0, ".", "G", ("T",))
    assert check(other, "T", reference, contigs, Policy("swap")).status == "ref_mismatch"


def test_empty_alleles_are_anchored(reference):
    contigs = ContigMap(reference.lengths)
    deletion = check(Record(0, "c", 4, ".", "AC", ("-",)), "-", reference, contigs, Policy(normalise=False)).variant
    assert (deletion.start, deletion.ref, deletion.alt) == (3, "TAC", "T")
    first = check(Record(0, "c", 0, ".", "A", ("-",)), "-", reference, contigs, Policy(normalise=False)).variant
    assert (first.start, first.ref, first.alt) == (0, "AC", "C")
    inserted = check(Record(0, "c", 5, ".", "-", ("GG",)), "GG", reference, contigs, Policy(normalise=False)).variant
    assert (inserted.start, inserted.ref, inserted.alt) == (4, "A", "AGG")


def test_one_haplotype_is_one_variant(reference):
    contigs = ContigMap(reference.lengths)
    spellings = [("c", 9, "CG", "C"), ("c", 14, "GG", "G"), ("c", 12, "GGG", "GG"), ("c", 15, "G", "-")]
    found = {check(Record(0, c, s, ".", r, (a,)), a, reference, contigs, Policy()).variant for c, s, r, a in spellings}
    assert found == {Variant("c", 9, "CG", "C", ".")}


def test_read_vcf_gives_variants(tmp_path):
    (tmp_path / "a.vcf").write_text(vcf([*ROWS, ("c", 9, ".", "A", "<DEL>")]))
    assert [str(v) for v in read_vcf(tmp_path / "a.vcf")] == ["c:1:A>C", "c:5:AC>A", "c:5:AC>ACC", "c:9:A>T"]


def test_real_files(shared_data):
    data = shared_data / "genomics"
    genome = Reference(data / "saureus_nctc8325" / "nctc8325.fna.gz")
    contigs = ContigMap(genome.lengths)
    records = list(read_variants(data / "saureus_nctc8325" / "rn4220_vs_nctc8325.vcf"))
    assert len(records) == 109
    found = [check(record, alt, genome, contigs, Policy()).status for record in records for alt in record.alts]
    assert "ref_mismatch" not in found
    assert contigs.aliases() == {"NC_007795": "gi|88193823|ref|NC_007795.1|"}
    calls = list(read_variants(data / "human_hg19_chr20" / "giab_na12878_chr20_100kb.vcf.gz"))
    assert len(calls) == 221
    assert [r.start for r in calls if len(r.alts) > 1] == [10_004_222]
