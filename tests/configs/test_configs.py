"""Every configuration: its keys are clean, it builds, takes one step, and its dump says the same."""

import os
from pathlib import Path

import pytest
import torch
import yaml

from omnissm.ssmcore.training.cli import CLI, quiet

ROOT = Path(__file__).resolve().parents[2] / "configs"
RUNS = sorted(path for path in ROOT.glob("*/*.yaml") if path.parent.name != "trainer")
TRAINERS = sorted((ROOT / "trainer").glob("*.yaml"))
SMALLER = {"length": 64, "batch_size": 4, "eval_batch_size": 4, "num_workers": 0}
SMOKE = str(ROOT / "trainer" / "cpu_smoke.yaml")


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


class Parsed(CLI):
    """Stops once everything is parsed and before anything is built."""

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        self.text = self._config_yaml()

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parse(words: list[str], domain: str) -> Parsed:
    from importlib import import_module

    import_module(f"omnissm.{domain}.tasks")
    import_module(f"omnissm.{domain}.data")
    return Parsed(words, "fit", domain)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """No noise. Runs go to a temporary folder; `data` there is the folder of real data sets, where there is one."""
    quiet()
    monkeypatch.chdir(tmp_path)
    shared = Path(os.environ.get("OMNISSM_DATA", ROOT.parents[1] / "shared" / "data"))
    if shared.is_dir():
        Path("data").symlink_to(shared)


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_starts_with_a_comment_and_names_a_task_and_data(path):
    assert path.read_text().startswith("# ")
    content = yaml.safe_load(path.read_text())
    assert {"model", "data"} <= set(content) <= {"model", "data", "trainer", "seed_everything", "threads", "checkpoint"}


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_keys_are_clean_and_dump_reloads_the_same(path):
    """A stale or misspelt key is refused by the parser; what is dumped parses to what was dumped."""
    domain = path.parent.name
    first = parse(["-c", str(path)], domain).text
    Path("again").mkdir()
    Path("again/config.yaml").write_text(first)
    assert parse(["-c", "again/config.yaml"], domain).text == first
    own = yaml.safe_load(path.read_text())["model"]["init_args"]
    found = yaml.safe_load(first)["model"]["init_args"]
    assert all(found[key] == value for key, value in own.items() if not isinstance(value, dict))


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_takes_one_step(path):
    domain = path.parent.name
    words = ["-c", str(path), "-c", SMOKE, "--run", "here/run", "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.check_val_every_n_epoch", "1"]
    options = yaml.safe_load(path.read_text())["data"]["init_args"]
    for name, small in SMALLER.items():  # what a GPU takes in a second takes a CPU minutes
        of_series = name == "length" and "lookback" in options  # whose windows must find room
        if options.get(name, 0) > small and not of_series:
            words += [f"--data.init_args.{name}", str(small)]
    if isinstance(options.get("image_size"), list):
        words += ["--data.init_args.image_size", "[64, 96]"]
    try:
        done = run(words, domain)
    except Exception as error:
        if (missing := missing_data(error)) is None:
            raise
        pytest.skip(f"data not at hand: {missing}")
    assert all(torch.isfinite(p).all() for p in done.model.net.parameters())
    assert (Path("here/run/model") / "model.safetensors").is_file()
    if any(p.requires_grad for p in done.model.net.parameters()):
        assert done.trainer.global_step == 2
        validated = options.get("val_share", 1) > 0  # some recipes keep nothing back and take the last weights
        assert torch.isfinite(done.trainer.callback_metrics["val/loss" if validated else "train/loss"])


def missing_data(error: BaseException | None) -> BaseException | None:
    """The missing file or package at the root of an error that the parser may have wrapped, else None."""
    while error is not None and not isinstance(error, (FileNotFoundError, ImportError)):
        error = error.__cause__ or error.__context__
    return error


def run(words: list[str], domain: str) -> CLI:
    from importlib import import_module

    import_module(f"omnissm.{domain}.tasks")
    import_module(f"omnissm.{domain}.data")
    return CLI(words, "fit", domain)


@pytest.mark.parametrize("path", TRAINERS, ids=name)
def test_trainer_fragments_parse_beside_a_run(path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # one of them asks for a GPU
    own = yaml.safe_load(path.read_text())
    assert set(own) == {"trainer"}
    found = yaml.safe_load(parse(["-c", str(RUNS[0]), "-c", str(path)], RUNS[0].parent.name).text)["trainer"]
    for key, value in own["trainer"].items():
        if not isinstance(value, dict):
            assert found[key] == value
        else:
            assert found[key]["class_path"].endswith(value["class_path"].rpartition(".")[2])
