"""Odd, damaged or ambiguous inputs: each row gets a status, or one clear line comes before the work."""

import io

import numpy as np
import pytest

from omnissm.__main__ import main
from omnissm.genomics.contigs import ContigMap
from omnissm.genomics.evaluation import evaluate_model
from omnissm.genomics.intervals import Interval, Variant
from omnissm.genomics.likelihood import Scorer
from omnissm.genomics.models import save_pretrained
from omnissm.genomics.models.markov import MarkovModel
from omnissm.genomics.reference import Reference
from omnissm.genomics.scoring import score_variants
from omnissm.genomics.variants import VariantFile

SEQUENCE = "".join(np.random.default_rng(0).choice(list("ACGT"), 400))
HEADER = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"


def line(position, chrom="c"):
    ref = SEQUENCE[position - 1]
    return f"{chrom}\t{position}\t.\t{ref}\t{'A' if ref != 'A' else 'C'}\t.\t.\t.\n"


@pytest.fixture
def model():
    return MarkovModel(3).fit([SEQUENCE])


@pytest.fixture
def genome():
    return Reference.from_sequences({"c": SEQUENCE})


def write(path, *lines):
    path.write_text(HEADER + "".join(lines))
    return path


UNREADABLE = ["c\tx\t.\tA\tC\n", "c\t²\t.\tA\tC\t.\t.\t.\n", f"c\t{'9' * 30}\t.\tA\tC\t.\t.\t.\n", "c 5 . A C . . .\n"]


@pytest.mark.parametrize("bad", UNREADABLE)
@pytest.mark.parametrize("first", [True, False])
def test_lines_that_cannot_be_read_pass_into_packed_files(bad, first, tmp_path, model, genome, caplog):
    pytest.importorskip("pysam")
    lines = [bad, line(10), line(20)] if first else [line(10), line(20), bad]
    out = tmp_path / "o.vcf.gz"
    out.with_name("o.vcf.gz.tbi").write_text("an index of an older file")
    table = score_variants(write(tmp_path / "a.vcf", *lines), genome, model, window=51, out=str(out))
    assert table["status"].tolist() == (["failed", "ok", "ok"] if first else ["ok", "ok", "failed"])
    assert table["pos"].tolist() == ([0, 10, 20] if first else [10, 20, 0])
    assert [path.name for path in tmp_path.glob("o.*")] == ["o.vcf.gz"]
    assert "holds lines that cannot be read, so it has no index" in caplog.text


def test_bcf_refuses_such_a_line_before_the_work(tmp_path, model, genome):
    pytest.importorskip("pysam")
    calls = write(tmp_path / "a.vcf", line(10), UNREADABLE[0])
    with pytest.raises(ValueError, match=r"record 2 could not be read, which BCF cannot hold; write \.vcf\.gz"):
        score_variants(calls, genome, model, window=51, out=str(tmp_path / "o.bcf"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.vcf"]


def test_far_positions_get_an_index_that_holds_them(tmp_path, model, genome):
    pysam = pytest.importorskip("pysam")
    calls = write(tmp_path / "a.vcf", line(10), f"c\t{2**29 + 5}\t.\tA\tC\t.\t.\t.\n")
    table = score_variants(calls, genome, model, window=51, out=str(tmp_path / "o.vcf.gz"))
    assert table["status"].tolist() == ["ok", "out_of_range"]
    with pysam.VariantFile(str(tmp_path / "o.vcf.gz")) as file:
        assert [record.pos for record in file.fetch("c", 2**29)] == [2**29 + 5]


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ("c\t10\t\tA", "bad_allele"),  # no REF is not an empty REF
        ("c\t10\t-\tA", "ok"),
        (f"c\t10\t{SEQUENCE[9]}\t", "no_alt"),
        ("c\t10", "bad_allele"),
        (f"c\t{'9' * 30}\tA\tC", "failed"),
        ("c\t-3\tA\tC", "failed"),
    ],
)
def test_rows_of_a_table(row, status, tmp_path, model, genome):
    (tmp_path / "a.tsv").write_text(f"chrom\tpos\tref\talt\n{row}\n")
    table = score_variants(tmp_path / "a.tsv", genome, model, window=51)
    assert table["status"].tolist() == [status]


@pytest.mark.parametrize("region", ["c:1-50", "chrc:1-50", "c", "chrc"])
def test_regions_know_both_names_of_a_contig(region, tmp_path, model, genome):
    calls = write(tmp_path / "a.vcf", line(10, "chrc"), line(60, "chrc"))
    table = score_variants(calls, genome, model, window=51, regions=[region])
    assert table["status"].tolist() == ["ok"] * (1 if "-" in region else 2)


def test_regions_without_records_are_told(tmp_path, model, genome, caplog):
    table = score_variants(write(tmp_path / "a.vcf", line(10)), genome, model, window=51, regions=["d:1-50"])
    assert table.n_rows == 0
    assert "no record lies in the regions d:1-50" in caplog.text


