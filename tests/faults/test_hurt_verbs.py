"""Verbs other than `fit` that meet a full disk, a folder in the way, missing rights, interrupts or a dead process."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import patches
import pytest
import yaml
from harness import Harm, begin, finish
from test_hurt_fit import assert_one_line, children_of
from test_kill_score import GRID, score, write_variants
from tiny import contents

RESUME = ("--resume", "true")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A genome, variants, a model and their scores in `whole/out`; hourly series; a grid of forecasts."""
    folder = tmp_path_factory.mktemp("inputs")
    write_variants(folder)
    (folder / "whole").mkdir()
    assert finish(score(folder), folder / "whole").code == 0
    times = pd.date_range("2024-01-01", periods=60, freq="h")
    pd.DataFrame({"time": times, "a": np.arange(60.0)}).to_csv(folder / "series.csv", index=False)
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID))
    return folder


def test_disk_that_is_full_keeps_the_blocks_and_the_old_output(inputs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.tsv").write_text("of an earlier run")
    size = max(path.stat().st_size for path in (inputs / "whole/out").iterdir())
    ended = finish(score(inputs), tmp_path, Harm(file_size=size - 1))
    assert_one_line(ended, "File too large: 'out/", "--resume true")
    assert (tmp_path / "out/a.tsv").read_text() in ("of an earlier run", (inputs / "whole/out/a.tsv").read_text())
    assert len(list((tmp_path / "out/a.vcf.gz.parts").glob("part-*.npz"))) == 15
    ended = finish(score(inputs, *RESUME), tmp_path)
    assert ended.code == 0, ended.err
    assert contents(tmp_path / "out") == contents(inputs / "whole/out")


def test_disk_that_is_full_at_once_leaves_nothing(inputs, tmp_path):
    assert_one_line(finish(score(inputs), tmp_path, Harm(file_size=100)), "File too large: 'out/a.vcf.gz.parts/")
    assert not contents(tmp_path)


def test_interrupted_scores_and_two_writers(inputs, tmp_path):
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        words = score(inputs) if number == signal.SIGINT else score(inputs, *RESUME)
        (tmp_path / "hold").touch()
        running = begin(words, tmp_path, Harm(patch=patches.held_blocks))
        running.wait_for(lambda: len(list(tmp_path.rglob("part-*.npz"))) > 1)
        said = f"'out/a.vcf.gz.parts' is being written by process {running.pid} on "
        assert_one_line(finish(score(inputs, *RESUME), tmp_path), said)
        running.signal(number)
        assert_one_line(running.wait(), "Interrupted. ", "--resume true", code=code)
    (tmp_path / "hold").unlink()
    assert finish(score(inputs, *RESUME), tmp_path).code == 0
    assert contents(tmp_path / "out") == contents(inputs / "whole/out")


@pytest.mark.slow
def test_parts_that_a_kill_has_left_do_not_count_for_another_run(inputs, tmp_path):
    """The last operations of a run remove its parts; a kill among them leaves whole outputs and nothing to resume."""
    count = len(finish(score(inputs), tmp_path).moments)
    for operation in (count - 8, count - 1):
        place = tmp_path / str(operation)
        place.mkdir()
        assert finish(score(inputs), place, Harm(at_operation=operation)).code == -signal.SIGKILL
        words = score(inputs, *(RESUME if (place / "out/a.vcf.gz.parts/manifest.json").exists() else ()))
        assert finish(words, place).code == 0
        assert contents(place / "out") == contents(inputs / "whole/out")


def protocol(folder: Path, *more: str) -> list[str]:
    return [
        "timeseries",
        "protocol",
        "--grid",
        str(folder / "grid.yaml"),
        "--out",
        "out",
        "--accelerator",
        "cpu",
        *more,
    ]


def test_protocol_says_how_to_go_on(inputs, tmp_path):
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        running = begin(protocol(inputs), tmp_path, Harm(patch=patches.slow_steps))
        before = len(list(tmp_path.rglob("cells/*.json")))
        running.wait_for(lambda before=before: len(list(tmp_path.rglob("cells/*.json"))) > before)
        running.signal(number)
        ended = running.wait()
        assert ended.code in (code, 130)
        assert "Interrupted. Finished cells are kept in out/cells; the same command goes on." in ended.err
        assert "Traceback" not in ended.err
    cells = contents(tmp_path / "out/cells")
    assert finish(protocol(inputs), tmp_path).code == 0
    assert cells.items() <= contents(tmp_path / "out/cells").items()


def test_protocol_names_the_cell_whose_loss_is_not_finite(inputs, tmp_path):
    ended = finish(protocol(inputs), tmp_path, Harm(patch=patches.loss_is_nan_at_once))
    assert ended.code == 2
    assert "error: rlinear on waves, 4: Training stopped: loss is nan at epoch 0, batch 0 (step 0)" in ended.err
    done = [json.loads(path.read_text())["settings"]["label"] for path in (tmp_path / "out/cells").iterdir()]
    assert set(done) <= {"last_value"}


def makers(running) -> list[int]:
    """The processes that make cells; another child tracks resources."""
    return [child for child in children_of(running) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.slow
def test_protocol_whose_process_dies_is_one_line(inputs, tmp_path):
    running = begin(protocol(inputs, "--jobs", "2"), tmp_path)
    running.wait_for(lambda: len(makers(running)) == 2)
    os.kill(makers(running)[-1], signal.SIGKILL)
    ended = running.wait()
    assert ended.code == 2
    assert "A process that makes cells has ended." in ended.err.splitlines()[-1]
    assert finish(protocol(inputs), tmp_path).code == 0


VERBS = {
    "convert": ("timeseries convert --data series.csv --time time", "a.nc"),
    "describe": ("timeseries describe --data series.csv --time time", "a.csv"),
    "score": ("genomics score --variants v.vcf --reference g.fa --model model --window 48", "a.vcf"),
    "generate": ("genomics generate --model model --n 1 --length 8", "a.fa"),
    "plot": ("graphs plot --synthetic path_sum", "a.png"),
}


def words_of(verb: str, inputs: Path, out: str) -> list[str]:
    words = [str(inputs / word) if (inputs / word).exists() else word for word in VERBS[verb][0].split()]
    return [*words, "--out", out]


@pytest.mark.parametrize("verb", VERBS)
def test_outputs_that_cannot_be_written(verb, inputs, tmp_path):
    """A folder of that name, no right to write, no room: one line each; then it works and gives the file alone."""
    name = VERBS[verb][1]
    (tmp_path / name).mkdir()
    assert_one_line(finish(words_of(verb, inputs, name), tmp_path), f"out is '{name}', which is a folder")
    (tmp_path / name).rmdir()
    tmp_path.chmod(0o555)
    ended = finish(words_of(verb, inputs, name), tmp_path, Harm(obey=True))
    tmp_path.chmod(0o755)
    assert_one_line(ended, "Permission denied: '.'")
    (tmp_path / "file").write_text("mine")
    assert_one_line(finish(words_of(verb, inputs, f"file/{name}"), tmp_path), "Not a directory: 'file'")
    (tmp_path / "file").unlink()
    (tmp_path / name).write_text("of an earlier run")
    ended = finish(words_of(verb, inputs, name), tmp_path, Harm(file_size=20))
    assert ended.code == 2, ended.err
    assert "File too large" in ended.err
    assert "Traceback" not in ended.err
    assert contents(tmp_path) == {name: b"of an earlier run"}
    ended = finish(words_of(verb, inputs, name), tmp_path)
    assert ended.code == 0, ended.err
    assert sorted(contents(tmp_path)) == [name]
    assert (tmp_path / name).read_bytes() != b"of an earlier run"
