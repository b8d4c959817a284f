"""The base task: optimiser and schedule from callables, stops that name the batch, averaged weights."""

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from omnissm.ssmcore.mixers import Chimera2D
from omnissm.ssmcore.training import EMA, NonFiniteError, SSMData, SSMTask, WarmupCosine, callbacks, prepare_trainer


class Mean(SSMTask):
    """Learns the mean of its batches."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.net = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        x = batch[0]
        return (self.net(x) - x.sum(dim=1, keepdim=True)).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))


class Batches(SSMData):
    def __init__(self, x) -> None:
        super().__init__()
        self.x = x

    def train_dataloader(self):
        return self.create_loader(torch.utils.data.TensorDataset(self.x), 4)

    def val_dataloader(self):
        return self.train_dataloader()


def sgd(lr=0.1):
    return lambda groups: torch.optim.SGD(groups, lr=lr)


def trainer(tmp_path, seconds=0.0, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    options = {"max_epochs": 2, "enable_checkpointing": False, **quiet, **options}
    run = pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, **options)
    return prepare_trainer(run, tmp_path, seconds=seconds)


@pytest.mark.parametrize(("seconds", "kept"), [(0.0, [0, 1, 2, 3, 4]), (25.0, [0, 0, 0, 3, 3]), (1e9, [0] * 5)])
def test_states_are_as_far_apart_as_asked(seconds, kept, tmp_path, monkeypatch):
    """By a clock on which an epoch takes ten seconds; the end is kept in any case."""
    clock, found = [0.0], []
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    class Watch(pl.Callback):
        def on_train_epoch_end(self, run, *_):
            clock[0] += 10
            point = next(callback for callback in run.callbacks if isinstance(callback, callbacks.ResumePoint))
            found.append((torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"], point.epoch))

    run = trainer(tmp_path, seconds, max_epochs=5, callbacks=[Watch()])
    run.fit(Mean(optimizer=sgd()), Batches(torch.randn(8, 2)))
    assert found == [(epoch, epoch) for epoch in kept]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 10


def test_seconds_between_states_are_checked(tmp_path):
    with pytest.raises(ValueError, match="must be at least 0, got nan"):
        trainer(tmp_path, seconds=float("nan"))


def test_schedule_knows_the_planned_steps(tmp_path):
    task = Mean(optimizer=sgd(), lr_scheduler=WarmupCosine)
    run = trainer(tmp_path, max_epochs=3, accumulate_grad_batches=2)
    run.fit(task, Batches(torch.randn(16, 2)))
    scheduler = task.lr_schedulers()
    assert scheduler.total_steps == 6  # 3 epochs of 4 batches, two per step
    assert scheduler.get_last_lr() == pytest.approx([0.0, 0.0], abs=1e-12)


def test_planned_schedule_of_an_endless_run_is_refused(tmp_path):
    endless = {"max_epochs": -1, "max_time": {"seconds": 0}}
    with pytest.raises(ValueError, match=r"WarmupCosine plans.*no end. Set trainer.max_epochs or .*total_steps"):
        trainer(tmp_path, **endless).fit(Mean(lr_scheduler=WarmupCosine), Batches(torch.randn(8, 2)))
    task = Mean(lr_scheduler=lambda optimizer: WarmupCosine(optimizer, total_steps=7))
    trainer(tmp_path, **endless).fit(task, Batches(torch.randn(8, 2)))
    assert task.lr_schedulers().total_steps == 7


def test_planned_schedule_of_data_without_a_length_takes_max_steps(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.randn(2, 2),)] * 4)

    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    with pytest.raises(ValueError, match=r"WarmupCosine plans.*data have no length. Set trainer.max_steps, or .*total"):
        trainer(tmp_path, max_epochs=2).fit(Mean(lr_scheduler=WarmupCosine), loader)
    task = Mean(lr_scheduler=WarmupCosine)
    trainer(tmp_path, max_epochs=2, max_steps=8).fit(task, loader)
    assert task.lr_schedulers().total_steps == 8


def test_plateau_schedule_watches_the_monitored_metric(tmp_path):
    task = Mean(optimizer=sgd(), lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    run = trainer(tmp_path)
    run.fit(task, Batches(torch.randn(8, 2)))
    assert run.lr_scheduler_configs[0].monitor == "val/loss"


def test_loss_that_is_not_finite_names_its_batch(tmp_path):
    x = torch.randn(16, 2)
    x[9] = torch.inf
    with pytest.raises(NonFiniteError, match=r"loss is (nan|inf) at epoch 0, batch 2 \(step 2\).*learning rate"):
        trainer(tmp_path, num_sanity_val_steps=0).fit(Mean(optimizer=sgd()), Batches(x))
    kept = torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    assert kept["global_step"] == 2


class Root(Mean):
    """Finite loss, infinite gradient at zero."""

    def training_step(self, batch, batch_idx):
        return (self.net.weight * 0).sum().abs().sqrt()


def test_gradient_that_is_not_finite_names_its_parameter(tmp_path):
    task = Root(optimizer=sgd())
    before = task.net.weight.detach().clone()
    with pytest.raises(NonFiniteError, match=r"gradient of `net.weight` is not finite at epoch 0, batch 0"):
        trainer(tmp_path, limit_val_batches=0).fit(task, Batches(torch.randn(8, 2)))
    assert torch.equal(task.net.weight, before)
    trainer(tmp_path, limit_val_batches=0).fit(Root(optimizer=sgd(), check_finite=False), Batches(torch.randn(8, 2)))


def test_average_is_what_is_validated_saved_and_left(tmp_path):
    """Against the recurrence average <- decay * average + (1 - decay) * weights, after every step."""
    raw, validated = [], []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, task, *_):
            raw.append(task.net.weight.detach().clone())

        def on_validation_batch_start(self, trainer, task, *_):
            validated.append(task.net.weight.detach().clone())

    task = Mean(optimizer=sgd(0.3))
    run = trainer(tmp_path, callbacks=[Watch(), EMA(decay=0.8)], num_sanity_val_steps=0, max_epochs=1)
    run.fit(task, Batches(torch.randn(16, 2)))
    average = raw[0]
    for weight in raw[1:]:
        average = 0.8 * average + 0.2 * weight
    torch.testing.assert_close(validated[-1], average)
    torch.testing.assert_close(task.net.weight.detach(), average)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    torch.testing.assert_close(saved["state_dict"]["net.weight"], average)
    torch.testing.assert_close(saved["current_model_state"]["net.weight"], raw[-1])


def test_average_warms_up(tmp_path):
    raw, task = [], Mean(optimizer=sgd(0.3))

    class Watch(pl.Callback):
        def on_train_batch_end(self, run, module, *_):
            raw.append(module.net.weight.detach().clone())

    run = trainer(tmp_path, callbacks=[Watch(), EMA(decay=0.25, warmup=True)], limit_val_batches=0, max_epochs=1)
    run.fit(task, Batches(torch.randn(24, 2)))
    average = raw[0]
    for weight, decay in zip(raw[1:], (2 / 11, 3 / 12, 0.25, 0.25, 0.25), strict=True):
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(task.net.weight.detach(), average)


@pytest.mark.parametrize("wrong", [{"decay": 1.5}, {"decay": float("nan")}, {"every_n_steps": 0}, {"start_step": -1}])
def test_averages_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\], every_n_steps be at least 1 and start_step not"):
        EMA(**wrong)


def test_average_lies_where_the_training_runs(device):
    task, average = Mean(optimizer=sgd()), EMA()
    run = pl.Trainer(accelerator=device.type, devices=1, logger=False, enable_checkpointing=False)
    average.setup(run, task, "fit")
    assert {p.device.type for p in average._average_model.parameters()} == {device.type}


def test_checkpoint_says_what_to_build(tmp_path):
    trainer(tmp_path).fit(Mean(optimizer=sgd()), Batches(torch.randn(8, 2)))
    about = torch.load(tmp_path / "last.ckpt", weights_only=True)["omnissm"]
    assert about["config"]["model"] == "torch.nn.modules.linear.Linear"
    assert about["files"] == {}


class Grid(SSMTask):
    """A mixer over one grid per sample."""

    def __init__(self) -> None:
        super().__init__(sgd())
        self.net = Chimera2D(4, d_state=2)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).float().square().mean()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_recurrence_stays_float32(tmp_path, precision):
    task = Grid()
    before = {name: p.detach().clone() for name, p in task.net.named_parameters()}
    trainer(tmp_path, max_steps=1, precision=precision, limit_val_batches=0).fit(task, Batches(torch.randn(4, 2, 5, 4)))
    for name in task.net.no_decay_names():
        parameter = task.net.get_parameter(name)
        assert parameter.dtype == torch.float32
    assert any(not torch.equal(p, before[name]) for name, p in task.net.named_parameters())


@pytest.mark.slow
def test_compile_keeps_names_and_values(tmp_path):
    x = torch.randn(8, 2)
    torch.manual_seed(0)
    plain, compiled = Mean(optimizer=sgd()), Mean(optimizer=sgd(), compile=True)
    compiled.load_state_dict(plain.state_dict())
    for task in (plain, compiled):
        trainer(tmp_path).fit(task, Batches(x))
    torch.testing.assert_close(plain.state_dict(), compiled.state_dict())
