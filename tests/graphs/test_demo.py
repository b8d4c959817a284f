"""The quick start on graphs, small."""

import numpy as np
import pytest

from omnissm.graphs.data import SyntheticGraphs
from omnissm.graphs.demo import demo


def test_small_demo_leaves_its_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    code = demo(tmp_path, epochs=1, samples=256)
    exact, predicted = np.loadtxt(tmp_path / "predictions.csv", delimiter=",", skiprows=1).T
    graphs = SyntheticGraphs("path_sum").read_parts()["test"]
    wanted = [float(graph.y[-1, 0]) for graph in graphs]
    np.testing.assert_allclose(exact, wanted, atol=1e-5)
    text = (tmp_path / "summary.md").read_text()
    assert f"error (RMSE) of {np.sqrt(np.mean((exact - predicted) ** 2)):.3f}" in text  # the verb's and the table's
    assert ("NOT better" in text) == bool(code)
    for name in ("predictions.png", "influence.png"):
        assert f"({name})" in text
        assert (tmp_path / name).stat().st_size > 10_000
    assert "$ omnissm graphs predict" in capsys.readouterr().out
