"""Classification, several labels and regression: losses and metrics against other libraries' formulas, and learning."""

import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from omnissm.genomics.data.batch import SequenceBatch
from omnissm.genomics.models import create_model, from_pretrained, save_pretrained
from omnissm.genomics.models.predictor import other_strand
from omnissm.genomics.sequence import encode, vocabulary
from omnissm.genomics.tasks import SequenceClassification, SequenceRegression, TokenClassification
from omnissm.ssmcore.training import export_checkpoint

LYRA = {"d_model": 16, "n_layer": 1, "n_conv": 1, "d_state": 8, "dropout": 0.0}


class Rows(pl.LightningDataModule):
    """The same batches for all parts."""

    def __init__(self, tokens, labels, size=32):
        super().__init__()
        mask = torch.ones_like(tokens, dtype=torch.bool)
        cut = range(0, len(tokens), size)
        self.batches = [SequenceBatch(tokens[k : k + size], mask[k : k + size], labels[k : k + size]) for k in cut]

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    val_dataloader = test_dataloader = train_dataloader


def trainer(folder, **options):
    return pl.Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip


def motif(rows=128, length=24):
    tokens = torch.randint(4, 8, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(rows) % 2
    tokens[labels == 1, 5:11] = torch.tensor([7, 4, 7, 4, 4, 7])
    return tokens, labels


def adam(groups):
    return torch.optim.AdamW(groups, lr=1e-2)


def auroc(score, label):
    """Share of pairs in the right order; ties count half."""
    difference = score[label == 1][:, None] - score[label == 0][None]
    return ((difference > 0).double() + 0.5 * (difference == 0)).mean().item()


def test_classes_are_learnt_and_saved(tmp_path):
    tokens, labels = motif()
    task = SequenceClassification("lyra", LYRA, optimizer=adam)
    run = trainer(tmp_path, max_epochs=15, num_sanity_val_steps=0)
    run.fit(task, Rows(tokens, labels))
    found = {name: value.item() for name, value in run.callback_metrics.items()}
    assert found["val/accuracy"] > 0.95
    assert found["val/mcc"] > 0.9
    assert found["val/auroc"] > 0.95
    run.save_checkpoint(tmp_path / "c.ckpt")
    model = from_pretrained(export_checkpoint(tmp_path / "c.ckpt", tmp_path / "model"))
    torch.testing.assert_close(model(tokens), task.net.eval()(tokens))


def test_metrics_of_classes_by_hand():
    torch.manual_seed(0)
    task = SequenceClassification("lyra", LYRA)
    y, labels = torch.randn(60, 2), torch.randint(2, (60,))
    found = {name: value.item() for name, value in task.metrics(y, labels).items()}
    chosen = y.argmax(1)
    tp, tn = ((chosen == k) & (labels == k) for k in (1, 0))
    fp, fn = (chosen == 1) & (labels == 0), (chosen == 0) & (labels == 1)
    a, b, c, d = (float(part.sum()) for part in (tp, tn, fp, fn))
    assert found["accuracy"] == pytest.approx((a + b) / 60)
    mcc = (a * b - c * d) / math.sqrt((a + c) * (a + d) * (b + c) * (b + d))
    assert found["mcc"] == pytest.approx(mcc, abs=1e-5)
    assert found["f1"] == pytest.approx((2 * a / (2 * a + c + d) + 2 * b / (2 * b + c + d)) / 2, abs=1e-5)
    assert found["auroc"] == pytest.approx(auroc(y[:, 1] - y[:, 0], labels), abs=1e-5)
    three = SequenceClassification("lyra", LYRA, num_classes=3)
    y, labels = torch.randn(60, 3), torch.randint(3, (60,))
    found = three.metrics(y, labels)
    expected = np.mean([auroc(y.softmax(1)[:, k], (labels == k).int()) for k in range(3)])
    assert found["auroc"].item() == pytest.approx(expected, abs=1e-5)


def test_several_labels():
    torch.manual_seed(0)
    task = SequenceClassification("lyra", LYRA, num_classes=3, multilabel=True, class_weights=[1.0, 2.0, 3.0])
    y = torch.randn(40, 3)
    bits = (torch.rand(40, 3) < 0.4).float()
    each = F.binary_cross_entropy_with_logits(y, bits, reduction="none").mean(0)
    torch.testing.assert_close(task.loss(y, bits), (each * torch.tensor([1.0, 2, 3])).sum() / 6)
    found = task.metrics(y, bits)
    assert found["auroc"].item() == pytest.approx(np.mean([auroc(y[:, k], bits[:, k]) for k in range(3)]), abs=1e-5)
    bits[:, 2] = 0  # nothing to rank: left out of the mean
    again = task.metrics(y, bits)["auroc"].item()
    assert again == pytest.approx(np.mean([auroc(y[:, k], bits[:, k]) for k in range(2)]), abs=1e-5)


def test_several_labels_with_gaps():
    torch.manual_seed(0)
    task = SequenceClassification("lyra", LYRA, num_classes=2, multilabel=True)
    y, bits = torch.randn(30, 2, requires_grad=True), (torch.rand(30, 2) < 0.4).float()
    bits[::3, 1] = math.nan
    there = bits.isfinite()
    loss = task.loss(y, bits)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(y[there], bits[there]))
    (gradient,) = torch.autograd.grad(loss, y)
    assert not gradient[~there].any()
    found = task.metrics(y.detach(), bits)
    expected = [auroc(y[there[:, k], k].detach(), bits[there[:, k], k]) for k in range(2)]
    assert found["auroc"].item() == pytest.approx(np.mean(expected), abs=1e-5)
    assert found["accuracy"].item() == pytest.approx(((y > 0) == (bits == 1))[there].float().mean().item())
    bits[:, 1] = math.nan
    assert task.metrics(y.detach(), bits)["auroc"].item() == pytest.approx(expected[0], abs=1e-5)


