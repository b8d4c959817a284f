"""The verbs of vision, from images in folders to a table and pictures; the commands of the guide."""

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from omnissm.__main__ import main

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "vision.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the guide's own code makes."""
    place = tmp_path_factory.mktemp("vision")
    code = next(b for b in re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.M | re.S) if "photos" in b)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        exec(code, {})
        lines = re.findall(r"^omnissm (.*)$", GUIDE.read_text(), re.M)
        assert len(lines) == 7
        for line in lines:
            assert main(shlex.split(line)) == 0, line
    return place


def test_the_guide_leaves_its_files(folder):
    rows = list(csv.DictReader((folder / "classes.csv").read_text().splitlines()))
    assert len(rows) == 12
    assert {row["class1"] for row in rows} <= {"red", "blue"}
    assert sum(Path(row["path"]).parent.name == row["class1"] for row in rows) == 12  # two colours are easy
    assert json.loads((folder / "runs/photos/metrics.json").read_text())["metrics"]["test/accuracy"] == 1.0
    for name in ("sheet.png", "field.png", "matrix.png"):
        assert min(Image.open(folder / name).size) > 100
    assert [path.name for path in sorted((folder / "shards").iterdir())] == ["classes.json", "train-00000.tar"]


def test_predict_names_bad_files(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    whole = (folder / "photos/test/red/0.png").read_bytes()
    Path("cut.png").write_bytes(whole[: len(whole) // 2])
    words = ["vision", "predict", "--checkpoint", "runs/photos", "--images", "[cut.png, photos/test/blue]"]
    assert main([*words, "--out", "a.csv"]) == 2
    assert "'cut.png' cannot be read" in capsys.readouterr().err
    assert not Path("a.csv").exists()
    assert main([*words, "--out", "a.csv", "--on_bad", "skip"]) == 0
    assert "6 images, 1 could not be read" in capsys.readouterr().out
    rows = list(csv.DictReader(Path("a.csv").read_text().splitlines()))
    assert rows[0]["class1"] == ""
    assert "cut.png" in rows[0]["error"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "--checkpoint", "nowhere", "--images", "[photos]"], "no model at 'nowhere'"),
        (["predict", "--checkpoint", "runs/photos", "--images", "[gone.png]"], "gone.png"),
        (["predict", "--checkpoint", "runs/photos", "--images", "[photos]", "--out", "a.txt"], ".csv"),
        (["plot", "--kind", "influence"], "either --checkpoint or --model"),
        (["plot", "--checkpoint", "runs/photos", "--kind", "influence", "--block", "9"], "has 2 blocks"),
        (["plot", "--model", "hydra_vit_tny_patch16_224"], "Did you mean 'hydra_vit_tiny_patch16_224'"),
        (["shard", "--data", "runs", "--out", "x"], "holds no image"),
        (["benchmark", "--models", "hydra"], "Unknown vision model 'hydra'"),
        (["list", "--pattern", "zebra*"], "no model's name is like 'zebra*'"),
        (["benchmark", "--models", "hydra", "--image_size", "32"], "Unknown vision model 'hydra'"),
        (["benchmark", "--models", "test_vit", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["benchmark", "--models", "test_vit", "--threads", "0"], "threads must be at least 1, got 0"),
        (["predict", "--checkpoint", "runs/photos", "--images", "photos", "--top", "0"], "top must be at least 1"),
        (["predict", "--checkpoint", "runs/photos", "--images", "photos", "--batch_size", "-1"], "got -1"),
        (["predict", "--checkpoint", "runs/photos", "--images", "photos", "--drawings", "d"], "leave out --drawings"),
    ],
)
def test_faults_of_the_user(folder, monkeypatch, capsys, words, message):
    monkeypatch.chdir(folder)
    assert main(["vision", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--batch_size", "1", "--image_size", "32", "--training", "false", "--out", "t.json"]
    assert main(["vision", "benchmark", "--models", "[vmamba_tiny_s1l8, test_vit]", *words]) == 0
    rows = json.loads(Path("t.json").read_text())["rows"]
    assert rows[0]["parameters"] == 30_249_064
    assert rows[0]["inference_ms"] > 0
    assert "vmamba_tiny_s1l8" in capsys.readouterr().out
