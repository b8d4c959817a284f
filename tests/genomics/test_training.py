"""Schedules that end by steps, clock or plateau; curves of training; and what slows learning by heart."""

import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from omnissm.genomics import schedules
from omnissm.genomics.curves import TrainingCurve, plot_curves, read_curve
from omnissm.genomics.data import FastaWindows, SyntheticDNA
from omnissm.genomics.data.samplers import LengthSampler, SaveInside
from omnissm.genomics.models import create_model, from_pretrained, save_pretrained
from omnissm.genomics.schedules import AnnealOnPlateau, WarmupStableDecay
from omnissm.genomics.tasks import CausalLM
from omnissm.ssmcore.chunking import FixedRouter, chunk, dechunk
from omnissm.ssmcore.training import prepare_trainer

TINY = {
    "arch_layout": ["m1", ["T1"], "m1"],
    "d_model": [32, 32],
    "d_intermediate": [None, 128],
    "ssm_cfg": {"d_state": 8},
    "attn_cfg": {"num_heads": [2, 2], "rotary_emb_dim": [8, 8], "window_size": [-1, -1]},
}


def optimizer(rate=1.0):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def rates(schedule, steps):
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return found


def test_rate_rises_stays_and_falls_with_the_root():
    found = rates(WarmupStableDecay(optimizer(2.0), warmup=4, decay=0.5, final=0.1, total_steps=20), 21)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found[4:11] == pytest.approx([2.0] * 7)
    assert found[15] == pytest.approx(2 * (0.1 + 0.9 * (1 - math.sqrt(0.5))))
    assert found[20] == pytest.approx(0.2)


def test_rate_follows_the_clock_where_that_is_faster(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(schedules.time, "monotonic", lambda: now[0])
    schedule = WarmupStableDecay(optimizer(), warmup=0, decay=0.25, total_steps=1000, seconds=40.0)
    now[0] = 137.5  # three quarters of the way down after 37.5 of 40 seconds
    assert rates(schedule, 2)[1] == pytest.approx(1 - math.sqrt(0.75))
    saved = schedule.state_dict()
    now[0] = 1000.0  # another machine, another clock
    other = WarmupStableDecay(optimizer(), warmup=0, decay=0.25, total_steps=1000, seconds=40.0)
    other.load_state_dict(saved)
    assert other.over == pytest.approx(37.5 / 40)
    now[0] += 5
    assert other.over == 1.0
    assert rates(other, 2)[1] == 0.0


def test_descent_on_request_ends_after_its_steps():
    schedule = WarmupStableDecay(optimizer(), warmup=0, decay=0.2, total_steps=10**6)
    assert rates(schedule, 10) == [1.0] * 10
    schedule.descend(4)
    schedule.descend(100)  # the first counts
    assert rates(schedule, 5)[1:] == pytest.approx([1 - math.sqrt(k / 4) for k in (1, 2, 3, 4)])
    assert schedule.over == 1.0


@pytest.mark.parametrize("options", [{"warmup": -1}, {"decay": 0.0}, {"decay": 1.1}, {"final": -0.1}, {"seconds": 0.0}])
def test_schedule_refuses_numbers_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        WarmupStableDecay(optimizer(), **options)


def fit(tmp_path, callbacks, **options):
    data = SyntheticDNA(bases=6000, length=63, batch_size=4, epoch_size=40, train=0.8, val=0.1, test=0.1)
    task = CausalLM(
        "hnet", TINY,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        lr_scheduler=lambda o: WarmupStableDecay(o, warmup=2, decay=0.5),
    )  # fmt: skip
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False, num_sanity_val_steps=0,
        enable_checkpointing=False, enable_model_summary=False, callbacks=callbacks, check_val_every_n_epoch=None,
        max_epochs=-1, val_check_interval=5, **options,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    return trainer, task, data


def test_plateau_starts_the_descent_and_its_end_stops_the_run(tmp_path):
    # Nothing counts as better, so the second validation (step 10) begins a descent of 0.5 x 10 steps.
    trainer, _, _ = fit(tmp_path, [AnnealOnPlateau(patience=2, min_delta=1e9, share=0.5)], max_steps=400)
    schedule = trainer.lr_scheduler_configs[0].scheduler
    first, last = schedule.early
    assert first <= 15
    assert last - first in (5, 8)
    assert trainer.global_step == last
    assert schedule.over == 1.0


def test_plateau_needs_its_schedule(tmp_path):
    callback = AnnealOnPlateau()
    with pytest.raises(TypeError, match="WarmupStableDecay"):
        callback.on_train_batch_end(pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))