def test_batches_without_any_label_teach_nothing():
    y = torch.randn(3, 2, requires_grad=True)
    several = SequenceClassification("lyra", LYRA, num_classes=2, multilabel=True)
    losses = [task.loss(y, torch.full((3, 2), math.nan)) for task in (several, SequenceRegression("lyra", LYRA, 2))]
    bases = TokenClassification("hydra_dna_tiny", class_weights=[1.0, 2.0])
    losses.append(bases.loss(y[None], torch.full((1, 3), -100)))
    for loss in losses:
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, y)[0].any()
    labels = torch.tensor([[0, -100, 1]])
    expected = F.cross_entropy(y[[0, 2]], labels[0, [0, 2]], weight=torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(bases.loss(y[None], labels), expected)


def test_more_labelled_bases_than_float16_counts():
    task = TokenClassification("hydra_dna_tiny", num_classes=3)
    labels = torch.randint(3, (1, 70_000), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.float16):
        loss = task.loss(torch.zeros(1, 70_000, 3, dtype=torch.float16), labels)
    torch.testing.assert_close(loss.float(), torch.tensor(math.log(3)), rtol=1e-4, atol=0)


def test_values_with_gaps():
    task = SequenceRegression("lyra", LYRA, n_outputs=2)
    y = torch.randn(30, 2)
    labels = y + 0.5 * torch.randn(30, 2)
    labels[::3, 1] = math.nan
    there = labels.isfinite()
    torch.testing.assert_close(task.loss(y, labels), (y - labels)[there].square().mean())
    found = task.metrics(y, labels)
    expected = [np.corrcoef(y[there[:, k], k], labels[there[:, k], k])[0, 1] for k in range(2)]
    assert found["pearson"].item() == pytest.approx(np.mean(expected), abs=1e-5)
    ranks = [
        np.corrcoef(y[there[:, k], k].argsort().argsort(), labels[there[:, k], k].argsort().argsort())[0, 1]
        for k in range(2)
    ]
    assert found["spearman"].item() == pytest.approx(np.mean(ranks), abs=1e-5)
    with pytest.raises(ValueError, match=r"labels \(30, 2\) need n_outputs=2, got 1"):
        SequenceRegression("lyra", LYRA).loss(torch.randn(30, 1), labels)
    assert SequenceRegression("lyra", LYRA, loss_kind="mae").loss(torch.zeros(2, 1), torch.tensor([1.0, 3])) == 2


def test_evaluation_averages_strands(tmp_path):
    tokens, labels = motif(8)
    torch.manual_seed(0)
    task = SequenceClassification("hydra_dna_tiny", vocabulary="acgt", strands="both").eval()
    given = Rows(tokens, labels).batches[0]
    other = torch.tensor([0, 1, 2, 3, 7, 6, 5, 4])[tokens.flip(1)]
    torch.testing.assert_close(task(given), (task.net(tokens) + task.net(other)) / 2)
    assert not torch.allclose(task(given), task.net(tokens), atol=1e-4)
    task.train()
    torch.testing.assert_close(task(given), task.net(tokens))


@pytest.mark.parametrize("bos", [True, False])
def test_the_other_strand_is_read_as_its_own_sequence_would_be(bos):
    words = vocabulary("acgt")
    start = [words.bos] * bos
    rows = [[*start, *encode(bases, words), *[words.pad] * (5 - len(bases))] for bases in (b"AACGT", b"ACC")]
    tokens = torch.tensor(rows)
    tokens, mask, order = other_strand(tokens, "acgt", tokens != words.pad)
    expected = [[*start, *encode(b"ACGTT", words)], [words.pad, words.pad, *start, *encode(b"GGT", words)]]
    assert tokens.tolist() == expected
    assert mask.tolist() == [[token != words.pad for token in row] for row in expected]
    assert [tokens[k, order[k].argsort()].tolist()[: bos + n] for k, n in enumerate((5, 3))] == [
        [*start, *encode(b"TTGCA", words)], [*start, *encode(b"TGG", words)]
    ]  # fmt: skip


def test_classes_of_bases_are_averaged_over_strands_in_place():
    words = vocabulary("acgt")
    tokens = torch.tensor([[words.bos, 4, 5, 6, 7, 7, words.pad]])
    batch = SequenceBatch(tokens, tokens != words.pad, torch.zeros_like(tokens))
    torch.manual_seed(0)
    task = TokenClassification("hydra_dna_tiny", strands="both").eval()
    with torch.no_grad():
        alone, both = task.net(tokens, mask=batch.mask), task(batch)
        reverse = torch.tensor([[words.bos, 4, 4, 5, 6, 7]])  # AACGT
        other = task.net(reverse)
    torch.testing.assert_close(both[:, 1:6], (alone[:, 1:6] + other[:, 1:].flip(1)) / 2)
    torch.testing.assert_close(both[:, 0], (alone[:, 0] + other[:, 0]) / 2)


def test_head_on_a_language_model_trains_alone_if_frozen(tmp_path):
    tokens, labels = motif(64)
    task = SequenceClassification(
        "hnet_tiny", vocabulary="acgt", head_args={"freeze": True, "pool": "max"}, optimizer=adam
    )
    before = {name: p.clone() for name, p in task.net.backbone.named_parameters()}
    trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0).fit(task, Rows(tokens, labels))
    assert all(torch.equal(p, before[name]) for name, p in task.net.backbone.named_parameters())
    assert task.model_config()["model"] == "genomics/predictor"
    assert task.model_config()["task"] == {"kind": "SequenceClassification", "num_classes": 2, "multilabel": False}
    again = create_model("predictor", **task.model_config()["args"])
    assert again.backbone.vocab_size == 8


