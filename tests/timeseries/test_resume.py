"""A run killed in the middle of an epoch and resumed ends with the weights of one that was not, to the last bit."""

import pytest
import torch

from omnissm.__main__ import main
from omnissm.timeseries.tasks import Imputation, SeriesClassification


@pytest.mark.parametrize(
    ("task", "config", "options"),
    [
        (Imputation, "sequence_imputer_blackout", ["--data.init_args.length", "200"]),
        (SeriesClassification, "sequence_classifier_waves", ["--data.init_args.train_series", "48"]),
    ],
)
def test_killed_runs_go_on(task, config, options, tmp_path, monkeypatch):
    """What an imputer hides in training is drawn anew in each step; it must be drawn the same."""
    monkeypatch.chdir(tmp_path)
    words = ["timeseries", "fit", "-c", f"timeseries/{config}", *options, "--trainer.max_epochs", "2"]
    assert main([*words, "--run", "whole"]) == 0
    training_step = task.training_step

    def killed(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (1, 1):
            raise SystemError("killed")
        return training_step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(task, "training_step", killed)
        with pytest.raises(SystemError, match="killed"):
            main([*words, "--run", "parts"])
    assert main(["timeseries", "fit", "--run", "parts", "--resume"]) == 0
    whole, parts = (torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True) for name in ("whole", "parts"))
    assert whole["global_step"] == parts["global_step"] > 2
    for name, tensor in whole["state_dict"].items():
        torch.testing.assert_close(parts["state_dict"][name], tensor, rtol=0, atol=0)
