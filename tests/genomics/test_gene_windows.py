"""Windows around genes and with a class for every base, and the task that learns such classes."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from omnissm.genomics.annotation import Feature, write_gff3
from omnissm.genomics.data import AnnotatedWindows, GeneWindows, SequenceBatch, synthetic_genome
from omnissm.genomics.models import create_model
from omnissm.genomics.sequence import decode, reverse_complement
from omnissm.genomics.tasks import TokenClassification

RNG = np.random.default_rng(3)
TEXT = "".join(RNG.choice(list("ACGT"), 1000))
GENES = [
    Feature("c", 100, 160, "+", "CDS", "one", (), {"essential": "yes"}),
    Feature("c", 300, 390, "-", "CDS", "two", (), {"essential": "no"}),
    Feature("c", 5, 35, "+", "CDS", "edge", (), {"essential": "no"}),
    Feature("c", 780, 820, "+", "CDS", "across the border", (), {"essential": "yes"}),
    Feature("c", 900, 960, "-", "CDS", "test", (), {"essential": "yes"}),
    Feature("c", 120, 130, "+", "tRNA", "inside"),
    Feature("c", 500, 520, "+", "CDS", "no label"),
]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "c.fa").write_text(f">c\n{TEXT}\n")
    write_gff3(tmp_path / "c.gff3", GENES)
    return str(tmp_path / "c.fa"), str(tmp_path / "c.gff3")


def texts(batch):
    return [decode(row[mask], "byte") for row, mask in zip(batch.tokens.numpy(), batch.mask.numpy())]


SPLIT = {"train": ["c:1-600"], "val": ["c:601-800"], "test": ["c:801-1000"]}


def test_windows_are_centred_and_read_with_the_gene(files):
    data = GeneWindows(*files, length=100, batch_size=8, bos=False, **SPLIT)
    found = texts(data.windows("train").__getitems__(range(4)))
    assert found[0] == TEXT[80:180]
    assert found[1] == reverse_complement(TEXT[295:395]).decode()
    assert found[2] == TEXT[0:100]  # moved to the contig's start
    assert texts(data.windows("test").__getitems__([0])) == [reverse_complement(TEXT[880:980]).decode()]
    with pytest.raises(ValueError, match="no gene"):  # the one across the border belongs to no part
        data.windows("val")
    rows = [text for batch in data.train_dataloader() for text in texts(batch)]
    assert sorted(rows) == sorted(found)


def test_windows_of_genes_go_round_a_ring(files):
    data = GeneWindows(*files, length=100, circular=True, bos=False, train=["c"], val=[], test=[])
    assert texts(data.windows("train").__getitems__([2])) == [TEXT[-30:] + TEXT[:70]]


def test_labels_of_genes(files):
    data = GeneWindows(*files, length=64, label="essential", **SPLIT)
    assert data.num_classes == 2
    assert data.classes == ["no", "yes"]
    batch = data.windows("train").__getitems__(range(3))
    assert batch.labels.tolist() == [1, 0, 0]
    assert data.state()["classes"] == ["no", "yes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pack": True}, "pack"), ({"gene_type": "exon"}, "exon"), ({"label": "none"}, "none")],
)
def test_gene_windows_refuse(files, options, message):
    with pytest.raises(ValueError, match=message):
        GeneWindows(*files, **SPLIT, **options).setup()


def test_classes_of_bases_follow_the_annotation(files):
    data = AnnotatedWindows(*files, ["CDS", "tRNA"], length=100, batch_size=2, rc_prob=0.5, **SPLIT)
    assert data.num_classes == 3
    truth = np.zeros(1000, int)
    for gene in GENES:
        if gene.type == "CDS":
            truth[gene.start : gene.end] = 1
    truth[120:130] = 2  # the later class counts
    windows = data.windows("train")
    flipped = set()
    for number in range(20):
        batch = windows.__getitems__([number])
        (place,), (flip,), _ = windows.window(number)
        flipped.add(flip)
        expected = truth[place.start : place.end]
        expected = expected[::-1] if flip else expected
        assert batch.labels[0].tolist() == [-100, *expected.tolist()]
    assert flipped == {True, False}
    tiles = [batch.labels[:, 1:] for batch in data.test_dataloader()]
    assert torch.cat([tile.flatten() for tile in tiles]).tolist() == truth[800:].tolist()


def test_stranded_classes_are_of_the_strand_that_is_read(files):
    data = AnnotatedWindows(*files, ["CDS"], stranded=True, length=1000, train=["c"], val=[], test=[])
    data.setup()
    place = data.parts["train"][0]
    forward, reverse = data.classes_at(place, False), data.classes_at(place, True)
    assert forward[100:160].all()
    assert not forward[300:390].any()
    assert reverse[::-1][300:390].all()
    assert not reverse[::-1][100:160].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": []}, "at least one"),
        ({"classes": ["exon"]}, "exon"),
        ({"classes": ["CDS"], "mutate": 0.1}, "mutate"),
    ],
)
def test_annotated_windows_refuse(files, options, message):
    with pytest.raises(ValueError, match=message):
        AnnotatedWindows(*files, **SPLIT, **options).setup()


def test_loss_counts_labelled_bases_only():
    torch.manual_seed(0)
    task = TokenClassification("hydra_dna_tiny", num_classes=3, class_weights=[1.0, 2.0, 3.0])
    tokens = torch.randint(4, 8, (2, 12))
    labels = torch.randint(3, (2, 12))
    labels[0, :5] = -100
    y = task(SequenceBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), labels))
    assert y.shape == (2, 12, 3)
    asked = labels >= 0
    each = F.cross_entropy(y[asked], labels[asked], reduction="none")
    weight = torch.tensor([1.0, 2.0, 3.0])[labels[asked]]
    assert task.loss(y, labels).item() == pytest.approx(((each * weight).sum() / weight.sum()).item(), rel=1e-5)


def test_both_strands_agree_for_flipped_input():
    torch.manual_seed(0)
    task = TokenClassification("hydra_dna_tiny", num_classes=2, strands="both").eval()
    tokens = torch.randint(4, 8, (1, 20))
    other = (11 - tokens).flip(1)  # ids of A, C, G and T are 4 to 7
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        one, two = (task(SequenceBatch(t, mask)) for t in (tokens, other))
    torch.testing.assert_close(one, two.flip(1), rtol=1e-5, atol=1e-6)
    equivariant = create_model("predictor", model="caduceus_ps_1k", n_outputs=2, pool="none")
    ids = torch.randint(7, 11, (1, 16))  # of the vocabulary char
    with torch.no_grad():
        first, second = equivariant.eval()(ids), equivariant((17 - ids).flip(1))
    torch.testing.assert_close(first, second.flip(1), rtol=1e-4, atol=1e-5)


def test_repeated_copy_lets_a_causal_model_see_what_follows():
    torch.manual_seed(0)
    model = create_model(
        "predictor", model="hybridna_tiny", n_outputs=2, pool="none", echo="repeat", model_args={"vocabulary": "byte"}
    ).eval()
    tokens = torch.randint(65, 85, (1, 16))
    other = tokens.clone()
    other[0, -1] = 90
    with torch.no_grad():
        assert not torch.equal(model(tokens)[:, 0], model(other)[:, 0])
    with pytest.raises(ValueError, match="every position"):
        create_model("predictor", model="hnet_tiny", n_outputs=2, pool="none", echo="strand")


@pytest.mark.parametrize("options", [{"model": "lyra"}, {"head_args": {"pool": "mean"}}])
def test_task_of_bases_refuses_pooling(options):
    with pytest.raises(ValueError, match="pool: none"):
        TokenClassification(**options)


@pytest.mark.slow
def test_learns_where_genes_are(tmp_path):
    """Coding bases with unequal codon use against a uniform background, on both strands."""
    sequence, genes = synthetic_genome(16_000, coding=0.5, spread=0.05)
    (tmp_path / "s.fa").write_bytes(b">synthetic\n" + sequence + b"\n")
    write_gff3(tmp_path / "s.gff3", genes)
    data = AnnotatedWindows(
        str(tmp_path / "s.fa"), str(tmp_path / "s.gff3"), ["CDS"], length=256, batch_size=8, vocabulary="acgt",
        bos=False, train=0.8, val=0.0, test=0.2, epoch_size=160,
    )  # fmt: skip
    torch.manual_seed(0)
    task = TokenClassification("hydra_dna_tiny", optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-3))
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=2,
        enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    (found,) = trainer.test(task, datamodule=data, verbose=False)
    assert found["test/auroc"] > 0.8
    assert found["test/mcc"] > 0.3
