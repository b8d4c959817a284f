"""References: FASTA in all its packings, circular contigs, aliases, GenBank and annotation."""

import contextlib
import gzip
import logging
import multiprocessing
import pickle
from types import SimpleNamespace

import pytest

from omnissm.genomics import reference
from omnissm.genomics.annotation import Feature, read_bed, read_features, write_gff3
from omnissm.genomics.contigs import ContigMap, read_contig_map
from omnissm.genomics.genbank import genbank_to_fasta_gff, genetic_code, read_genbank, translate
from omnissm.genomics.intervals import Interval
from omnissm.genomics.reference import Reference

pysam = pytest.importorskip("pysam")

FASTA = ">one first\nACGTacgtNN\nGGG\n>two\nTTTTT\n"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.fa").write_text(FASTA)
    with pysam.BGZFile(str(tmp_path / "b.fa.gz"), "wb") as file:
        file.write(FASTA.encode())
    (tmp_path / "c.fa.gz").write_bytes(gzip.compress(FASTA.encode()))
    return tmp_path


@pytest.mark.parametrize("name", ["a.fa", "b.fa.gz", "c.fa.gz"])
@pytest.mark.parametrize("cache", ["auto", "memory", "none"])
def test_all_packings_read_alike(files, name, cache):
    reference = Reference(files / name, cache=cache)
    assert reference.lengths == {"one": 13, "two": 5}
    assert reference.fetch("one", 3, 11) == b"TACGTNNG"
    assert reference.fetch("one", 3, 8, keep_case=True) == b"Tacgt"
    assert reference.fetch("one", -2, 15) == b"NNACGTACGTNNGGGNN"
    assert reference.fetch("two", 7, 9) == b"NN"
    assert reference.digest() == Reference.from_sequences({"one": "ACGTACGTNNGGG", "two": "TTTTT"}).digest()
    assert len(reference.md5("two")) == 32


def test_circular():
    reference = Reference.from_sequences({"p": "ACGTT", "c": "GGG"}, circular=["p"])
    assert reference.fetch("p", -2, 3) == b"TTACG"
    assert reference.fetch("p", 3, 12) == b"TTACGTTAC"
    assert reference.fetch("p", 6, 8) == b"CG"
    assert reference.fetch("c", 2, 5) == b"GNN"
    with pytest.raises(ValueError, match="circular contig 'x' is not in the reference"):
        Reference.from_sequences({"p": "A"}, circular=["x"])


def test_fetch_on_a_strand(files):
    assert Reference(files / "a.fa").fetch_interval(Interval("one", 0, 3, "-")) == b"CGT"


def test_unknown_contig(files):
    with pytest.raises(ValueError, match="no contig 'three' in the reference; it has one, two"):
        Reference(files / "a.fa").fetch("three", 0, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (">a\nAC\n>a\nGT\n", "name 'a' comes twice"),
        (">a\n>b\nAC\n", "contig 'a' has no bases"),
        ("ACGT\n", "is no FASTA file"),
        (">a\nACGTZ\n", "holds 'Z'; expected IUPAC letters"),
        ("", "no sequence"),
        (">\nACGT\n", "a record has no name"),
    ],
)
def test_bad_fasta(tmp_path, text, message):
    (tmp_path / "x.fa").write_text(text)
    with pytest.raises(ValueError, match=message):
        Reference(tmp_path / "x.fa")


def test_truncated_files(files):
    whole = (files / "c.fa.gz").read_bytes()
    (files / "cut.fa.gz").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="damaged or cut off"):
        Reference(files / "cut.fa.gz")
    blocks = (files / "b.fa.gz").read_bytes()
    (files / "short.fa.gz").write_bytes(blocks[:-28])  # without the end marker, between two blocks
    with pytest.raises(ValueError, match="the end marker of BGZF is missing"):
        Reference(files / "short.fa.gz")
    with pytest.raises(FileNotFoundError):
        Reference(files / "none.fa")


def test_plain_gzip_says_how_to_recompress(files, caplog):
    with caplog.at_level(logging.WARNING):
        Reference(files / "c.fa.gz", cache="none")
    assert "bgzip" in caplog.text


