"""A `fit` that meets a full disk, missing rights, a dead worker, a bad loss or an interrupt: one line, nothing lost."""

import os
import random
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import patches
import pytest
import torch
from harness import Harm, begin, finish
from tiny import assert_same_run, contents, fit

from omnissm.ssmcore.training import EpochSampler, read_metrics
from omnissm.ssmcore.training.logs import MetricsFile

RUN = Path("runs/run")
RESUME = ["graphs", "fit", "--run", "run", "--resume"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    ended = finish(fit("graphs"), folder)
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    """A folder with a copy of that run."""
    shutil.copytree(whole, tmp_path / "here")
    return tmp_path / "here"


def assert_one_line(ended, *said: str, code: int = 2) -> None:
    assert ended.code == code, (ended.code, ended.err)
    assert len(ended.err.splitlines()) == 1, ended.err
    for text in said:
        assert text in ended.err


def begun(folder: Path) -> bool:
    return (folder / RUN / "checkpoints/last.ckpt").exists() and (folder / RUN / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("harm", "options", "said"),
    [
        (Harm(patch=patches.fails_at_once), (), "sample 3 cannot be read"),
        (Harm(patch=patches.loss_is_nan_at_once), (), "loss is nan at epoch 0, batch 0"),
        (Harm(file_size=4096), (), "File too large: 'runs/run/checkpoints/.first.ckpt'"),
        (Harm(), ("--data.init_args.train_samples", "0"), "train"),
        (Harm(), ("--trainer.max_epochs", "0"), "Nothing was trained"),
    ],
    ids=["sample", "loss", "disk", "data", "epochs"],
)
def test_overwrite_keeps_the_old_run_until_the_new_one_has_made_a_step(harm, options, said, copied):
    before = contents(copied)
    ended = finish(fit("graphs", "--overwrite", "--seed_everything", "1", *options), copied, harm)
    assert_one_line(ended, said)
    assert contents(copied) == before


@pytest.mark.parametrize("operation", [2, 7])
def test_overwrite_killed_before_its_first_step_keeps_the_old_run(operation, copied, whole):
    """The last operations before the first step are the lock and the state that is not yet the run's."""
    ended = finish(fit("graphs", "--overwrite", "--seed_everything", "1"), copied, Harm(at_operation=operation))
    assert ended.code == -signal.SIGKILL
    old = contents(whole)
    assert {name: content for name, content in contents(copied).items() if name in old} == old
    assert finish(["graphs", "test", "--run", "run"], copied).code == 0


@pytest.mark.slow
def test_overwrite_killed_while_it_takes_the_folder_is_the_old_run_or_none_or_the_new_one(copied, tmp_path):
    (tmp_path / "new").mkdir()
    assert finish(fit("graphs", "--seed_everything", "1"), tmp_path / "new").code == 0
    dice = random.Random(5)
    for operation in dice.sample(range(8, 30), 3):
        place = tmp_path / f"at{operation}"
        shutil.copytree(copied, place)
        words = fit("graphs", "--seed_everything", "1", "--overwrite")
        assert finish(words, place, Harm(at_operation=operation)).code == -signal.SIGKILL
        config = place / RUN / "config.yaml"
        new = config.is_file() and "seed_everything: 1" in config.read_text()
        ended = finish(RESUME if new else words, place)
        assert ended.code == 0, (operation, ended.err)
        assert_same_run(tmp_path / "new" / RUN, place / RUN)


def test_disk_that_fills_up_keeps_the_last_epoch(whole, tmp_path):
    ended = finish(fit("graphs"), tmp_path, Harm(patch=patches.disk_fills_up))
    assert_one_line(ended, "No space left on device: ", "omnissm graphs fit --run run --resume")
    assert torch.load(tmp_path / RUN / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 0
    assert not list(tmp_path.rglob(".*"))
    assert finish(RESUME, tmp_path).code == 0
    assert_same_run(whole / RUN, tmp_path / RUN)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 100 kB and its function to resize it."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options: str) -> bool:
        words = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
        return subprocess.run(words, capture_output=True).returncode == 0

    if not mount("size=100k"):
        pytest.skip("file systems cannot be mounted here")
    yield place, lambda size: mount("remount", f"size={size}")
    subprocess.run(["umount", place], check=True)


def test_small_disk(small_disk, whole):
    """Room for no checkpoint: nothing is left. For one, and then more room: the run goes on."""
    place, resize = small_disk
    assert resize("12k")
    assert_one_line(finish(fit("graphs"), place), "No space left on device: 'runs/run/checkpoints/.first.ckpt'")
    assert not contents(place)
    assert resize("100k")
    assert_one_line(finish(fit("graphs"), place), "No space left on device: ", "omnissm graphs fit --run run --resume")
    assert resize("10m")
    assert finish(RESUME, place).code == 0
    assert_same_run(whole / RUN, place / RUN)


def test_rows_of_metrics_are_whole_on_a_full_disk_and_after_a_cut(tmp_path):
    log = MetricsFile(tmp_path / "metrics.csv")
    log.begin()
    log.log_metrics({"a": 0.25}, 0)
    log.save()
    log.log_metrics({"a": 0.5, "b": 1.0}, 1)
    log.save()
    kept = (tmp_path / "metrics.csv").read_text()
    assert kept == "a,b,step\n0.25,,0\n0.5,1.0,1\n"
    log.log_metrics({"a": 0.75, "b": 2.0}, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) + 5, limits[1]))  # room for half a row
    try:
        with pytest.raises(OSError, match=r"File too large: '.*metrics.csv'"):
            log.save()
        assert (tmp_path / "metrics.csv").read_text() == kept
        log.finalize("failed")  # says nothing: the first error has been told
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.save()
    assert read_metrics(tmp_path)["a"].tolist() == [0.25, 0.5, 0.75]
    content = (tmp_path / "metrics.csv").read_bytes()
    (tmp_path / "metrics.csv").write_bytes(content[:-4])
    assert read_metrics(tmp_path)["a"].tolist() == [0.25, 0.5]
    (tmp_path / "metrics.csv").write_bytes(content[:2])
    with pytest.raises(FileNotFoundError, match="No rows"):
        read_metrics(tmp_path)