def test_an_ambiguous_name_is_in_no_region(tmp_path):
    calls = write(tmp_path / "a.vcf", line(10, "chr1"))
    contigs = ContigMap(["1", "chr1.2"])
    assert not list(VariantFile(calls, regions=[Interval("1", 0, 50)], contigs=contigs))


@pytest.mark.parametrize("options", [{"shard": (0, 2)}, {"resume": True}])
def test_options_that_need_a_file(options, tmp_path, model, genome):
    with pytest.raises(ValueError, match="need a file to write"):
        score_variants(write(tmp_path / "a.vcf", line(10)), genome, model, window=51, **options)
    with pytest.raises(ValueError, match="all scored at once"):
        score_variants([Variant("c", 9, SEQUENCE[9], "A")], genome, model, window=51, **options)


def test_standard_input_of_an_unfinished_run_is_kept(tmp_path, model, genome, monkeypatch):
    """Neither a start by accident nor going on without the input may lose it."""

    class Stdin:
        def __init__(self, text):
            self.buffer = io.BytesIO(text.encode())

    text, out = HEADER + "".join(line(k) for k in range(10, 30)), str(tmp_path / "o.vcf")
    options = {"window": 51, "part_size": 5, "out": out}
    monkeypatch.setattr("sys.stdin", Stdin(text))
    score_variants("-", genome, model, shard=(0, 2), **options)
    monkeypatch.setattr("sys.stdin", Stdin(HEADER + line(7)))
    with pytest.raises(ValueError, match="unfinished run; go on with --resume"):
        score_variants("-", genome, model, **options)
    monkeypatch.setattr("sys.stdin", Stdin(""))
    table = score_variants("-", genome, model, resume=True, **options)
    assert table["pos"].tolist() == list(range(10, 30))


def test_a_context_beyond_what_the_model_reads_is_refused(model, genome):
    scorer = Scorer(model)
    scorer.max_length = 64
    with pytest.raises(ValueError, match="context from 0 to below the window 64, got 100"):
        evaluate_model(scorer, genome, [Interval("c", 0, 400)], window=200, context=100)


def test_time_left_is_shown(tmp_path, model, genome, capsys):
    calls = write(tmp_path / "a.vcf", *(line(k) for k in range(10, 30)))
    score_variants(calls, genome, model, window=51, out=str(tmp_path / "o.tsv"), part_size=5, progress=True)
    shown = capsys.readouterr().err
    assert "20 variants" in shown
    assert "100 %, 0:00:00 left" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scan", "--region", "c:1-500", "--out", "o.tsv"], "lies beyond the contig's 400 bases"),
        (["scan", "--region", "c:1-50", "--out", "o.txt"], "unknown kind of output 'o.txt'"),
        (["boundaries", "--regions", "c:300-900", "--out", "o.bed"], "lies beyond the contig's 400 bases"),
        (["boundaries", "--regions", "d:1-9", "--out", "o.bed"], "no contig 'd'"),
        (["evaluate", "--regions", "c:1-401"], "lies beyond the contig's 400 bases"),
        (["embed", "--regions", "c:401-500", "--out", "o.npz"], "lies beyond the contig's 400 bases"),
        (["embed", "--out", "old.zarr"], "'old.zarr' exists"),
    ],
)
def test_verbs_refuse_before_the_work(words, message, tmp_path, model, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "g.fa").write_text(f">c\n{SEQUENCE}\n")
    (tmp_path / "old.zarr").mkdir()
    save_pretrained(model, tmp_path / "m", dtype=None)
    source = {"evaluate": "--fasta", "embed": "--sequences"}.get(words[0], "--reference")
    assert main(["genomics", words[0], source, "g.fa", "--model", "m", *words[1:]]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o.tsv").exists()


@pytest.mark.parametrize(("codes", "expected"), [((0, -9), 1), ((-9, 2), 2), ((3, 4), 4)])
def test_a_killed_shard_is_no_success(codes, expected, tmp_path, monkeypatch, capsys):
    """A process that was killed has a negative exit code, below that of one that went well."""
    left = iter(codes)
    started = []

    class Process:
        def __init__(self, words):
            started.append(words)

        def wait(self):
            return next(left)

    monkeypatch.setattr("subprocess.Popen", Process)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    words = ["--variants", "a.vcf", "--reference", "g.fa", "--model", "m", "--out", "o.vcf", "--devices", "2"]
    monkeypatch.setattr("sys.argv", ["omnissm", "genomics", "score", *words])
    assert main(["genomics", "score", *words]) == expected
    assert [command[-3:] for command in started] == [[f"{k}/2", "--device", f"cuda:{k}"] for k in range(2)]
    said = "see above" if expected == 2 else "--resume true goes on"  # what was refused would be refused again
    assert said in capsys.readouterr().err
