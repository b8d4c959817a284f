"""The callback that keeps the best epoch of `Forecaster.fit`, and fits without a validation part."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from omnissm.__main__ import main
from omnissm.timeseries.fitting import BestEpoch
from omnissm.timeseries.forecast import load


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


def test_run_without_a_validation_part_keeps_its_last_weights(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    sizes = {"length": 120, "lookback": 12, "horizon": 4, "train": 0.8, "val": 0, "test": 0.2}
    options = {
        "model": {"class_path": "Forecasting", "init_args": {"model": "rlinear"}},
        "data": {"class_path": "Synthetic", "init_args": sizes},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
    }
    (tmp_path / "short.yaml").write_text(json.dumps(options))
    assert main(["timeseries", "fit", "-c", "short.yaml"]) == 0
    assert "model folder holds the last weights" in caplog.text
    last = torch.load("runs/short/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(load("runs/short").net.state_dict()["linear.weight"], last["net.linear.weight"])
    assert main(["timeseries", "test", "--run", "short"]) == 0
    capsys.readouterr()
    assert main(["timeseries", "validate", "--run", "short"]) == 2
    assert "no part 'val'" in capsys.readouterr().err