def test_run_goes_on_after_its_metrics_were_cut(whole, tmp_path):
    running = start_held(fit("graphs"), tmp_path)
    running.signal(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    file = tmp_path / RUN / "metrics.csv"
    file.write_bytes(file.read_bytes()[:-3])
    assert finish(RESUME, tmp_path).code == 0
    assert_same_run(whole / RUN, tmp_path / RUN)


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda folder: (folder / "runs").chmod(0o555), "Permission denied: 'runs/run'"),
        (lambda folder: (folder / "runs").chmod(0o000), "Permission denied: 'runs/run"),
        (lambda folder: (folder / "runs/run").write_text("mine"), "Not a directory: 'runs/run'"),
        (lambda folder: ((folder / "runs").rmdir(), (folder / "runs").write_text("mine")), "Not a directory: 'runs'"),
    ],
    ids=["read only", "no rights", "a file", "a file above"],
)
def test_folder_that_cannot_be_written_is_refused_before_the_work(prepare, said, tmp_path):
    (tmp_path / "runs").mkdir()
    prepare(tmp_path)
    ended = finish(fit("graphs"), tmp_path, Harm(obey=True))
    if (tmp_path / "runs").is_dir():
        (tmp_path / "runs").chmod(0o755)
    assert_one_line(ended, said)
    assert set(contents(tmp_path).values()) <= {b"mine"}


def test_files_without_rights_are_one_line(copied):
    before = contents(copied)
    for path, words in (
        (copied / RUN, fit("graphs", "--overwrite")),
        (copied / RUN / "checkpoints", RESUME),
        (copied / RUN / "checkpoints/best.ckpt", ["graphs", "test", "--run", "run"]),
        (copied / RUN / "config.yaml", RESUME),
    ):
        mode = path.stat().st_mode
        path.chmod(0o555 if path.is_dir() else 0)
        ended = finish(words, copied, Harm(obey=True))
        path.chmod(mode)
        assert_one_line(ended, path.name)
        assert "Permission denied" in ended.err or "not readable" in ended.err
        assert contents(copied) == before


def start_held(words: list[str], folder: Path):
    """A run that stands still after its first steps, until `hold` is removed."""
    (folder / "hold").touch()
    running = begin(words, folder, Harm(patch=patches.held))
    running.wait_for(lambda: begun(folder))
    return running


def test_folder_of_a_running_process_is_refused_and_interrupts_say_how_to_go_on(whole, tmp_path):
    running = start_held(fit("graphs"), tmp_path)
    for words in (RESUME, fit("graphs", "--overwrite")):
        ended = finish(words, tmp_path)
        assert_one_line(ended, f"'runs/run' is being written by process {running.pid} on ", "--run NAME")
    assert_one_line(finish(fit("graphs"), tmp_path), "Run 'run' exists")
    running.signal(signal.SIGINT)
    assert_one_line(running.wait(), "Interrupted. ", "omnissm graphs fit --run run --resume", code=130)
    running = start_held(RESUME, tmp_path)
    running.wait_for(lambda: (tmp_path / RUN / "metrics.1.csv").exists())
    running.signal(signal.SIGTERM)
    (tmp_path / "hold").unlink()
    assert_one_line(running.wait(), "Interrupted. ", "omnissm graphs fit --run run --resume", code=143)
    assert finish(RESUME, tmp_path).code == 0
    assert_same_run(whole / RUN, tmp_path / RUN)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"])
