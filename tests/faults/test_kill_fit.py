"""`fit` of each domain, killed with SIGKILL at random moments and resumed, ends as if nothing had happened."""

import random
from pathlib import Path

import pandas as pd
import pytest
import torch
from harness import finish, kill_often

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


def words(domain: str) -> list[str]:
    config, data, model = TINY[domain]
    options = ["--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu"]
    options += ["--trainer.enable_progress_bar", "false", "--threads", "1"]
    for part, values in (("data", data), ("model", model)):
        options += [word for name, value in values.items() for word in (f"--{part}.init_args.{name}", str(value))]
    return [domain, "fit", "-c", f"{domain}/{config}", *options, "--run", "run"]


def visible(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimiser, schedule, best weights, model folder and metrics to the last bit; no rests of kills."""
    for name in ("last.ckpt", "best.ckpt"):
        first, second = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (one, other))
        for key in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers"):
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
    for path in (one / "model").iterdir():
        assert path.read_bytes() == (other / "model" / path.name).read_bytes(), path.name
    pd.testing.assert_frame_equal(read_metrics(one), read_metrics(other), check_exact=True)
    parts = {name for name in visible(other) if name.startswith("metrics.")}
    assert visible(other) - parts == visible(one) - {"metrics.csv"}


def check(domain: str, folder: Path, kills: list[int], seed: int) -> None:
    (folder / "whole").mkdir()
    whole = finish(words(domain), folder / "whole")
    assert whole.code == 0, whole.err
    dice = random.Random(seed)
    for number, count in enumerate(kills):
        place = folder / f"killed{number}"
        place.mkdir()

        def resume(place=place):
            begun = (place / "runs/run/config.yaml").is_file()
            return [domain, "fit", "--run", "run", "--resume"] if begun else words(domain)

        done = kill_often(words(domain), resume, place, whole.moments, count, dice)
        try:
            assert_same_run(folder / "whole/runs/run", place / "runs/run")
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, run {number}, kills at {done}: {error}") from error


@pytest.mark.parametrize("domain", TINY)
def test_a_run_killed_twice_ends_the_same(domain, tmp_path):
    check(domain, tmp_path, [2], seed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("domain", TINY)
def test_a_run_killed_twenty_times_ends_the_same(domain, tmp_path):
    check(domain, tmp_path, [1] * 8 + [4] * 3, seed=random.randrange(10**6))
