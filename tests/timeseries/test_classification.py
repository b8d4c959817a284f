"""Classification: batches of unequal series, models that ignore padding, a task that learns, the verb."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch

from omnissm.__main__ import main
from omnissm.ssmcore.training import save_model_folder
from omnissm.timeseries import create_model, list_models
from omnissm.timeseries.classification import Classifier, create_metrics
from omnissm.timeseries.data import UEA, SyntheticClasses, SyntheticECG, create_ecg, create_waves
from omnissm.timeseries.labelled import LabelledSeries, labels_of, series_scaling
from omnissm.timeseries.loading import read_run
from omnissm.timeseries.models import CLASSIFIERS
from omnissm.timeseries.tasks import SeriesClassification
from omnissm.timeseries.ts_files import write_ts


@pytest.fixture(scope="module")
def waves():
    return create_waves(12, 3, 24, seed=1)


@pytest.fixture
def batch(waves):
    return LabelledSeries(waves, series_scaling(waves), labels_of(waves, ["x0", "x1", "x2"])).__getitems__(range(6))


def trainer(**options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(accelerator="cpu", **quiet, **options)


def test_batches_hold_what_the_data_hold(waves, batch):
    assert batch.x.shape == (6, 3, int(waves["length"][:6].max()))
    np.testing.assert_array_equal(batch.steps.sum(1), waves["length"][:6])
    assert batch.label.tolist() == [0, 1, 2, 0, 1, 2]
    assert not batch.x[~batch.x_mask].any()
    scaled = waves["target"].values[0].T
    mean, scale = series_scaling(waves)
    expected = ((scaled - mean[:, None]) / scale[:, None])[:, : batch.x.shape[2]]
    np.testing.assert_allclose(batch.x[0][batch.x_mask[0]], expected[np.isfinite(expected)], rtol=1e-5)


@pytest.mark.parametrize("name", sorted(CLASSIFIERS))
class TestEveryClassifier:
    def test_logits_do_not_see_what_stands_behind_the_end(self, name, batch):
        torch.manual_seed(0)
        model = create_model(name, task="classification", n_variates=3, num_classes=4).eval()
        y = model(batch)
        assert y.shape == (6, 4)
        longer = {
            "x": torch.cat([batch.x, torch.full_like(batch.x, 9.0)], -1),
            "x_mask": torch.cat([batch.x_mask, torch.zeros_like(batch.x_mask)], -1),
            "steps": torch.cat([batch.steps, torch.zeros_like(batch.steps)], -1),
        }
        torch.testing.assert_close(model(batch._replace(**longer)), y, rtol=1e-4, atol=1e-5)

    def test_gradients_reach_every_parameter(self, name, batch):
        torch.manual_seed(0)
        model = create_model(name, task="classification", n_variates=3, num_classes=4)
        model(batch).square().sum().backward()
        assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []

    def test_other_variates_are_refused(self, name, batch):
        model = create_model(name, task="classification", n_variates=2, num_classes=4)
        with pytest.raises(ValueError, match="built for 2 variates, the data has 3"):
            model(batch)


def test_learns_which_wave_leads_and_saves_what_it_knows(tmp_path, capsys):
    torch.manual_seed(0)
    data = SyntheticClasses(val=0, batch_size=16)
    task = SeriesClassification(
        "sequence_classifier", {"n_layer": 1}, 3, 3, optimizer=functools.partial(torch.optim.AdamW, lr=1e-2)
    )
    run = trainer(max_epochs=5, limit_val_batches=0)
    run.fit(task, datamodule=data)
    found = run.test(task, datamodule=data, verbose=False)[0]
    assert found["test/accuracy"] > 0.9
    files = task.export_files()
    save_model_folder(tmp_path / "model", task.net.state_dict(), task.model_config(), files)
    frame = Classifier.load(tmp_path / "model").predict(data.parts["test"])
    assert (frame["label"] == frame["predicted"]).mean() == pytest.approx(found["test/accuracy"])
    np.testing.assert_allclose(frame[["p_x0", "p_x1", "p_x2"]].sum(axis=1), 1, rtol=1e-5)
    write_ts(data.parts["test"], tmp_path / "test.ts")
    with pytest.raises(ValueError, match="a model for classification"):
        read_run(tmp_path / "model", "imputation")
    words = ["timeseries", "classify", "--checkpoint", tmp_path / "model", "--data", tmp_path / "test.ts"]
    assert main([*map(str, words), "--out", str(tmp_path / "out.csv")]) == 0
    assert f"accuracy {found['test/accuracy']:.4f} of 96 series" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "out.csv")["predicted"].tolist() == frame["predicted"].tolist()


def test_ecg_records_are_recognised_and_leads_agree():
    ds = create_ecg(20, seconds=2)
    lead = {name: ds["target"].sel(variate=name).values for name in ds["variate"].values}
    np.testing.assert_allclose(lead["III"], lead["II"] - lead["I"], atol=1e-5)
    np.testing.assert_allclose(lead["aVR"] + lead["aVL"] + lead["aVF"], 0 * lead["I"], atol=1e-5)
    torch.manual_seed(0)
    data = SyntheticECG(train_records=96, test_records=64, seconds=2.5, val=0, batch_size=16)
    task = SeriesClassification(
        "ecg_mamba",
        {"d_model": 32, "n_layer": 1},
        12,
        5,
        multilabel=True,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-2),
    )
    run = trainer(max_epochs=8, limit_val_batches=0)
    run.fit(task, datamodule=data)
    assert run.test(task, datamodule=data, verbose=False)[0]["test/auroc"] > 0.8


def test_metrics_against_counts():
    metrics = create_metrics(3)
    metrics.update(torch.eye(3)[[0, 0, 1, 2, 2, 1]], torch.tensor([0, 0, 1, 1, 2, 0]))
    found = {name: float(value) for name, value in metrics.compute().items()}
    recall, precision = np.array([2 / 3, 1 / 2, 1]), np.array([1, 1 / 2, 1 / 2])
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["balanced_accuracy"] == pytest.approx(recall.mean())
    assert found["f1"] == pytest.approx((2 * recall * precision / (recall + precision)).mean())


def test_validation_series_are_no_training_series(tmp_path):
    for part in ("TRAIN", "TEST"):
        write_ts(create_waves(15, 3, 20, seed=len(part)), tmp_path / f"waves_{part}.ts")
    data = UEA(str(tmp_path), "waves", val=0.2)
    train, val = (set(data.parts[part]["series"].values) for part in ("train", "val"))
    assert len(train) == 12
    assert len(val) == 3
    assert not train & val
    assert sorted(data.parts["val"]["label"].values) == ["x0", "x1", "x2"]
    with pytest.raises(FileNotFoundError, match="timeseriesclassification"):
        UEA(str(tmp_path), "other").read("train")


def test_no_epoch_is_chosen_by_the_test_series(tmp_path, monkeypatch, capsys):
    """Without series held out nothing is validated, and the last weights are the model."""
    monkeypatch.chdir(tmp_path)
    words = ["-c", "timeseries/sequence_classifier_waves", "--run", "waves", "--data.init_args.val", "0"]
    small = ["--data.init_args.train_series", "12", "--data.init_args.test_series", "12", "--trainer.max_epochs", "2"]
    assert main(["timeseries", "fit", *words, *small]) == 0
    checkpoints = {path.name for path in Path("runs/waves/checkpoints").iterdir()}
    assert "last.ckpt" in checkpoints
    assert "best.ckpt" not in checkpoints
    assert (tmp_path / "runs/waves/model/config.json").is_file()
    assert main(["timeseries", "test", "--run", "waves"]) == 0
    capsys.readouterr()
    assert main(["timeseries", "validate", "--run", "waves"]) == 2
    assert "there is no part 'val'" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_find_the_metrics_of_one(tmp_path, monkeypatch):
    """The loss too, which chooses epochs and stops early."""
    monkeypatch.chdir(tmp_path)
    quiet = ["--trainer.enable_progress_bar", "false"]
    words = ["timeseries", "fit", "-c", "timeseries/sequence_classifier_waves", "--run", "waves", *quiet]
    assert main([*words, "--trainer.max_epochs", "1"]) == 0

    def validated(*more):
        command = [sys.executable, "-m", "omnissm", "timeseries", "validate", "--run", "waves", *quiet, *more]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=110)
        return json.loads((tmp_path / "runs" / "waves" / "metrics.json").read_text())["metrics"]

    one = validated()
    two = validated("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    assert two == pytest.approx(one, rel=1e-5)


def test_empty_synthetic_sets_are_refused():
    with pytest.raises(ValueError, match="at least 1 record"):
        create_ecg(4, rate=0)
    with pytest.raises(ValueError, match="at least 1 series"):
        create_waves(0, 3, 20)


def test_kind_of_labels_is_that_of_the_task():
    one, several = (torch.tensor([0, 1]), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
    single, multiple = (
        SeriesClassification("sequence_classifier", {"n_layer": 1}, 2, 3, flag) for flag in (False, True)
    )
    with pytest.raises(ValueError, match=r"flags of several classes .* set multilabel: true"):
        single.loss(torch.zeros(2, 3), several)
    with pytest.raises(ValueError, match=r"one class .* set multilabel: false"):
        multiple.loss(torch.zeros(2, 3), one)
    assert float(single.loss(torch.zeros(2, 3), one)) == pytest.approx(np.log(3))
    assert float(multiple.loss(torch.zeros(2, 3), several)) == pytest.approx(np.log(2))
    with pytest.raises(ValueError, match="label_smoothing is a share"):
        SeriesClassification("sequence_classifier", None, 2, 3, label_smoothing=2)


def test_names_of_other_tasks_are_pointed_out():
    assert "sequence_classifier" in list_models(task="classification")
    with pytest.raises(ValueError, match="'rlinear' is a model for forecasting"):
        create_model("rlinear", task="classification", n_variates=1, num_classes=2)
