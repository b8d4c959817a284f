"""`benchmarks/vision.py`: what it times first, how it goes on after a stop, and its plot."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("one", "two", "three")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("vision", None)
    import vision

    timed = []

    def time_model(name, *, image_size, batch_size, compile, training, **_):
        timed.append((name, image_size, compile))
        row = {"model": name, "image_size": image_size, "batch_size": batch_size, "compile": compile}
        return row | {"inference_images_per_s": 100.0, "inference_peak_mb": 7.0, "trained": training}

    monkeypatch.setattr(vision, "time_model", time_model)
    monkeypatch.setattr(vision.gc, "collect", lambda: 0)  # a second each beside what other tests have loaded
    yield vision, timed
    sys.modules.pop("vision", None)


def test_what_is_compared_comes_first(script):
    vision, _ = script
    found = vision.cases(NAMES, [224, 384, 768], True)
    assert len(found) == len(set(found)) == 3 * 3 * 2
    assert found[:4] == [("one", 224, False), ("two", 224, False), ("one", 224, True), ("two", 224, True)]
    assert found[4:6] == [("one", 768, False), ("two", 768, False)]
    assert set(found[:12]) == {(name, size, how) for name in NAMES[:2] for size in (224, 384, 768) for how in (0, 1)}
    assert found[12:15] == [("three", 224, False), ("three", 224, True), ("three", 768, False)]
    (fixed,) = vision.ONE_SIZE
    assert [case for case in vision.cases((*NAMES, fixed), [224, 384], False) if case[0] == fixed] == [
        (fixed, 224, False)
    ]
    assert vision.cases(NAMES, [224], False) == [(name, 224, False) for name in NAMES]


def test_goes_on_after_a_stop(script, tmp_path, capsys):
    vision, timed = script
    words = ["--device", "cpu", "--models", *NAMES, "--sizes", "64", "96", "--out", str(tmp_path), "--commit", "abc"]
    vision.main([*words[:-4], *words[-4:], "--models", "one", "two", "--sizes", "64"])
    assert timed == [("one", 64, False), ("two", 64, False)]
    vision.main([*words, "--seconds", "0"])
    assert "4 rows to go" in capsys.readouterr().out
    vision.main(words)
    assert len(timed) == len(set(timed)) == 6
    (path,) = tmp_path.glob("*/vision.json")
    assert [row["model"] for row in json.loads(path.read_text())["rows"]][:4] == ["one", "two", "one", "two"]
    vision.main([*words[:-1], "def"])  # rows of other code are not kept
    assert len(timed) == 12
    vision.main([*words[:-1], "def", "--again", "--seconds", "0"])
    vision.main([*words[:-1], "def"])
    assert len(timed) == 12


def test_plot(script, tmp_path):
    pytest.importorskip("matplotlib")
    vision, _ = script
    words = ["--device", "cpu", "--models", *NAMES, "--sizes", "64", "96", "--out", str(tmp_path)]
    picture = tmp_path / "new" / "sizes.png"
    with pytest.raises(SystemExit):
        vision.main(["plot", *words, "--picture", str(picture)])
    vision.main(words)
    vision.main(["plot", *words, "--picture", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(picture.parent.iterdir()) == [picture]