def test_curve_counts_bases_and_operations(tmp_path):
    path = tmp_path / "deep" / "curve.csv"
    _, task, data = fit(tmp_path, [TrainingCurve(str(path), test=True)], max_steps=10)
    rows = read_curve(path)
    assert [row["step"] for row in rows] == [5, 10]
    assert [row["bases"] for row in rows] == [5 * 4 * 64, 10 * 4 * 64]
    # Operations of each stretch at the rates measured at its end.
    expected = 0.0
    for row in rows:
        expected += task.net.flops(64, rates=[row["stage0_rate"]], mode="train") / 64 * 5 * 4 * 64
        assert row["flops"] == pytest.approx(expected)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (found,) = trainer.test(task, datamodule=data, verbose=False)
    assert rows[-1]["test_bits"] == pytest.approx(found["test/bits_per_base"], rel=1e-6)
    assert rows[-1]["val_bits"] > 0
    assert rows[-1]["seconds"] > rows[0]["seconds"]


def test_curve_goes_on_from_a_checkpoint():
    curve = TrainingCurve("curve.csv")
    curve.rows, curve.flops, curve._bases, curve._counted = [{"step": 5.0}], 3.0, torch.tensor(640), 640
    other = TrainingCurve("curve.csv")
    other.load_state_dict(curve.state_dict())
    assert other.rows == curve.rows
    assert other.flops == 3.0
    assert int(other._bases) == 640
    assert other._counted == 640


def test_plot_of_curves(tmp_path):
    rows = [{"flops": 1e12, "test_bits": 1.98}, {"flops": 1e13, "test_bits": 1.95}, {"flops": 2e13}]
    out = tmp_path / "curves.png"
    plot_curves({"a": rows, "b": rows[:2]}, out, lines={"Markov, order 7": 1.931})
    assert out.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="val_bits"):
        plot_curves({"a": rows}, out, metric="val_bits")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no curve"):
        read_curve(tmp_path / "other.csv")


def test_mutated_bases_are_read_and_the_true_ones_asked(tmp_path):
    (tmp_path / "a.fa").write_text(">a\n" + "ACGTTGCAAN" * 400 + "\n")
    options = {"length": 500, "batch_size": 8, "train": 1.0, "val": 0.0, "test": 0.0, "rc_prob": 0.0, "max_n_frac": 0.2}
    plain, noisy = (FastaWindows(str(tmp_path / "a.fa"), mutate=share, **options) for share in (0.0, 0.1))
    first, second = (data.windows("train").__getitems__(range(8)) for data in (plain, noisy))
    assert first.labels is None
    assert torch.equal(second.labels, first.tokens)
    changed = second.tokens != second.labels
    bases = torch.from_numpy(np.isin(first.tokens.numpy(), list(b"ACGT")))
    assert not (changed & ~bases).any()  # start ids and N stay
    assert changed[bases].double().mean().item() == pytest.approx(0.1, abs=0.02)  # 3,600 draws, sd 0.005
    assert set(second.tokens[changed].tolist()) <= set(b"ACGT")
    task = CausalLM("hnet", TINY)
    assert torch.equal(task.targets_of(first), task.targets_of(second))
    again = noisy.windows("train").__getitems__(range(8))
    assert torch.equal(second.tokens, again.tokens)
    with pytest.raises(ValueError, match="mutate"):
        FastaWindows("a.fa", mutate=1.0)


def test_dropout_acts_in_training_only_and_keeps_the_names(tmp_path):
    torch.manual_seed(0)
    model = create_model("hnet", **TINY, dropout=0.5)
    plain = create_model("hnet", **TINY)
    plain.load_state_dict(model.state_dict())
    tokens = torch.randint(65, 85, (2, 40))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), plain.eval()(tokens))
    folder = save_pretrained(model, tmp_path / "model")
    assert from_pretrained(folder).config["dropout"] == 0.5
    with pytest.raises(ValueError, match="dropout"):
        create_model("hnet", **TINY, dropout=1.0)


