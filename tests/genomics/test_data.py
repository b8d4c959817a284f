"""Data modules: parts never overlap, windows depend on seed, epoch and index alone, every base is evaluated once."""

import itertools

import numpy as np
import pytest
import torch

from omnissm.genomics.data import FastaWindows, LabelledSequences, SyntheticDNA, SyntheticLabels, synthetic_genome
from omnissm.genomics.data.regions import check_regions, intersect, merge, split_by_blocks, split_by_share, subtract
from omnissm.genomics.data.samplers import WindowSampler
from omnissm.genomics.genbank import translate
from omnissm.genomics.intervals import Interval
from omnissm.genomics.reference import Reference
from omnissm.genomics.sequence import decode, reverse_complement

RNG = np.random.default_rng(0)
CONTIGS = {"a": "".join(RNG.choice(list("ACGT"), 1000)), "b": "".join(RNG.choice(list("ACGT"), 500)), "c": "ACGTAC"}


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "g.fa"
    path.write_text("".join(f">{name}\n{text}\n" for name, text in CONTIGS.items()))
    return str(path)


def texts(batch, vocabulary="byte"):
    return [decode(row[mask], vocabulary) for row, mask in zip(batch.tokens.numpy(), batch.mask.numpy())]


def rows(loader):
    return [text for batch in loader for text in texts(batch)]


def places(data, part, epochs=3):
    windows = data.windows(part)
    return {
        (place.chrom, base)
        for number in range(epochs * len(windows))
        for place in windows.window(number)[0]
        for base in range(place.start, place.end)
    }


SPLITS = [
    {},
    {"train": 0.5, "val": 0.2, "test": 0.3},
    {"val": ["b"], "test": ["c"]},
    {"train": ["a:1-600"], "val": ["a:601-1000"], "test": ["b"]},
    {"split_blocks": 100, "split_pattern": "3:1:1"},
]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_parts_share_no_base(fasta, split):
    data = FastaWindows(fasta, length=32, **split)
    seen = {part: places(data, part) for part in ("train", "val", "test")}
    for one, other in itertools.combinations(seen.values(), 2):
        assert one
        assert not one & other


def test_gap_include_and_exclude(fasta, tmp_path):
    (tmp_path / "in.bed").write_text("a\t100\t900\n")
    (tmp_path / "out.bed").write_text("a\t200\t300\n")
    options = {"length": 32, "train": 0.5, "val": 0.2, "test": 0.1, "gap": 10}
    data = FastaWindows(fasta, include=str(tmp_path / "in.bed"), exclude=str(tmp_path / "out.bed"), **options)
    data.setup()
    assert data.parts["train"] == [Interval("a", 110, 190), Interval("a", 310, 743)]
    assert data.parts["val"] == [Interval("a", 763, 890)]


def test_splits_from_a_file(fasta, tmp_path):
    (tmp_path / "s.bed").write_text("chrom\tstart\tend\tsplit\na\t0\t500\ttrain\na\t500\t800\tvalid\nb\t0\t500\ttest\n")
    data = FastaWindows(fasta, length=32, split_bed=str(tmp_path / "s.bed"))
    data.setup()
    assert data.parts["val"] == [Interval("a", 500, 800)]
    (tmp_path / "bad.bed").write_text("a\t0\t500\tother\n")
    with pytest.raises(ValueError, match="line 1: expected chrom, start, end and train"):
        FastaWindows(fasta, split_bed=str(tmp_path / "bad.bed")).setup()


def test_region_arithmetic():
    assert merge([Interval("a", 5, 9), Interval("a", 0, 5), Interval("b", 1, 2)]) == [
        Interval("a", 0, 9),
        Interval("b", 1, 2),
    ]
    assert intersect([Interval("a", 0, 10)], [Interval("a", 5, 20), Interval("b", 0, 9)]) == [Interval("a", 5, 10)]
    assert subtract([Interval("a", 0, 10)], [Interval("a", 3, 5), Interval("a", 9, 12)]) == [
        Interval("a", 0, 3),
        Interval("a", 5, 9),
    ]
    parts = split_by_share({"a": 60, "b": 40}, (0.5, 0.25, 0.25))
    assert parts == {
        "train": [Interval("a", 0, 50)],
        "val": [Interval("a", 50, 60), Interval("b", 0, 15)],
        "test": [Interval("b", 15, 40)],
    }
    blocks = split_by_blocks({"a": 50}, 10, "3:1:1")
    assert blocks == {"train": [Interval("a", 0, 30)], "val": [Interval("a", 30, 40)], "test": [Interval("a", 40, 50)]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": ["a"], "val": ["a:5-9"]}, "train and val overlap at a:5-9"),
        ({"val": ["x"]}, "expected a region"),
        ({"train": ["a:1-2000"]}, "is not in the reference"),
        ({"train": 0.9, "test": 0.3}, "sum to at most 1"),
        ({"train": 0.9, "test": ["a"]}, "all as shares or all as contigs"),
        ({"split_blocks": 9, "split_pattern": "7:1"}, "expected a pattern such as"),
    ],
)
def test_bad_splits(fasta, options, message):
    with pytest.raises(ValueError, match=message):
        FastaWindows(fasta, length=32, **options).setup()