def test_fine_tuning_starts_from_a_language_model(tmp_path):
    torch.manual_seed(1)
    language = create_model("hybridna_tiny", vocabulary="acgt")
    save_pretrained(language, tmp_path / "lm")
    task = SequenceClassification(
        pretrained=str(tmp_path / "lm"),
        vocabulary="acgt",
        backbone_lr=0.1,
        head_args={"echo": "repeat"},
        optimizer=adam,
    )
    assert all(torch.equal(a, b) for a, b in zip(language.parameters(), task.net.backbone.parameters()))
    rates = {id(p): group["lr"] for group in task.configure_optimizers().param_groups for p in group["params"]}
    assert rates[id(task.net.head.weight)] == pytest.approx(1e-2)
    assert rates[id(task.net.backbone.backbone.main_network.norm.weight)] == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="set vocabulary: acgt in the data module"):
        SequenceClassification(pretrained=str(tmp_path / "lm"), vocabulary="byte")
    save_pretrained(task.net, tmp_path / "head")
    with pytest.raises(ValueError, match="holds a model with a head"):
        SequenceClassification(pretrained=str(tmp_path / "head"), vocabulary="acgt")
    with pytest.raises(FileNotFoundError):
        SequenceRegression(pretrained=str(tmp_path / "nothing"))


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"'lyra' has its own head; leave out head_args, got \['pool'\]"):
        SequenceClassification("lyra", head_args={"pool": "max"})
    with pytest.raises(ValueError, match="`class_weights` needs 2 entries, got 3"):
        SequenceClassification("lyra", class_weights=[1, 2, 3])
    with pytest.raises(ValueError, match=r"Unknown genomics model 'lira'\. Did you mean 'lyra'\?"):
        SequenceClassification("lira")
    with pytest.raises(ValueError, match="got 'rmse'"):
        SequenceRegression(loss_kind="rmse")
