"""Files that drawn ones have shown to be read wrongly, or not refused in one line."""

import json

import numpy as np
import pytest
import torch

from omnissm.__main__ import main
from omnissm.genomics.annotation import read_features
from omnissm.genomics.contigs import ContigMap
from omnissm.genomics.data.labelled import read_table
from omnissm.genomics.models.markov import MarkovModel
from omnissm.genomics.reference import Reference
from omnissm.genomics.scoring import score_variants
from omnissm.genomics.status import Policy, check
from omnissm.genomics.variants import Record, VariantFile
from omnissm.graphs.data.packed import read_packed
from omnissm.graphs.data.sets import Cora
from omnissm.ssmcore.training.checkpoints import read_checkpoint, read_model_folder
from omnissm.timeseries.data.nab import read_nab
from omnissm.timeseries.files import read_series
from omnissm.timeseries.frames import from_wide
from omnissm.timeseries.ts_files import read_ts
from omnissm.vision import create_model
from omnissm.vision.data.reading import BadImageError, read_image
from omnissm.vision.data.shards import TarShards, read_shards, write_shards


def test_times_beyond_nanoseconds_are_refused(tmp_path):
    """The year 9999 became 1816."""
    (tmp_path / "a.csv").write_text("t,a\n9999-12-31 00:00,1\n9999-12-31 01:00,2\n")
    with pytest.raises(ValueError, match=r"9999-12-31.* outside of the years 1678 to 2262"):
        read_series(tmp_path / "a.csv", time="t")
    import pandas as pd

    with pytest.raises(ValueError, match="outside of the years"):
        from_wide(pd.DataFrame({"a": [1.0]}, index=pd.DatetimeIndex(np.array(["1500-01-01"], "datetime64[s]"))))


def test_ids_stay_as_they_are_written(tmp_path):
    """ "007" became 7, and "NA" a missing value."""
    rows = [f"{name},2024-01-0{day},{day}" for name in ("007", "7", "NA") for day in (1, 2)]
    (tmp_path / "a.csv").write_text("\n".join(["unique_id,ds,y", *rows]))
    ds = read_series(tmp_path / "a.csv", time="ds", ids="variates")
    assert ds["variate"].to_numpy().tolist() == ["007", "7", "NA"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t,a,a\n2024-01-01,1,2\n", "two columns 'a'"),
        ("t,a,b\n2024-01-01,1\n2024-01-02,1,2\n", r"line 2: 2 fields, expected 3"),
        ("t,a\n2024-01-01,1,2\n2024-01-02,1,2\n", "Length of header"),
        ("", "cannot be read as CSV"),
    ],
)
def test_tables_with_other_columns_than_they_say(text, message, tmp_path):
    """The second `a` got another name, lost fields became missing values, and with one more the first was the index."""
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_series(tmp_path / "a.csv", time="t")


def test_ts_files_with_an_empty_class_label(tmp_path):
    (tmp_path / "a.ts").write_text("@classLabel\n@data\n1,2\n")
    assert read_ts(tmp_path / "a.ts")["target"].shape == (1, 2, 1)


def test_names_of_contigs_in_utf8(tmp_path):
    """From memory a name had the letters of Latin-1, from an index those of UTF-8."""
    pytest.importorskip("pysam")
    (tmp_path / "a.fa").write_text(">é\nACGT\n", encoding="utf-8")
    names = [Reference(tmp_path / "a.fa", cache=cache).names for cache in ("memory", "none")]
    assert names == [["é"], ["é"]]


@pytest.mark.parametrize("allele", ["\u0663", "\udcff", "Aé"])
def test_alleles_of_strange_letters_get_a_status(allele):
    genome = Reference.from_sequences({"c": "ACGT"})
    record = Record(0, "c", 0, ".", "A", (allele,))
    assert check(record, allele, genome, ContigMap(genome.lengths), Policy()).status == "bad_allele"


