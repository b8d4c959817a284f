"""The callback that keeps the best epoch of `Forecaster.fit`."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from omnissm.timeseries.fitting import BestEpoch


def follow(patience, losses):
    """Epochs with these validation losses (None: not validated); the weight of epoch k is k."""
    best = BestEpoch(patience, lambda *_: None)
    net = nn.Linear(1, 1, bias=False)
    trainer = SimpleNamespace(should_stop=False, callback_metrics={}, current_epoch=0)
    for epoch, loss in enumerate(losses):
        trainer.current_epoch = epoch
        nn.init.constant_(net.weight, epoch)
        best.on_train_epoch_start(trainer, net)
        trainer.callback_metrics["train/loss"] = torch.tensor(9.0)
        if loss is not None:
            trainer.callback_metrics["val/loss"] = torch.tensor(loss)  # stays there in later epochs, as in the trainer
            best.on_validation_epoch_end(trainer, net)
        best.on_train_epoch_end(trainer, net)
        if trainer.should_stop:
            break
    return best


@pytest.mark.parametrize(("patience", "epochs"), [(None, 9), (2, 6), (3, 6), (4, 9), (7, 9)])
def test_only_validated_epochs_count(patience, epochs):
    best = follow(patience, [None, None, 1.0, None, None, 2.0, None, None, 1.5])
    assert len(best.rows) == epochs
    assert [row["epoch"] for row in best.rows if "val_loss" in row] == [2, 5, 8][: epochs // 3]
    assert all(row["train_loss"] == 9.0 for row in best.rows)
    assert best.weights["weight"].item() == 2


def test_every_epoch_validated():
    best = follow(2, [3.0, 2.0, 2.5, 1.0, 1.5, 1.0, 0.5])
    assert len(best.rows) == 6  # two epochs after the best without improvement
    assert best.weights["weight"].item() == 3