def test_means_of_chunks_stay_wide_under_autocast():
    torch.manual_seed(0)
    x = torch.randn(2, 30, 8)
    boundaries = FixedRouter(3)(x)
    z = torch.randn(2, 10, 8)
    exact, last = dechunk(z, boundaries, chunk(x, boundaries))
    with torch.autocast("cpu", torch.bfloat16):
        found, state = dechunk(z, boundaries, chunk(x, boundaries))
    assert found.dtype == state.dtype == torch.float32
    assert torch.equal(found, exact)
    assert torch.equal(state, last)


class Recorder(pl.Callback):
    """Keeps what training reads, and stops after some batches as a kill would."""

    def __init__(self, stop=None):
        self.seen, self.stop = [], stop

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.stop is not None and len(self.seen) == self.stop:
            raise RuntimeError("killed")
        self.seen.append((trainer.current_epoch, batch_idx, batch.tokens.clone()))


def run(folder, workers, recorder, ckpt_path=None, **options):
    data = SyntheticDNA(
        bases=6000, length=63, batch_size=4, epoch_size=40, num_workers=workers, train=0.8, val=0.1, test=0.1, **options
    )
    trainer = pl.Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=3,
        enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
        callbacks=[SaveInside(3), recorder],
    )  # fmt: skip
    prepare_trainer(trainer, folder, 0)
    trainer.fit(CausalLM("hnet", TINY), datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return recorder.seen


@pytest.mark.parametrize("options", [{}, {"length_schedule": [[0, 31], [12, 63], [20, 127]]}], ids=["fixed", "growing"])
def test_a_run_killed_inside_an_epoch_goes_on_with_the_same_batches(tmp_path, options):
    whole = run(tmp_path / "whole", 0, Recorder(), **options)
    assert [(epoch, k) for epoch, k, _ in whole] == [(epoch, k) for epoch in range(3) for k in range(10)]
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", 0, Recorder(stop=17), **options)  # in batch 7 of epoch 1; kept is what was after 15
    for workers in (0, 2):
        rest = run(tmp_path / "killed", workers, Recorder(), tmp_path / "killed" / "last.ckpt", **options)
        (tmp_path / "killed" / "last.ckpt").replace(tmp_path / "end.ckpt")
        assert [(epoch, k) for epoch, k, _ in rest] == [(epoch, k) for epoch, k, _ in whole[15:]]
        assert all(torch.equal(a, b) for (*_, a), (*_, b) in zip(rest, whole[15:], strict=True))
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path / "killed", workers, Recorder(stop=17), **options)


def test_windows_grow_and_batches_keep_their_positions():
    data = SyntheticDNA(
        bases=6000, length=63, batch_size=4, epoch_size=40, train=0.8, val=0.1, test=0.1,
        length_schedule=[[0, 31], [12, 127]],
    )  # fmt: skip
    loader = data.train_dataloader()
    assert len(loader) == 10
    assert {batch.tokens.shape for batch in loader} == {(8, 32)}
    loader.sampler.set_epoch(1)
    assert [batch.tokens.shape for batch in loader] == [(8, 32)] * 2 + [(2, 128)] * 8
    assert all(batch.tokens.shape[1] == 64 for batch in data.val_dataloader())
    ranks = [LengthSampler(data.windows("train"), [[0, 31]], 4, 63, 1, rank=k, world_size=2) for k in range(2)]
    drawn = [[number for _, numbers in sampler for number in numbers] for sampler in ranks]
    assert not set(drawn[0]) & set(drawn[1])
    assert len(drawn[0]) == len(drawn[1]) == 5 * 8


@pytest.mark.parametrize("schedule", [[[5, 100]], [[0, 100], [0, 50]], [[0, 1]], [[0]]])
def test_bad_length_schedules(schedule):
    with pytest.raises(ValueError, match="length_schedule"):
        FastaWindows("a.fa", length_schedule=schedule)
    with pytest.raises(ValueError, match="random windows"):
        FastaWindows("a.fa", length_schedule=[[0, 100]], sampling="tiled")