def test_interrupt_of_all_processes_of_a_run_with_loading_processes(number, code, tmp_path):
    running = start_held(fit("graphs", "--data.init_args.num_workers", "2"), tmp_path)
    running.signal(number)
    (tmp_path / "hold").unlink()
    ended = running.wait()
    assert ended.code == code, ended.err
    # The processes that load data may complain of their lost connections before.
    assert "Interrupted. The state at the start of epoch 0 is kept" in ended.err.splitlines()[-1]


def test_interrupt_before_the_first_step_leaves_nothing(tmp_path):
    running = begin(fit("graphs"), tmp_path, Harm(patch=patches.slow_steps))
    running.wait_for(lambda: (tmp_path / RUN / "checkpoints/.first.ckpt").exists())
    running.signal(signal.SIGINT)
    ended = running.wait()
    if (tmp_path / RUN / "config.yaml").exists():
        pytest.skip("the first step was faster than the signal")
    assert_one_line(ended, "Interrupted. Nothing was written.", code=130)
    assert not contents(tmp_path)


def children_of(running) -> list[int]:
    path = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    return [int(word) for word in path.read_text().split()]


def test_dead_worker_of_a_test_is_named(copied):
    (copied / "hold").touch()
    before = contents(copied)
    words = ["graphs", "test", "--run", "run", "--data.init_args.num_workers", "2"]
    running = begin(words, copied, Harm(patch=patches.held_test))
    running.wait_for(lambda: len(children_of(running)) >= 2)
    os.kill(children_of(running)[0], signal.SIGKILL)
    ended = running.wait()
    assert ended.code == 2
    assert "error: A process that loads data has ended: DataLoader worker (pid" in ended.err.splitlines()[-1]
    assert contents(copied) == before


def test_dead_worker_is_named_and_the_run_goes_on(whole, tmp_path):
    running = start_held(fit("graphs", "--data.init_args.num_workers", "2"), tmp_path)
    assert len(children_of(running)) >= 2
    os.kill(children_of(running)[-1], signal.SIGKILL)
    said = "A process that loads data has ended: DataLoader worker (pid", "omnissm graphs fit --run run --resume"
    ended = running.wait()
    assert ended.code == 2
    last = ended.err.splitlines()[-1]  # the other worker may complain of its lost connection before
    assert all(text in last for text in said), ended.err
    (tmp_path / "hold").unlink()
    assert finish([*RESUME, "--data.init_args.num_workers", "0"], tmp_path).code == 0
    for kind in ("last", "best"):
        one, other = (
            torch.load(run / RUN / f"checkpoints/{kind}.ckpt", weights_only=True)["state_dict"]
            for run in (whole, tmp_path)
        )
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        pytest.param(patches.loss_is_nan, "loss is nan", id="loss"),
        pytest.param(patches.gradient_is_infinite, "gradient of `", id="gradient", marks=pytest.mark.slow),
    ],
)
def test_number_that_is_not_finite_stops_with_its_batch_named(patch, said, tmp_path, whole):
    """Step 5 is the second batch of epoch 1; the weights are those after the step before it, as in the whole run."""
    ended = finish(fit("graphs"), tmp_path, Harm(patch=patch))
    order = EpochSampler(range(32), shuffle=True, seed=0)
    order.set_epoch(1)
    names = ", ".join(map(str, list(order)[8:16]))
    place = f"at epoch 1, batch 1 (step 5), samples {names} of the training part"
    assert_one_line(ended, said, place, "The weights before it are in runs/run/checkpoints/stopped.ckpt")
    kept = torch.load(tmp_path / RUN / "checkpoints/stopped.ckpt", weights_only=True)
    assert kept["global_step"] == 5
    assert all(torch.isfinite(weight).all() for weight in kept["state_dict"].values())
    earlier = torch.load(tmp_path / RUN / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert any(not torch.equal(weight, earlier[name]) for name, weight in kept["state_dict"].items())
    ended = finish(fit("graphs", "--run", "next", "--init_from", str(RUN / "checkpoints/stopped.ckpt")), tmp_path)
    assert ended.code == 0, ended.err