@pytest.mark.parametrize(
    "options",
    [
        {"length": 1},
        {"rc_prob": 2.0},
        {"soft_mask": 3.0},
        {"vocabulary": "x"},
        {"gap": -1},  # parts would overlap
        {"max_n_frac": -0.1},
        {"stride": -1, "sampling": "tiled"},
        {"epoch_size": 0},
        {"split_blocks": 0},
        {"batch_size": 0},
        {"tokens_per_batch": -5},
    ],
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=r"expected|unknown vocabulary"):
        FastaWindows("g.fa", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 0},
        {"batch_size": 0},
        {"rc_prob": -1.0},
        {"test_share": -0.1},
        {"val_share": 0.5, "test_share": 0.5},
    ],
)
def test_bad_options_of_tables(options):
    with pytest.raises(ValueError, match="expected"):
        LabelledSequences("t.csv", **options)


def test_evaluation_covers_every_base_once(fasta):
    data = FastaWindows(fasta, length=64, train=["a"], val=["b", "c"], batch_size=3)
    joined = "".join(row[1:] for row in rows(data_loader(data, "val")))  # without the start id
    assert joined == CONTIGS["b"] + CONTIGS["c"]


def data_loader(data, part):
    return data._loader(part, shuffle=part == "train")


def test_windows_are_what_the_genome_has(fasta):
    data = FastaWindows(fasta, length=64, train=["a"], val=["b"], rc_prob=0.5, bos=False)
    flips = []
    for text in rows(data.train_dataloader()):
        forward = text in CONTIGS["a"]
        assert forward or reverse_complement(text).decode() in CONTIGS["a"]
        flips.append(forward)
    assert len(flips) == 1000 // 64
    assert 0 < sum(flips) < len(flips)


@pytest.mark.parametrize("options", [{}, {"sampling": "tiled"}, {"pack": True}, {"objective": "masked"}])
def test_order_does_not_depend_on_workers(fasta, options):
    found = []
    for workers in (0, 2):
        data = FastaWindows(fasta, length=32, train=["a", "c"], val=["b"], batch_size=4, num_workers=workers, **options)
        loader, epochs = data.train_dataloader(), []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            epochs.append([tuple(t for t in batch if t is not None) for batch in loader])
        found.append(epochs)
    for one, other in zip(*found):
        for a, b in zip(one, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    first, second = ([batch[0] for batch in epoch] for epoch in found[0])
    assert not all(torch.equal(a, b) for a, b in zip(first, second))  # epochs differ


def test_a_run_resumes_inside_an_epoch(fasta):
    data = FastaWindows(fasta, length=32, train=["a"], val=["b"], batch_size=4)
    whole = list(data.train_dataloader())
    loader = data.train_dataloader()
    loader.sampler.set_epoch(0, start=3 * 4)
    rest = list(loader)
    assert len(rest) == len(whole) - 3
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(rest, whole[3:], strict=True))


