"""The quick start on images, small."""

import csv

import numpy as np
import pytest
from PIL import Image

from omnissm.vision.demo import demo, simple_methods, write_images


def test_images_are_split_and_named_by_what_they_are(tmp_path):
    pixels = np.arange(3 * 64).reshape(3, 64) % 17
    write_images(tmp_path, pixels, np.array([7, 0, 7]), 2)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert found == ["test/7/is_7_0002.png", "train/0/is_0_0001.png", "train/7/is_7_0000.png"]
    assert Image.open(tmp_path / found[0]).size == (32, 32)


def test_simple_methods_are_measured_on_the_test_part():
    pytest.importorskip("sklearn")
    pixels = np.repeat([[0.0, 16.0], [16.0, 0.0]], 6, axis=0)[[0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]]
    labels = np.tile([0, 1], 6)
    assert set(simple_methods(pixels, labels, 8).values()) == {1.0}
    assert set(simple_methods(pixels, np.concatenate([labels[:8], 1 - labels[8:]]), 8).values()) == {0.0}


def test_small_demo_leaves_its_files(tmp_path, capsys):
    """So little training is too little: the exit code says so, and the page too."""
    pytest.importorskip("sklearn")
    for _ in range(2):  # into the same folder again
        assert demo(tmp_path, epochs=1, limit=120) == 1
    text = (tmp_path / "summary.md").read_text()
    assert "NOT more than logistic regression" in text
    assert Image.open(tmp_path / "sheet.png").width > 500
    with open(tmp_path / "predictions.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 24
    assert "$ omnissm vision predict" in capsys.readouterr().out
