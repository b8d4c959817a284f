"""The verbs of graphs, from a file to pictures; the commands of the guide."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from omnissm.__main__ import main
from omnissm.graphs import Graph
from omnissm.graphs.data import write_packed

NODES = ["--data.init_args.level", "node", "--data.init_args.target", "classes"]
GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "graphs.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the guide's own code and commands leave."""
    place = tmp_path_factory.mktemp("graphs")
    code = next(b for b in re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.M | re.S) if "mine" in b)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        exec(code, {})
        lines = re.findall(r"^omnissm (.*)$", GUIDE.read_text(), re.M)
        assert len(lines) == 7
        for line in lines:
            assert main(shlex.split(line)) == 0, line
    return place


def test_the_guide_leaves_its_files(folder):
    from PIL import Image
    from safetensors.torch import load_file

    metrics = json.loads((folder / "runs/mine/metrics.json").read_text())["metrics"]
    assert set(metrics) == {"test/loss", "test/auroc", "test/ap"}
    assert load_file(folder / "runs/mine/predictions.safetensors")["prediction"].shape == (50, 1)
    for name in ("influence.png", "levels.png"):
        picture = Image.open(folder / name).convert("RGB")
        assert min(picture.size) > 300
        assert len(picture.getcolors(1 << 20)) > 100


def test_describe(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["graphs", "describe", "--data", "mine.npz"]) == 0
    out = capsys.readouterr().out
    assert "300 undirected graphs: 200 train, 50 val, 50 test" in out
    assert "nodes     16 to 16" in out
    assert "300 with cycles" in out
    assert "2 columns" not in out


def test_describe_graphs_without_edges(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    no_edges = torch.zeros(2, 0, dtype=torch.int64)
    graph = Graph(torch.ones(3, 1), no_edges, torch.zeros(0, 2), y=torch.zeros(1))
    write_packed("bare.npz", [graph], ["train"])
    assert main(["graphs", "describe", "--data", "bare.npz"]) == 0
    out = capsys.readouterr().out
    assert "edge_attr 2 columns of float32, none" in out
    assert "y         1 columns of float32, 0 to 0" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["describe", "--data", "gone.npz"], "'gone.npz' does not exist"),
        (["plot"], "either --data or --synthetic"),
        (["plot", "--data", "mine.npz", "--graph", "300"], "has 300"),
        (["plot", "--data", "mine.npz", "--node", "16", "--model", "chimera_graph_tiny"], "node 16 is not there"),
        (["plot", "--data", "mine.npz", "--model", "gcn"], "has 0 state-space layers"),
        (["plot", "--data", "mine.npz", "--model", "chimera_graph_tny"], "Did you mean 'chimera_graph_tiny'"),
        (["plot", "--data", "mine.npz", "--model", "dag_ssm_tiny"], "Orient the edges"),
        (["describe", "--data", "empty.npz"], "holds no graph"),
        (["fit", "-c", "mine.yaml", "--run", "x", "--data.init_args.node_columns", "[1]"], "has columns 0 to 0"),
        (["fit", "-c", "mine.yaml", "--run", "x", *NODES], "gives 800 answers, the data have 50 labels"),
        (["plot", "--data", "mine.npz", "--checkpoint", "nowhere"], "no model at 'nowhere'"),
        (["plot", "--data", "mine.npz", "--out", "a.txt"], ".png"),
        (["fit", "-c", "mine.yaml", "--run", "x", "--model.init_args.model", "chimera"], "Unknown graph model"),
    ],
)
def test_faults_of_the_user(folder, monkeypatch, capsys, words, message):
    monkeypatch.chdir(folder)
    pointer, no_edges = np.zeros(1, np.int64), np.zeros((2, 0), np.int64)
    nothing = {"node_ptr": pointer, "edge_ptr": pointer, "x": np.zeros((0, 1)), "edge_index": no_edges}
    np.savez("empty.npz", **nothing, y=np.zeros((0, 1)), split=np.zeros(0, np.uint8))
    assert main(["graphs", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
