"""Runs from the command line: folders, resuming, killing, refusing."""

import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from omnissm.__main__ import main
from omnissm.ssmcore.training import read_metrics, read_model_folder
from omnissm.ssmcore.training.cli import quiet, run_cli

HERE = Path(__file__).parent
CONFIG = {
    "model": {
        "class_path": "tiny_training.Line",
        "init_args": {
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}},
            "lr_scheduler": {"class_path": "omnissm.ssmcore.training.EpochDecay", "init_args": {"factor": 0.8}},
        },
    },
    "data": {"class_path": "tiny_training.Points"},
    "trainer": {"accelerator": "cpu", "max_epochs": 3, "enable_progress_bar": False, "log_every_n_steps": 2},
}
EMA = {"class_path": "omnissm.ssmcore.training.EMA", "init_args": {"decay": 0.9}}
STOPPING = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 4}}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """Every test in a folder of its own with line.yaml, ema.yaml and cosine.yaml, the tiny task importable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    cosine = {"class_path": "omnissm.ssmcore.training.WarmupCosine", "init_args": {"warmup": 0.2}}
    averaged = {**CONFIG, "trainer": {**CONFIG["trainer"], "callbacks": [EMA, STOPPING]}}
    Path("line.yaml").write_text(yaml.safe_dump(CONFIG))
    Path("ema.yaml").write_text(yaml.safe_dump(averaged))
    planned = {**averaged["model"], "init_args": {**averaged["model"]["init_args"], "lr_scheduler": cosine}}
    Path("cosine.yaml").write_text(yaml.safe_dump({**averaged, "model": planned}))


def run(*words, verb="fit"):
    return run_cli([str(word) for word in words], verb, "ssmcore")


def start(*words, **environment):
    """The same in a process of its own."""
    code = f"import sys; from omnissm.ssmcore.training.cli import run_cli; run_cli({list(words)!r}, 'fit', 'ssmcore')"
    variables = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=100)


def checkpoint(name, kind="last"):
    return torch.load(f"runs/{name}/checkpoints/{kind}.ckpt", weights_only=True)


def assert_same_end(one, other):
    """Weights, averages, optimiser and schedule equal bit for bit."""
    first, second = checkpoint(one), checkpoint(other)
    assert first["global_step"] == second["global_step"] == 18
    for key in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(first.get(key), second.get(key), rtol=0, atol=0)
    best = read_model_folder(f"runs/{one}/model").state, read_model_folder(f"runs/{other}/model").state
    torch.testing.assert_close(*best, rtol=0, atol=0)


def rows(name, metric="val/loss"):
    """Validation losses, or another metric, by step."""
    table = read_metrics(f"runs/{name}").dropna(subset=metric)
    assert table["step"].is_unique
    return dict(zip(table["step"], table[metric]))


def test_fit_writes_a_run_and_its_config_runs_again(capsys):
    run("-c", "line.yaml", "--run", "first")
    folder = Path("runs/first")
    assert {"config.yaml", "metrics.csv", "checkpoints", "model"} <= {path.name for path in folder.iterdir()}
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert "val/loss" in capsys.readouterr().out
    model = read_model_folder(folder / "model")
    assert model.config["model"] == "tests/line"
    assert model.config["args"] == {"n_variates": 3, "width": 4}  # n_variates comes from the data module
    assert json.loads(model.files["data.json"]) == {"n_variates": 3}
    assert model.state["0.weight"].shape == (4, 3)
    run("-c", folder / "config.yaml", "--run", "second")
    assert_same_end("first", "second")
    assert rows("first") == rows("second")
    assert len(rows("first")) == 3


def test_used_folder_is_refused_unless_replaced():
    run("-c", "line.yaml")
    with pytest.raises(ValueError, match=r"Run 'line' exists in 'runs/line'.*--resume.*--overwrite"):
        run("-c", "line.yaml")
    Path("runs/line/notes.txt").write_text("mine")
    run("-c", "line.yaml", "--overwrite", "--seed_everything", "1")
    assert Path("runs/line/notes.txt").read_text() == "mine"
    assert yaml.safe_load(Path("runs/line/config.yaml").read_text())["seed_everything"] == 1


def test_refused_start_leaves_the_old_run_alone():
    run("-c", "line.yaml")
    before = checkpoint("line")["state_dict"]
    with pytest.raises(Exception, match="abacus"):
        run("-c", "line.yaml", "--overwrite", "--trainer.accelerator", "abacus")
    torch.testing.assert_close(checkpoint("line")["state_dict"], before, rtol=0, atol=0)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resume_from_the_end_trains_on_as_one_run(workers):
    run("-c", "ema.yaml", "--run", "whole")
    words = ["-c", "ema.yaml", "--run", "parts", "--data.init_args.num_workers", workers]
    run(*words, "--trainer.max_epochs", 1)
    run(*words, "--trainer.max_epochs", 2, "--resume")
    run(*words, "--resume")
    assert_same_end("whole", "parts")
    assert rows("whole") == rows("parts")


def test_resume_for_more_epochs_plans_the_schedule_anew(caplog):
    for name in ("whole", "parts"):
        run("-c", "cosine.yaml", "--run", name, "--trainer.max_epochs", 3 if name == "whole" else 1)
    assert checkpoint("parts")["optimizer_states"][0]["param_groups"][0]["lr"] == 0
    run("-c", "cosine.yaml", "--run", "parts", "--resume")
    assert "planned for 6 steps and now for 18: at step 6" in caplog.text
    tables = [read_metrics(f"runs/{name}").set_index("step") for name in ("whole", "parts")]
    whole, parts = (table["lr-AdamW/pg1"].dropna() for table in tables)
    assert whole.iloc[-1] > 0
    assert dict(parts[parts.index >= 6]) == pytest.approx(dict(whole[whole.index >= 6]))


def test_moved_run_keeps_its_best_checkpoint():
    run("-c", "line.yaml", "--run", "here")
    last = checkpoint("here")
    (scores,) = (state for state in last["callbacks"].values() if "best_model_score" in state)
    scores["best_model_score"] = torch.tensor(-1.0)  # which no epoch can beat
    scores["best_k_models"] = dict.fromkeys(scores["best_k_models"], torch.tensor(-1.0))
    torch.save(last, "runs/here/checkpoints/last.ckpt")
    best = Path("runs/here/checkpoints/best.ckpt").read_bytes()
    Path("runs/here").rename("runs/there")
    run("-c", "line.yaml", "--run", "there", "--resume", "--trainer.max_epochs", 5)
    assert checkpoint("there")["epoch"] == 5
    assert Path("runs/there/checkpoints/best.ckpt").read_bytes() == best


def test_resume_of_a_finished_run_changes_nothing():
    run("-c", "line.yaml")
    before, metrics = checkpoint("line")["state_dict"], rows("line")
    run("-c", "line.yaml", "--resume")
    torch.testing.assert_close(checkpoint("line")["state_dict"], before, rtol=0, atol=0)
    assert rows("line") == metrics
    with pytest.raises(FileNotFoundError, match=r"metrics.csv"):
        read_metrics("runs/other")


def test_resume_refuses_another_configuration():
    run("-c", "line.yaml", "--trainer.max_epochs", 1)
    with pytest.raises(ValueError, match=r"data.init_args.batch_size is 4, was 8.*--init_from"):
        run("-c", "line.yaml", "--resume", "--data.init_args.batch_size", 4)
    with pytest.raises(ValueError, match=r"seed_everything is 1, was 0"):
        run("-c", "line.yaml", "--resume", "--seed_everything", 1)
    with pytest.raises(ValueError, match=r"trainer.gradient_clip_val is 0.5, was None"):
        run("-c", "line.yaml", "--resume", "--trainer.gradient_clip_val", 0.5)
    with pytest.raises(ValueError, match=r"trainer.accumulate_grad_batches is 2, was 1"):
        run("-c", "line.yaml", "--resume", "--trainer.accumulate_grad_batches", 2)
    with pytest.raises(ValueError, match=r"trainer.callbacks is \[.*EMA.*\], was None"):
        run("-c", "ema.yaml", "--run", "line", "--resume")
    with pytest.raises(FileNotFoundError, match=r"Nothing to resume: runs/other/config.yaml"):
        run("-c", "line.yaml", "--resume", "--run", "other")


def test_killed_run_resumes_to_the_same_end():
    run("-c", "cosine.yaml", "--run", "whole")
    killed = start("-c", "cosine.yaml", "--run", "killed", "--state_seconds", "0", KILL_AT_STEP="9")
    assert killed.returncode == -9
    assert checkpoint("killed")["global_step"] == 6
    run("--run", "killed", "--resume")  # reads the run's own config.yaml
    assert_same_end("whole", "killed")
    assert rows("whole") == rows("killed")


def test_resumed_and_killed_run_keeps_no_older_model_folder():
    run("-c", "line.yaml", "--trainer.max_epochs", 1)
    assert Path("runs/line/model").is_dir()
    assert start("-c", "line.yaml", "--resume", KILL_AT_STEP="9").returncode == -9
    assert not Path("runs/line/model").exists()


def test_killed_before_the_first_checkpoint_starts_anew():
    run("-c", "line.yaml", "--run", "whole")
    Path("runs/early").mkdir()
    text = Path("runs/whole/config.yaml").read_text()
    Path("runs/early/config.yaml").write_text(text.replace("run: whole", "run: early"))
    run("--run", "early", "--resume")
    assert_same_end("whole", "early")


def test_deterministic_runs_are_equal():
    for name in ("a", "b"):
        run("-c", "line.yaml", "--run", name, "--trainer.deterministic", "true")
    assert_same_end("a", "b")
    assert rows("a") == rows("b")


def test_seed_of_the_run_changes_weights_and_order():
    run("-c", "line.yaml", "--run", "a", "--model.init_args.dropout", 0)
    run("-c", "line.yaml", "--run", "b", "--model.init_args.dropout", 0, "--seed_everything", 1)
    first, second = checkpoint("a"), checkpoint("b")
    assert not torch.equal(first["state_dict"]["net.0.weight"], second["state_dict"]["net.0.weight"])
    assert rows("a") != rows("b")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("config", ["line.yaml", "cosine.yaml"])
def test_killed_at_any_step_resumes_to_the_same_end(config):
    run("-c", config, "--run", "whole")
    assert start("-c", config, "--run", "k0", KILL_AT_STEP="0").returncode == -9
    with pytest.raises(FileNotFoundError, match=r"Nothing to resume.*before its first step is started again with -c"):
        run("--run", "k0", "--resume")
    run("-c", config, "--run", "k0")
    assert_same_end("whole", "k0")
    for step in (1, 5, 6, 17):
        assert start("-c", config, "--run", f"k{step}", KILL_AT_STEP=str(step)).returncode == -9
        assert start("--run", f"k{step}", "--resume", KILL_AT_STEP=str(step + 4)).returncode in (-9, 0)
        run("--run", f"k{step}", "--resume")
        assert_same_end("whole", f"k{step}")


@pytest.mark.slow
def test_two_ranks_equal_one_process():
    """Half the batch on each of two processes (gloo) is the whole batch on one, up to rounding."""
    words = ["-c", "line.yaml", "--model.init_args.dropout", "0", "--trainer.max_steps", "6"]
    run(*words, "--run", "one")
    words = [*words, "--run", "two", "--data.init_args.batch_size", "4", "--trainer.devices", "2"]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "omnissm", "timeseries", "fit", "-c", "trainer/ddp", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    one, two = checkpoint("one"), checkpoint("two")
    assert one["global_step"] == two["global_step"] == 6
    torch.testing.assert_close(one["state_dict"], two["state_dict"], rtol=0, atol=1e-6)
    for metric in ("train/loss", "val/loss"):
        assert rows("one", metric) == pytest.approx(rows("two", metric), rel=1e-5)
    assert "sync_dist" not in done.stderr


def test_init_from_takes_weights_only():
    run("-c", "line.yaml", "--run", "first")
    run("-c", "line.yaml", "--run", "second", "--init_from", "runs/first/model", "--trainer.max_steps", 1)
    last = checkpoint("second")
    assert last["global_step"] == 1
    moved = (last["state_dict"]["net.2.bias"] - read_model_folder("runs/first/model").state["2.bias"]).abs().max()
    assert 0 < moved < 0.06  # one AdamW step of 0.05
    with pytest.raises(ValueError, match=r"runs/first/model do not fit.*`0.weight` is \(4, 3\), expected \(5, 3\)"):
        run("-c", "line.yaml", "--run", "wide", "--model.init_args.width", 5, "--init_from", "runs/first/model")
    assert not Path("runs/wide").exists()


def test_test_and_validate_write_metrics(capsys):
    run("-c", "line.yaml")
    run("-c", "line.yaml", verb="test")
    run("--run", "line", verb="validate")
    found = json.loads(Path("runs/line/metrics.json").read_text())
    assert set(found["metrics"]) == {"test/loss", "val/loss"}
    assert found["metrics"]["val/loss"] == pytest.approx(min(rows("line").values()))
    assert found["parameters"] == 3 * 4 + 4 + 4 + 1
    assert (found["config"], found["model"], found["seed"]) == ("line", "tests/line", 0)
    assert set(found["versions"]) == {"omnissm", "torch", "pytorch_lightning", "python"}
    assert len(rows("line")) == 3  # test did not touch metrics.csv
    assert "test/loss" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["moved", "moved/checkpoints/best.ckpt"])
def test_metrics_go_into_the_folder_of_the_checkpoint(path):
    run("-c", "line.yaml", "--trainer.max_epochs", 1)
    Path("runs/line").rename("moved")
    run("--ckpt_path", path, verb="test")
    assert "test/loss" in json.loads(Path("moved/metrics.json").read_text())["metrics"]
    assert not list(Path("runs").iterdir())


def test_test_without_a_fit():
    with pytest.raises(FileNotFoundError, match=r"runs/line.*Run `fit` first.*--ckpt_path"):
        run("-c", "line.yaml", verb="test")
    run("--model", "tiny_training.Fixed", "--data", "tiny_training.Points", "--run", "zero", verb="test")
    found = json.loads(Path("runs/zero/metrics.json").read_text())
    assert found["parameters"] == 0
    generator = torch.Generator().manual_seed(2)
    y = torch.randn(48, 3, generator=generator).sum(dim=1) + 0.1 * torch.randn(48, generator=generator)
    assert found["metrics"]["test/loss"] == pytest.approx(float(y.square().mean()), rel=1e-6)


@pytest.mark.parametrize(("name", "advice"), [("lime", "Did you mean 'line'"), ("elsewhere/x", "Name a configuration")])
def test_a_run_that_is_not_there_is_named(name, advice):
    Path("runs/line").mkdir(parents=True)
    Path("runs/line/config.yaml").write_text("{}")
    with pytest.raises(FileNotFoundError, match=rf"No run '{name}': .*{name}/config.yaml does not exist. {advice}"):
        run("--run", name, verb="test")


def test_test_refuses_a_checkpoint_of_another_model():
    run("-c", "line.yaml")
    with pytest.raises(ValueError, match=r"best.ckpt do not fit the model.*--run line without -c"):
        run("-c", "line.yaml", "--model.init_args.width", 5, verb="test")


def test_export_of_a_run(capsys):
    run("-c", "line.yaml")
    assert main(["timeseries", "export", "--checkpoint", "runs/line", "--out", "model"]) == 0
    assert capsys.readouterr().out.endswith("model\n")
    own = read_model_folder("runs/line/model").state
    torch.testing.assert_close(read_model_folder("model").state, own, rtol=0, atol=0)
    assert main(["timeseries", "export", "--checkpoint", "runs/other", "--out", "model"]) == 2
    assert "Run `fit` first" in capsys.readouterr().err


def test_predict_writes_one_file():
    from safetensors.torch import load_file

    run("-c", "line.yaml")
    run("--run", "line", verb="predict")
    assert load_file("runs/line/predictions.safetensors")["prediction"].shape == (48,)


def test_loss_that_is_not_finite_stops_and_keeps_weights():
    with pytest.raises(
        ValueError, match=r"loss is nan at epoch 1, batch 2 \(step 8\).*runs/line/checkpoints/stopped.ckpt"
    ):
        run("-c", "line.yaml", "--model.init_args.poison_step", 8)
    kept = checkpoint("line", "stopped")
    assert kept["global_step"] == 8
    assert all(torch.isfinite(weight).all() for weight in kept["state_dict"].values())


def test_what_stopped_a_fit_is_said_whatever_an_old_run_holds():
    run("-c", "line.yaml")
    Path("runs/line/checkpoints/last.ckpt").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"loss is nan at epoch 0, batch 0.* Run 'line' is as it was\.$"):
        run("-c", "line.yaml", "--overwrite", "--model.init_args.poison_step", 0)
    assert Path("runs/line/checkpoints/last.ckpt").read_bytes() == b"cut off"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.init_args.batch_sizee", "4"], r"'batch_sizee' is not accepted. Did you mean 'batch_size'"),
        (["--model.init_args.optimizer.init_args.lrr", "4"], r"Did you mean 'lr'"),
        (["--trainer.max_epoch", "4"], r"Did you mean 'max_epochs'"),
        (["--trainer.max_epochs", "few"], r"^trainer.max_epochs: expected one of int, null; got few"),
        (["--trainer.max_epochs", "-3"], r"^trainer.max_epochs: expected a number of epochs, or -1 .*; got -3\.$"),
        (["--trainer.check_val_every_n_epoch", "0"], r"^trainer.check_val_every_n_epoch: expected .* at least 1"),
        (["--trainer.accumulate_grad_batches", "0"], r"^trainer.accumulate_grad_batches: expected .* at least 1"),
        (["--trainer.precision", "17"], r"^trainer.precision: expected one of 64, 32, 16, .*, bf16, null; got 17$"),
        (["--trainer", "3"], r"^trainer: expected options, such as --trainer.NAME VALUE$"),
        (["--trainer.callbacks+=EarlyStopping"], r"^trainer.callbacks: the following .* required: monitor$"),
        (["--trainer.foo", "3"], r"--trainer.foo 3\. --help lists all options\.$"),
        (["--threads", "0"], r"^threads: expected a whole number above 0; got 0$"),
        (["--threads", "x"], r"^threads: expected a whole number above 0; got x$"),
        (["--state_seconds", "-1"], r"^state_seconds: expected a number of at least 0; got -1$"),
        (["--model.init_args.optimizer", "Adamm"], r"^model.optimizer: expected the name of a class; got Adamm$"),
        (["--model.init_args.lr_scheduler", "Foo"], r"^model.lr_scheduler: expected one of the name of a class, null"),
        (["--data.init_args.batch_size", "many"], r"^data.batch_size: expected int; got many$"),
        (["--data", "tiny_training.Pints"], r"no attribute 'Pints'. Did you mean 'Points'"),
        (["--model", "Lin"], r"got Lin. Did you mean 'Line'"),
        (["--data", "tiny_training.Shapeless"], r"^Shapeless has no `n_variates`, which the task needs"),
        (["--trainer.callbacks+=lightning.pytorch.callbacks.Timer"], r"Write pytorch_lightning instead"),
        (["--model.init_args.width", "0"], r"^width must be 1 or more, got 0.$"),
        (["--resume", "--overwrite"], r"give one of them"),
    ],
)
def test_bad_words_are_one_line(words, message):
    with pytest.raises(ValueError, match=message) as caught:
        run("-c", "line.yaml", *words)
    assert "\n" not in str(caught.value)
    assert not Path("runs").exists()


@pytest.mark.parametrize("words", [["--checkpoint.monitor=val/los"], ["-c", "stopping.yaml"]], ids=lambda word: word[0])
def test_a_metric_that_nobody_logs_is_named(words):
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/los"}}
    Path("stopping.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [stopping]}}))
    said = r"^No metric 'val/los' is logged\. Did you mean 'val/loss'\? .*go on with: .* --run line --resume$"
    with pytest.raises(ValueError, match=said):
        run("-c", "line.yaml", *words, "--run", "line")


def test_fit_that_fails_at_its_data_leaves_nothing():
    with pytest.raises(ValueError, match="expected two columns"):
        run("-c", "line.yaml", "--data", "tiny_training.Unreadable")
    assert not Path("runs/line").exists()
    run("-c", "line.yaml")


def test_help_is_short_at_the_top_and_has_defaults_and_an_example(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    shown = capsys.readouterr().out
    assert shown.startswith("usage: omnissm ssmcore fit -c NAME_OR_FILE [-c ...] [--run NAME] [--OPTION VALUE ...]\n\n")
    assert "\n\nTrain, keep the best weights, and write them as a model folder.\n\n" in shown
    assert shown.index("--run RUN") < shown.index("--resume") < shown.index("--trainer.max_epochs")
    assert "default: best" in shown
    assert "example: omnissm ssmcore fit -c ssmcore/NAME --run first" in shown


def test_misspelt_section_of_a_file():
    Path("bad.yaml").write_text(yaml.safe_dump({**CONFIG, "trianer": {"max_epochs": 1}}))
    with pytest.raises(ValueError, match=r"'trianer.max_epochs'. Did you mean 'trainer'"):
        run("-c", "bad.yaml")
    with pytest.raises(
        ValueError, match=r"^the configuration lacks data, model\. Name a configuration with -c, .*--run\.$"
    ):
        run()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: [1,\n", r"^'broken.yaml' is not readable YAML: .*line 2, column 1"),
        ("words", "^'broken.yaml' holds str, expected a mapping of options"),
        ("", "^'broken.yaml' holds nothing, expected"),
        ("\udcff", "^'broken.yaml' is not readable YAML: .*utf-8"),
    ],
)
def test_broken_configuration_is_named(text, message):
    Path("broken.yaml").write_text(text, errors="surrogateescape")
    for words in (["-c", "broken.yaml"], ["--config=broken.yaml"]):
        with pytest.raises(ValueError, match=message) as caught:
            run("-c", "line.yaml", *words)
        assert "\n" not in str(caught.value)


def test_full_disk_is_one_line_and_leaves_no_halves(capsys, monkeypatch):
    """Files may not grow over 4 kB, as on a full disk: the first checkpoint fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setitem(main.__globals__["VERBS"], "ssmcore", {"fit": (main.__globals__["LIGHTNING"], "")})
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        code = main(["ssmcore", "fit", "-c", "line.yaml"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert capsys.readouterr().err.strip() == "omnissm: error: File too large: 'runs/line/checkpoints/.first.ckpt'"
    assert not Path("runs/line").exists()


def test_metrics_of_all_processes_need_no_advice():
    """Tasks add up over processes before they log a part's metrics; one that logs the first one's is told."""
    advice = "It is recommended to use `self.log('{}', ..., sync_dist=True)` when logging on epoch level"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet()
        for name in ("val/accuracy", "test/map", "train/loss"):
            warnings.warn(advice.format(name), UserWarning, stacklevel=1)
    assert [str(one.message) for one in seen] == [advice.format("train/loss")]