def test_ranks_share_the_windows(fasta):
    data = FastaWindows(fasta, length=32, train=["a"], val=["b"])
    dataset = data.windows("train")
    ranks = []
    for rank in range(2):
        sampler = WindowSampler(dataset, shuffle=True, rank=rank, world_size=2)
        ranks.append(list(sampler))
    assert {*ranks[0], *ranks[1]} == set(range(len(dataset)))
    assert len(ranks[0]) == len(ranks[1]) == -(-len(dataset) // 2)


def test_short_contigs_are_padded(fasta):
    data = FastaWindows(fasta, length=16, train=["a"], val=["c"], vocabulary="acgt")
    (batch,) = data.val_dataloader()
    assert batch.mask.sum().item() == 7
    assert texts(batch, "acgt") == ["N" + CONTIGS["c"]]


def test_packed_rows(tmp_path):
    pieces = {f"p{k}": "".join(RNG.choice(list("ACGT"), n)) for k, n in enumerate((10, 20, 12, 5, 33))}
    (tmp_path / "p.fa").write_text("".join(f">{name}\n{text}\n" for name, text in pieces.items()))
    data = FastaWindows(
        str(tmp_path / "p.fa"), length=33, train=1.0, val=0, test=0, pack=True, rc_prob=0, vocabulary="acgt"
    )
    seen = []
    for batch in data.train_dataloader():
        for tokens, mask, seq_idx in zip(batch.tokens, batch.mask, batch.seq_idx):
            real = seq_idx[mask]
            assert (real.diff() >= 0).all()
            assert (seq_idx[~mask] > real.max()).all()
            for piece in real.unique():
                part = tokens[mask][real == piece]
                assert part[0] == data.words.bos
                seen.append(decode(part[1:].numpy(), "acgt"))
    assert sorted(seen) == sorted(pieces.values())


def test_masked_rows(fasta):
    data = FastaWindows(fasta, length=400, train=["a"], val=["b"], objective="masked", vocabulary="char", epoch_size=64)
    (batch,) = FastaWindows(
        fasta, length=400, train=["a"], val=["b"], objective="masked", batch_size=64, epoch_size=64
    ).train_dataloader()
    asked = batch.labels != -100
    assert 0.13 < asked.float().mean() < 0.17
    hidden = batch.tokens[asked]
    assert 0.75 < (hidden == 1).float().mean() < 0.85  # id of the mask
    kept = hidden == batch.labels[asked]
    assert 0.08 < kept.float().mean() < 0.18  # a tenth, and a quarter of the random ones
    assert (batch.labels[asked] < 128).all()
    assert data.vocab_size == 16


def test_soft_masked_bases_weigh_less(tmp_path):
    (tmp_path / "s.fa").write_text(">s\n" + "ACgtACGT" * 20 + "\n")
    data = FastaWindows(str(tmp_path / "s.fa"), length=8, train=0.0, val=0.0, test=1.0, soft_mask=0.25)
    batch = next(iter(data.test_dataloader()))
    assert batch.weight[0].tolist() == [1, 1, 1, 0.25, 0.25, 1, 1, 1, 1]
    assert texts(batch)[0][1:] == "ACGTACGT"


def test_windows_of_n_are_left_out(tmp_path):
    (tmp_path / "n.fa").write_text(">s\n" + "N" * 2000 + CONTIGS["a"] + "\n")
    data = FastaWindows(str(tmp_path / "n.fa"), length=50, train=1.0, val=0, test=0, batch_size=8, epoch_size=64)
    assert all(text.count("N") <= 6 for text in rows(data.train_dataloader()))
    (tmp_path / "all.fa").write_text(">s\n" + "N" * 200 + "\n")
    with pytest.raises(ValueError, match="no window"):
        FastaWindows(str(tmp_path / "all.fa"), length=50, train=0, val=0, test=1.0).test_dataloader()


def test_circular_contigs_wrap(tmp_path):
    ring = CONTIGS["a"][:90]
    (tmp_path / "r.fa").write_text(f">r\n{ring}\n")
    data = FastaWindows(
        str(tmp_path / "r.fa"), length=60, train=1.0, val=0, test=0, circular=True, rc_prob=0, epoch_size=200, bos=False
    )
    found = set(rows(data.train_dataloader()))
    assert all(text in ring + ring for text in found)
    assert any(text not in ring for text in found)


def test_empty_parts_are_refused(fasta):
    with pytest.raises(ValueError, match="part 'val' has no bases"):
        FastaWindows(fasta, length=32, train=["a"]).windows("val")


def test_tokens_per_batch(fasta):
    assert FastaWindows(fasta, length=63, tokens_per_batch=640).batch_size == 10


# Labelled


def table(path, n=60, **columns):
    texts = ["".join(np.random.default_rng(k).choice(list("ACGT"), 20 + k % 5)) for k in range(n)]
    columns = {"sequence": texts, **columns}
    lines = [",".join(columns)] + [",".join(str(v) for v in row) for row in zip(*columns.values())]
    path.write_text("\n".join(lines) + "\n")
    return str(path), texts


def test_classes(tmp_path):
    path, sequences = table(tmp_path / "t.csv", label=[("yes", "no")[k % 3 == 0] for k in range(60)])
    data = LabelledSequences(path, batch_size=60, val_share=0.2, test_share=0.2)
    assert (data.num_classes, data.classes) == (2, ["no", "yes"])
    assert [len(data.parts[part]) for part in ("train", "val", "test")] == [36, 12, 12]
    shares = [np.mean(data.labels[data.parts[part]]) for part in data.parts]
    assert shares == pytest.approx([2 / 3] * 3)  # stratified
    together = np.concatenate(list(data.parts.values()))
    assert sorted(together) == list(range(60))
    (batch,) = data.train_dataloader()
    assert batch.labels.dtype == torch.int64
    for text, label in zip(texts(batch, "acgt"), batch.labels):
        assert data.labels[sequences.index(text)] == label


def test_split_column_and_regression(tmp_path):
    split = ["train"] * 40 + ["valid"] * 10 + ["test"] * 10
    values = [str(k) if k % 7 else "" for k in range(60)]
    path, _ = table(tmp_path / "t.csv", fitness=values, split=split)
    data = LabelledSequences(path, label="fitness", split="split", task="regression")
    data.setup()
    known = data.labels[:40]
    assert np.nanmean(known) == pytest.approx(0, abs=1e-6)
    assert np.nanstd(known) == pytest.approx(1, abs=1e-6)
    assert np.isnan(data.labels).sum() == 9
    assert (data.num_classes, data.labels.dtype) == (1, np.float32)
    assert data.state()["mean"] == [pytest.approx(np.nanmean([float(v) if v else np.nan for v in values[:40]]))]


@pytest.mark.parametrize(("side", "expected"), [("right", "ACGTA"), ("left", "TACGG"), ("both", "CGTAC")])
def test_truncation(tmp_path, side, expected):
    (tmp_path / "t.csv").write_text("sequence,label\nACGTACGG,0\n" + "ACGT,1\n" * 9)
    data = LabelledSequences(str(tmp_path / "t.csv"), max_length=5, truncate=side)
    data.setup()
    assert data.sequences[0].decode() == expected


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("sequence,label\nACGX,0\n", {}, "row 1: expected IUPAC letters"),
        ("seq,label\nACG,0\n", {}, "has no column 'sequence'; it has seq, label"),
        ("sequence,label\nACG,0\nACG\n", {}, "line 3: expected 2 columns, got 1"),
        ("sequence,label\nACG,a\n", {"task": "regression"}, "must be numbers"),
        ("sequence,label\nA,0\nA,1\nA,2\n", {}, "task 'binary' with the classes"),
        ("", {}, "is empty"),
        ("sequence,label\n", {}, "has no rows"),
    ],
)
def test_bad_tables(tmp_path, text, options, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        LabelledSequences(str(tmp_path / "t.csv"), **options).setup()


# Synthetic


def test_synthetic_genes_are_genes():
    sequence, genes = synthetic_genome(50_000, seed=3)
    assert len(sequence) == 50_000
    reference = Reference.from_sequences({"synthetic": sequence})
    assert {gene.strand for gene in genes} == {"+", "-"}
    for gene in genes:
        protein = translate(reference.fetch_interval(gene.interval))
        assert protein.startswith("M")
        assert protein.endswith("*")
        assert protein.count("*") == 1
    assert sum(map(len, genes)) / 50_000 > 0.7
    assert synthetic_genome(50_000, seed=3)[0] == sequence


def test_synthetic_modules():
    data = SyntheticDNA(bases=5000, length=64, batch_size=4)
    assert next(iter(data.train_dataloader())).tokens.shape == (4, 65)
    for kind in ("coding", "promoter"):
        labels = SyntheticLabels(kind, samples=40, length=60)
        batch = next(iter(labels.train_dataloader()))
        assert batch.tokens.shape == (32, 60)
        assert labels.num_classes == 2
        assert 0.4 < batch.labels.float().mean() < 0.6


def test_overlapping_regions_of_one_part_are_fine():
    check_regions({"train": [Interval("a", 0, 9), Interval("a", 5, 10)], "val": []}, {"a": 10})


def test_real_genome(shared_data):
    path = shared_data / "genomics" / "ecoli_k12_mg1655" / "ecoli_k12_mg1655.fna.gz"
    data = FastaWindows(str(path), length=1024, train=0.85, val=0.05, test=0.1, circular=True, tokens_per_batch=8200)
    batch = next(iter(data.train_dataloader()))
    assert batch.tokens.shape == (8, 1025)
    assert data.parts["test"] == [Interval("U00096.2", 4_175_708, 4_639_675)]
