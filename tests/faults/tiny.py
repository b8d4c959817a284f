"""A tiny run of each domain on a CPU, and whether two runs ended the same."""

from pathlib import Path

import pandas as pd
import torch

from omnissm.ssmcore.training import read_metrics

TINY = {
    "timeseries": ("sequence_imputer_blackout", {"length": 200}, {}),
    "genomics": ("hnet_tiny_synthetic", {"bases": 4000, "length": 32, "batch_size": 4, "epoch_size": 16}, {}),
    "vision": (
        "hydra_vit_tiny_synthetic",
        {"train_samples": 32, "val_samples": 8, "batch_size": 8},
        {"backbone_args.depth": 1, "backbone_args.drop_rate": 0.1},
    ),
    "graphs": (
        "dag_ssm_tiny_synthetic",
        {"train_samples": 32, "val_samples": 8, "batch_size": 8},
        {"model_args.d_model": 16},
    ),
}


def fit(domain: str, *more: str) -> list[str]:
    """Words of a fit of three epochs as run `run`."""
    config, data, model = TINY[domain]
    options = ["--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu"]
    options += ["--trainer.enable_progress_bar", "false", "--threads", "1", "--state_seconds", "0"]
    for part, values in (("data", data), ("model", model)):
        options += [word for name, value in values.items() for word in (f"--{part}.init_args.{name}", str(value))]
    return [domain, "fit", "-c", f"{domain}/{config}", *options, "--run", "run", *more]


def go_on(domain: str, folder: Path) -> list[str]:
    """The words to go on with: --resume where a run has begun, else the same again."""
    begun = (folder / "runs/run/config.yaml").is_file()
    return [domain, "fit", "--run", "run", "--resume", "--state_seconds", "0"] if begun else fit(domain)


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimiser, schedule, best weights, model folder and metrics to the last bit; no rests of kills."""
    for name in ("last.ckpt", "best.ckpt"):
        first, second = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (one, other))
        for key in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers"):
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
    for path in (one / "model").iterdir():
        assert path.read_bytes() == (other / "model" / path.name).read_bytes(), path.name
    pd.testing.assert_frame_equal(read_metrics(one), read_metrics(other), check_exact=True)
    names = [{name for name in contents(run) if not name.startswith("metrics.")} for run in (one, other)]
    assert names[0] == names[1]