def test_positions_beyond_any_index_keep_the_output(tmp_path, caplog):
    pytest.importorskip("pysam")
    head = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    (tmp_path / "a.vcf").write_text(f"{head}c\t{2**60}\t.\tA\tC\t.\t.\t.\n")
    genome = Reference.from_sequences({"c": "ACGT" * 20})
    model = MarkovModel(2).fit(["ACGT" * 20])
    score_variants(tmp_path / "a.vcf", genome, model, window=11, out=str(tmp_path / "o.vcf.gz"))
    assert len(list(VariantFile(tmp_path / "o.vcf.gz"))) == 1
    assert "has no index" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"chrom,pos,ref,alt\n\xff,1,A,C\n", "line 2: expected text in UTF-8"),
        ("a.csv", b"chrom,pos,ref,alt,ref\nc,1,A,C,G\n", "two columns are named 'ref'"),
        ("a.tsv", b"", "is empty"),
        ("a.bed", "c\t²\t3\n".encode(), "line 1"),
        ("a.bed", b"c\t1\t" + b"9" * 30 + b"\n", "line 1"),
        ("a.gff3", b"c\tx\tgene\t0\t5\t.\t+\t.\tID=a\n", "1 <= start"),
        ("b.tsv", b"chrom\tstart0\tend\nc\t5\n", "line 2: expected 3 columns, got 2"),
    ],
)
def test_tables_of_variants_and_annotation(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(VariantFile(tmp_path / name)) if name in ("a.csv", "a.tsv") else read_features(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfchrom,pos,ref,alt\nc,1,A,C\n")
    assert [record.start for record in VariantFile(tmp_path / "a.csv")] == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": np.array([-1], np.int8)}, "`split`"),
        ({"split": np.array([0.5])}, "expected integers"),
        ({"node_ptr": np.array([1, 2])}, "must begin with 0"),
        ({"node_ptr": np.array([], np.int64)}, "is empty"),
        ({"x": np.ones((2, 1), np.complex64)}, "expected numbers"),
    ],
)
def test_packed_graphs_of_wrong_numbers(change, message, tmp_path):
    """A part of -1 was the test part, and of a pointer that begins at 1 the first node was lost."""
    arrays = {
        "node_ptr": np.array([0, 2]),
        "edge_ptr": np.array([0, 1]),
        "x": np.ones((2, 1)),
        "edge_index": np.array([[0], [1]]),
        "y": np.array([[1.0]]),
        "split": np.array([0], np.uint8),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    assert read_packed(tmp_path / "a.npz")[1] == ["train"]
    np.savez(tmp_path / "a.npz", **{**arrays, **change})
    with pytest.raises(ValueError, match=message):
        read_packed(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("kind", "content"), [("cls", b"1_0"), ("cls", b"1.5"), ("json", b'{"label": 1.7}'), ("json", b"[" * 9000)]
)
def test_labels_of_shards_are_whole_numbers(kind, content, tmp_path):
    """A label of 1.7 was 1, and 1_0 was 10."""
    import io
    import tarfile

    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        member = tarfile.TarInfo(f"a.{kind}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match="holds no label"):
        read_shards([tmp_path / "train-0.tar"])


def test_a_huge_label_does_not_fill_the_memory(tmp_path):
    from PIL import Image

    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    write_shards([tmp_path / "a.png"], [10**12], [], tmp_path)
    (tmp_path / "classes.json").unlink()
    with pytest.raises(ValueError, match="so many classes need names"):
        TarShards(tmp_path).setup()


def test_damaged_checkpoints_and_folders(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"\x80\x02Q.")
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(tmp_path / "a.ckpt")
    from safetensors.torch import save_file

    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    for args in ([1], "x"):
        (tmp_path / "config.json").write_text(json.dumps({"omnissm": "0.1", "model": "graphs/x", "args": args}))
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            read_model_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"omnissm": "0.1", "model": "timeseries/x"}))
    with pytest.raises(ValueError, match=r"lacks 'data\.json'"):
        read_model_folder(tmp_path).files["data.json"]


def test_a_model_that_does_not_fit_into_memory_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["timeseries", "fit", "-c", "timeseries/sequence_classifier_waves", "--run", "x"]
    assert main([*words, "--model.init_args.model_args", json.dumps({"d_model": 2**40})]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error


def test_parquet_text_that_is_no_utf8(tmp_path):
    """Arrow finds out when a column becomes Python's texts, long after the file was read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"A\xff"))
    pq.write_table(pa.table({"sequence": text}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="damaged or no Parquet file"):
        read_table(str(tmp_path / "a.parquet"))
    times = pa.array(["2024-01-01"])
    pq.write_table(pa.table({"time": times, "unique_id": text, "value": [1.0]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet"):
        read_series(tmp_path / "a.parquet", time="time")


def test_series_cut_off_behind_the_first_letters(tmp_path):
    (tmp_path / "a.ts").write_text("@problemName x\n@")
    with pytest.raises(ValueError, match="line 2: expected a header line"):
        read_ts(tmp_path / "a.ts")
    (tmp_path / "a.csv").write_text("timestamp,value\n2000-01-01,1\n")
    (tmp_path / "combined_windows.json").write_text('{"a.csv": []}')
    with pytest.raises(ValueError, match="fewer than two different times"):
        read_nab(tmp_path, "a")


def test_an_image_that_asks_for_too_much_memory(tmp_path, monkeypatch):
    from PIL import Image

    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: bytearray(2**62))
    with pytest.raises(BadImageError, match="memory is full"):
        read_image(tmp_path / "a.png")


def test_names_that_are_no_utf8(tmp_path, monkeypatch):
    """An index of Arrow's texts is read as it stands, and fails where its values are looked at."""
    pa = pytest.importorskip("pyarrow")
    import pandas as pd
    import xarray as xr

    text = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"A\xff"))
    names = pd.Index(pd.array(text, dtype="string[pyarrow]"))
    with pytest.raises(pa.ArrowException):
        names.to_numpy()
    whole = xr.Dataset({"target": (("time", "variate"), np.ones((2, 1)))}, {"time": np.arange(2), "variate": ["a"]})
    broken = whole.assign_coords(variate=names)
    monkeypatch.setattr(xr, "open_dataset", lambda *args, **options: broken)
    whole.to_zarr(tmp_path / "a.zarr")
    with pytest.raises(ValueError, match="cannot be read"):
        read_series(tmp_path / "a.zarr")


@pytest.mark.parametrize("rows", [[0, 2**29], [0, 2, 1], [0, 2]])
def test_words_of_papers_that_are_not_there_take_no_memory(rows, tmp_path):
    """The first asked for 4 GiB."""
    shape = {"x_indptr": np.array(rows, np.int32), "x_indices": np.array([1], np.int16), "num_features": np.array(4)}
    papers = len(rows) - 1
    graph = {"edge_index": np.zeros((2, 0), np.int16), "y": np.zeros(papers, np.int8), "split": np.zeros(papers)}
    np.savez(tmp_path / "cora.npz", **shape, **graph)
    with pytest.raises(ValueError, match="`x_indptr` does not cut the 1 `x_indices` into rows"):
        Cora(str(tmp_path / "cora.npz")).read_parts()


def test_options_of_models_that_no_name_could_have_are_refused():
    with pytest.raises(TypeError, match=r"model 'hydra_vit_tiny_patch16_224' has no option 'd\^state'\.$"):
        create_model("hydra_vit_tiny_patch16_224", **{"d^state": 8})
