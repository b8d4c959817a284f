"""Language model tasks: losses by hand, stage learning rates, sums over a whole part, and learning."""

import math

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from omnissm.genomics.data.batch import SequenceBatch
from omnissm.genomics.losses import IGNORE, blocked_cross_entropy, next_base_targets
from omnissm.genomics.models import create_model, from_pretrained
from omnissm.genomics.tasks import CausalLM, MaskedLM
from omnissm.ssmcore.chunking import ratio_loss
from omnissm.ssmcore.training import export_checkpoint

WORDS = ("ATG", "GCT", "GCG", "CTG", "AAA", "GAA", "GAT", "GGC", "ATT", "CGT", "TTC", "CAG")
CODONS = [list(word.encode()) for word in WORDS]
SMALL = {
    "arch_layout": ["m1", ["T1", ["T1"], "T1"], "m1"],
    "d_model": [32, 32, 32],
    "d_intermediate": [None, 128, 128],
    "ssm_cfg": {"d_state": 8},
    "attn_cfg": {"num_heads": [2, 2, 2], "rotary_emb_dim": [8, 8, 8], "window_size": [-1, -1, -1]},
    "target_ratios": [3.0, 2.0],
}


def coding(rows, length, seed=0):
    """Codons with unequal use (1/k), in frame; and the entropy per base."""
    generator = torch.Generator().manual_seed(seed)
    use = 1 / torch.arange(1, len(CODONS) + 1)
    drawn = torch.multinomial(use, rows * (length // 3 + 1), replacement=True, generator=generator)
    share = use / use.sum()
    entropy = -(share * share.log2()).sum().item() / 3
    return torch.tensor(CODONS)[drawn].view(rows, -1)[:, :length].contiguous(), entropy


def batch(tokens, **parts):
    return SequenceBatch(tokens, parts.pop("mask", torch.ones_like(tokens, dtype=torch.bool)), **parts)


class Rows(pl.LightningDataModule):
    """The same rows for training and validation."""

    def __init__(self, tokens, size=4, **parts):
        super().__init__()
        self.batches = [
            batch(tokens[k : k + size], **{n: p[k : k + size] for n, p in parts.items()})
            for k in range(0, len(tokens), size)
        ]

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    val_dataloader = test_dataloader = train_dataloader


def trainer(folder, **options):
    return pl.Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1.0, **options,
    )  # fmt: skip


def test_targets_are_bases_of_the_same_sequence():
    tokens = torch.tensor([list(b"ACNGTA"), [254, *b"CGT", 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    is_base = torch.zeros(256, dtype=torch.bool)
    is_base[list(b"ACGT")] = True
    targets = next_base_targets(tokens, mask, None, is_base)
    assert targets[0].tolist() == [ord("C"), IGNORE, *b"GTA", IGNORE]
    assert targets[1].tolist() == [*b"CGT", IGNORE, IGNORE, IGNORE]
    pieces = torch.tensor([[0, 0, 0, 1, 1, 2], [0] * 6])
    assert next_base_targets(tokens, mask, pieces, is_base)[0].tolist() == [
        ord("C"), IGNORE, IGNORE, ord("T"), IGNORE, IGNORE,
    ]  # fmt: skip


def test_blocks_give_the_same_loss_and_gradient():
    hidden = torch.randn(2, 50, 8, requires_grad=True)
    head = torch.nn.Linear(8, 20)
    targets = torch.randint(20, (2, 50))
    targets[0, :7] = IGNORE
    whole = blocked_cross_entropy(hidden, head, targets)
    assert not whole[0, :7].any()
    expected = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORE)
    torch.testing.assert_close(whole.flatten(), expected)
    (first,) = torch.autograd.grad(whole.sum(), hidden)
    (second,) = torch.autograd.grad(blocked_cross_entropy(hidden, head, targets, block=16).sum(), hidden)
    torch.testing.assert_close(first, second)


def test_loss_is_cross_entropy_plus_weighted_ratio_losses(tmp_path):
    tokens, _ = coding(2, 60)
    task = CausalLM("hnet_tiny", model_args={"ratio_weight": 0.5})
    trainer(tmp_path, fast_dev_run=1).fit(task, Rows(tokens))  # gives the task its trainer
    weight = torch.rand(2, 60)
    given = batch(tokens, weight=weight)
    hidden, found = task.net.hidden(tokens)
    nats = F.cross_entropy(task.net.lm_head(hidden)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    rate, mean = found[0].mask.float().mean(), found[0].prob.mean()
    ratio = 3 / 2 * (2 * rate * mean + (1 - rate) * (1 - mean))
    share = weight[:, :-1].flatten()
    task.log = task.log_dict = lambda *_, **__: None
    loss = task.training_step(given, 0)
    torch.testing.assert_close(loss, (nats * share).sum() / share.sum() + 0.5 * ratio)


def test_learning_rates_follow_the_stages():
    task = CausalLM("hnet", model_args=SMALL, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3))
    optimizer = task.configure_optimizers()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in task.net.named_parameters():
        factor = (6**0.5, 2**0.5, 1.0)[min(name.count("main_network."), 2)]
        assert rates[id(parameter)] == pytest.approx(1e-3 * factor), name
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(task.net.embeddings.weight)] == 0
    assert decay[id(task.net.backbone.encoder.blocks[0].mixer.in_proj.weight)] > 0
    assert decay[id(task.net.backbone.encoder.norm.weight)] == 0
    given = CausalLM("hnet", model_args=SMALL, lr_multipliers=[2.0, 1.5, 1.0])
    assert set(given.lr_scales().values()) == {2.0, 1.5, 1.0}
    with pytest.raises(ValueError, match="`lr_multipliers` needs 3 entries for 'hnet', got 2"):
        CausalLM("hnet", model_args=SMALL, lr_multipliers=[2.0, 1.0])


def test_metrics_are_means_over_all_bases(tmp_path):
    tokens, _ = coding(5, 40)
    mask = torch.arange(40) < torch.tensor([40, 10, 40, 3, 25])[:, None]
    weight = torch.where(torch.arange(40) < 8, 0.1, 1.0).expand(5, -1)
    task = CausalLM("hnet", model_args=SMALL)
    found = trainer(tmp_path).test(task, Rows(tokens, size=2, mask=mask, weight=weight), verbose=False)[0]
    nats = torch.cat(
        [F.cross_entropy(task.net(row[None, :n])[0, :-1], row[1:n], reduction="none")
         for row, n in zip(tokens, (40, 10, 40, 3, 25))]
    ).detach()  # fmt: skip
    soft = torch.cat([torch.arange(n - 1) < 8 for n in (40, 10, 40, 3, 25)])
    assert found["test/loss"] == pytest.approx(nats.mean().item(), rel=1e-5)
    assert found["test/bits_per_base"] == pytest.approx(nats.mean().item() / math.log(2), rel=1e-5)
    assert found["test/perplexity"] == pytest.approx(math.exp(nats.mean().item()), rel=1e-5)
    assert found["test/bits_per_base_soft"] == pytest.approx(nats[soft].mean().item() / math.log(2), rel=1e-5)
    assert found["test/bits_per_base_hard"] == pytest.approx(nats[~soft].mean().item() / math.log(2), rel=1e-5)
    stages = task.net.boundaries(tokens, mask=mask)
    for s, stage in enumerate(stages):
        rate = (stage.mask.sum() / stage.eligible.sum()).item()
        assert found[f"test/stage{s}/rate"] == pytest.approx(rate, rel=1e-5)
    assert found["test/chunk_length"] == pytest.approx((mask.sum() / stages[-1].mask.sum()).item(), rel=1e-5)


def test_masked_model_learns_from_labels_alone(tmp_path):
    tokens, _ = coding(2, 30)
    labels = torch.full_like(tokens, IGNORE)
    labels[:, ::5] = tokens[:, ::5]
    task = MaskedLM("hnet_tiny")
    nats, targets, _ = task.losses(batch(tokens.clone(), labels=labels))
    assert ((targets != IGNORE) == (labels != IGNORE)).all()
    assert (nats > 0).sum() == 12
    with pytest.raises(ValueError, match="objective: masked"):
        task.losses(batch(tokens))


def test_debug_model_learns_codons_and_its_rate_moves_to_the_target():
    """50 steps on one thread: from over 7 bits to within 0.3 of the entropy, one chunk per three bases."""
    torch.manual_seed(0)
    task = CausalLM("dnahnet_debug", optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05))
    task.log = task.log_dict = lambda *_, **__: None
    task._trainer = None
    optimizer = task.configure_optimizers()
    for step in range(50):
        tokens, entropy = coding(4, 128, seed=step)
        nats, targets, found = task.losses(batch(tokens))
        mean = nats.sum() / (targets != IGNORE).sum()
        loss = mean + task.net.ratio_weight * ratio_loss(found[0], 3)
        if step == 0:
            assert mean / math.log(2) > 7
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
    assert mean / math.log(2) < entropy + 0.3
    assert found[0].mask.float().mean().item() == pytest.approx(1 / 3, abs=0.12)


def test_fit_writes_a_model_folder_that_scores_alike(tmp_path):
    tokens, _ = coding(8, 60)
    task = CausalLM("hnet", model_args=SMALL, optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-3))
    run = trainer(tmp_path, max_epochs=4, num_sanity_val_steps=0)
    run.fit(task, Rows(tokens))
    first, last = 8.0, run.callback_metrics["val/bits_per_base"].item()
    assert last < first
    run.save_checkpoint(tmp_path / "last.ckpt")
    model = from_pretrained(export_checkpoint(tmp_path / "last.ckpt", tmp_path / "model"))
    assert model.config == task.net.config
    torch.testing.assert_close(model(tokens), task.net.eval()(tokens))


def test_collapse_is_said_once(caplog):
    task = CausalLM("hnet", model_args=SMALL)
    for _ in range(60):
        task._watch([0.99, 0.5])
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "Stage 0 begins a chunk at 99.0 %" in caplog.text
    assert "ratio_weight" in caplog.text


def test_vocabulary_comes_from_the_data():
    task = CausalLM("dnahnet_debug", vocabulary="acgt")
    assert task.net.vocab_size == 8
    assert task.is_base.nonzero()[:, 0].tolist() == [4, 5, 6, 7]
    assert create_model("dnahnet_debug", vocabulary="char").lm_head.weight.shape == (16, 128)