def test_index_of_a_read_only_folder_goes_to_the_cache(files, monkeypatch, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr("omnissm.genomics.reference.os.access", lambda *_: False)
    assert Reference(files / "b.fa.gz", cache="none").fetch("two", 0, 5) == b"TTTTT"
    assert len(list(cache.rglob("*.fai"))) == 1
    assert not (files / "b.fa.gz.fai").exists()


def _fetch(reference):
    return reference.fetch("one", 0, 4)


def test_other_processes_open_their_own_handle(files):
    reference = Reference(files / "a.fa", cache="none")
    assert pickle.loads(pickle.dumps(reference)).fetch("one", 0, 4) == b"ACGT"
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(_fetch, [reference, reference]) == [b"ACGT"] * 2


@pytest.mark.parametrize(
    ("contig", "name"),
    [
        ("chr1", "1"),
        ("1", "chr1"),
        ("MT", "chrM"),
        ("chrM", "MT"),
        ("NC_007795.1", "NC_007795"),
        ("NC_007795", "NC_007795.1"),
        ("gi|88193823|ref|NC_007795.1|", "NC_007795"),
        ("gi|88193823|ref|NC_007795.1|", "NC_007795.1"),
        ("x", "x"),
    ],
)
def test_aliases(contig, name):
    names = ContigMap([contig, "other"])
    assert names.find(name) == contig
    assert names.aliases() == ({} if contig == name else {name: contig})


def test_alias_rules_end_somewhere(tmp_path):
    assert ContigMap(["chr1"]).find("chr2") is None
    assert ContigMap(["NC_1.1", "chr3.2"]).find("NC_1.2") is ContigMap(["NC_1.1", "chr3.2"]).find("3.1") is None
    with pytest.raises(ValueError, match=r"may be NC_1\.1 and NC_1\.2"):
        ContigMap(["NC_1.1", "NC_1.2"]).find("NC_1")
    (tmp_path / "map.txt").write_text("# names\nNC_1\tNC_1.2\n")
    assert ContigMap(["NC_1.1", "NC_1.2"], read_contig_map(tmp_path / "map.txt")).find("NC_1") == "NC_1.2"
    with pytest.raises(ValueError, match=r"did you mean 'NC_1\.2'"):
        ContigMap(["NC_1.2"], {"a": "NC_1.3"})
    (tmp_path / "bad.txt").write_text("a b c\n")
    with pytest.raises(ValueError, match="line 1: expected two columns"):
        read_contig_map(tmp_path / "bad.txt")


def test_genetic_codes():
    assert translate("ATGTGATAA", 11) == "M**"
    assert translate("ATGTGATAA", 4) == "MW*"  # TGA is tryptophan in Mycoplasma
    assert translate("ATGNNAA") == "MX"
    assert len(genetic_code(11).amino_acids) == 64
    assert "GTG" in genetic_code(11).starts
    with pytest.raises(ValueError, match="no genetic code 99"):
        genetic_code(99)


def test_gff_and_gtf_and_bed(tmp_path):
    (tmp_path / "a.gff3").write_text(
        "##gff-version 3\nc\tx\tgene\t11\t20\t.\t-\t.\tID=g1;Name=a%3Bb\n"
        "c\tx\tCDS\t31\t40\t.\t+\t0\tID=k\nc\tx\tCDS\t51\t60\t.\t+\t1\tID=k\n##FASTA\n>c\nACGT\n"
    )
    gene, cds = read_features(tmp_path / "a.gff3")
    assert gene == Feature("c", 10, 20, "-", "gene", "g1")
    assert gene.attributes["Name"] == "a;b"
    assert cds.parts == ((30, 40), (50, 60))
    assert read_features(tmp_path / "a.gff3", ["CDS"]) == [cds]
    (tmp_path / "a.gtf").write_text('c\tx\tCDS\t1\t9\t.\t+\t0\tgene_id "g"; transcript_id "t";\n')
    assert read_features(tmp_path / "a.gtf")[0].id == "t"
    (tmp_path / "a.bed").write_text("track x\nc\t5\t9\tn\t0\t-\n")
    assert read_bed(tmp_path / "a.bed") == [Interval("c", 5, 9, "-")]
    (tmp_path / "a.tsv").write_text("contig\tstart0\tend\tstrand\tid\tness\nc\t5\t9\t+\tg\t1\n")
    assert read_features(tmp_path / "a.tsv")[0].attributes["ness"] == "1"
    write_gff3(tmp_path / "b.gff3", [gene, cds])
    assert read_features(tmp_path / "b.gff3") == [gene, cds]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.gff3", "c\tx\tgene\t11\n", "line 1: expected 9 columns"),
        ("a.bed", "c\t9\t5\n", "line 1: expected chrom, start, end"),
        ("a.tsv", "chrom\tend\nc\t1\n", "expected columns chrom, start0"),
        ("a.tsv", "chrom\tstart0\tend\nc\tx\t1\n", "line 2: expected whole numbers"),
        ("a.xyz", "", "unknown kind of annotation"),
    ],
)
def test_bad_annotation(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_features(tmp_path / name)


def test_real_genomes(shared_data):
    data = shared_data / "genomics"
    coli = Reference(data / "ecoli_k12_mg1655" / "ecoli_k12_mg1655.fna.gz")
    assert coli.lengths == {"U00096.2": 4_639_675}
    seeking = Reference(data / "ecoli_k12_mg1655" / "ecoli_k12_mg1655.fna.gz", cache="none")
    assert seeking.fetch("U00096.2", 4_000_000, 4_000_500) == coli.fetch("U00096.2", 4_000_000, 4_000_500)
    genes = read_features(data / "ecoli_k12_mg1655" / "genes.gff3", ["CDS"])
    threonine = next(gene for gene in genes if gene.attributes.get("Name") == "thrA")
    protein = translate(coli.fetch_interval(threonine.interval))
    assert protein.startswith("MRVLKFGGTS")
    assert protein.endswith("*")
    assert protein.count("*") == 1


def test_genbank(shared_data, tmp_path):
    path = shared_data / "genomics" / "phage" / "phix174_NC_001422.gbk"
    (record,) = read_genbank(path)
    assert (len(record.sequence), record.circular) == (5386, True)
    cds = [feature for feature in record.features if feature.type == "CDS"]
    assert len(cds) == 11
    assert any(feature.parts for feature in cds)  # gene A crosses the origin
    reference = Reference(path)
    assert reference.circular == set(reference.names)
    plain = next(feature for feature in cds if not feature.parts)
    assert translate(reference.fetch_interval(plain.interval)).rstrip("*") == plain.attributes["translation"]
    genbank_to_fasta_gff(path, tmp_path / "x.fa", tmp_path / "x.gff3")
    assert Reference(tmp_path / "x.fa").digest() == reference.digest()
    assert len(read_features(tmp_path / "x.gff3", ["CDS"])) == 11


def test_no_genbank(tmp_path):
    (tmp_path / "a.gbk").write_text("nothing")
    with pytest.raises(ValueError, match="holds no genbank record"):
        read_genbank(tmp_path / "a.gbk")


@pytest.mark.parametrize("block", [2**22, 7])
@pytest.mark.parametrize("packed", [False, True])
def test_names_that_come_twice_are_refused_before_an_index_hides_them(block, packed, tmp_path, monkeypatch):
    read = reference.open_lines

    @contextlib.contextmanager
    def in_blocks(path):
        with read(path) as file:
            yield SimpleNamespace(read=lambda _: file.read(block))

    monkeypatch.setattr(reference, "open_lines", in_blocks)
    path = tmp_path / ("a.fa.gz" if packed else "a.fa")
    for text, message in ((">one x\nACGT\n>two\nAC\n>one y\nGGGG\n", "name 'one' comes twice"), (FASTA, "")):
        path.write_text(text)
        if packed:
            with pysam.BGZFile(str(path), "wb") as file:
                file.write(text.encode())
        if message:
            with pytest.raises(ValueError, match=message):
                Reference(path, cache="none")
            assert [found.name for found in tmp_path.iterdir()] == [path.name]
        else:
            assert Reference(path, cache="none").lengths == {"one": 13, "two": 5}
