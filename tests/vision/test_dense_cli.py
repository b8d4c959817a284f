"""The guide's commands for pixels and boxes, what they leave, and the faults of users."""

import csv
import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omnissm.__main__ import main

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "dense.md"
BOXES = importlib.util.find_spec("pycocotools") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the guide's own code and its quick commands make; those of detectors need pycocotools."""
    place = tmp_path_factory.mktemp("dense")
    code = next(b for b in re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.M | re.S) if "cells" in b)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        exec(code, {})
        lines = re.findall(r"^omnissm (.*)$", GUIDE.read_text(), re.M)
        assert len(lines) == 8
        for line in lines:
            if "export-graph" not in line and (BOXES or "detect" not in line):
                assert main(shlex.split(line)) == 0, line
    return place


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_segmentation_leaves_its_files(folder):
    rows = table(folder / "areas.csv")
    assert len(rows) == 3 * 22
    assert sum(float(row["share"]) for row in rows) == pytest.approx(22, abs=1e-3)
    found = {row["class"]: float(row["iou"]) for row in table(folder / "classes.csv")}
    assert set(found) == {"background", "disc", "square", "mean"}
    assert found["mean"] > 0.4  # chance is 0.27
    mask = Image.open(folder / "drawings" / "train_0.mask.png")
    assert (mask.mode, mask.size) == ("P", (64, 48))
    values = np.asarray(mask)
    row = next(r for r in rows if Path(r["path"]).stem == "train_0" and r["class"] == "disc")
    assert (values == 1).sum() == int(row["pixels"])
    drawn = np.asarray(Image.open(folder / "drawings" / "train_0.png")).astype(int)
    plain = np.asarray(Image.open(folder / "cells/images/train_0.png")).astype(int)
    assert (abs(drawn - plain).sum(-1) > 0)[values > 0].mean() > 0.9  # coloured where there is something
    assert (drawn == plain)[values == 0].all()
    assert min(Image.open(folder / "masks.png").size) > 100


@pytest.mark.skipif(not BOXES, reason="needs pycocotools")
def test_detection_leaves_its_files(folder):
    assert [row["class"] for row in table(folder / "precision.csv")] == ["disc", "square", "mean"]
    assert table(folder / "precision.csv")[-1]["boxes"] == "12"
    for row in table(folder / "boxes.csv"):
        assert row["class"] in ("disc", "square")
        assert float(row["score"]) >= 0.05
        assert 0 <= float(row["x0"]) <= float(row["x1"]) <= 64
        assert 0 <= float(row["y0"]) <= float(row["y1"]) <= 48
    assert min(Image.open(folder / "boxes.png").size) > 100


def test_boxes_are_drawn_where_they_are():
    from omnissm.vision.dense.detectors import Found
    from omnissm.vision.dense.draw import colours, draw_boxes

    image = torch.zeros(3, 80, 90, dtype=torch.uint8)
    found = Found(torch.tensor([[40.0, 50, 70, 70]]), torch.tensor([0.5]), torch.tensor([1]))
    drawn = draw_boxes(image, found, ["a", "b"])
    assert drawn[:, 60, 40].tolist() == list(colours(2)[1])
    assert drawn[:, 60, 55].tolist() == [0, 0, 0]
    assert torch.equal(draw_boxes(image, Found(*(v[:0] for v in found)), ["a", "b"]), image)
    assert len(set(colours(20))) == 20


def test_windows_and_bad_files(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    Image.fromarray(np.full((70, 130, 3), 120, np.uint8)).save("large.png")
    Path("cut.png").write_bytes(Path("large.png").read_bytes()[:60])
    words = ["vision", "predict", "--checkpoint", "runs/segment", "--out", "w.csv", "--sheet", "null"]
    assert main([*words, "--images", "[large.png, cut.png]"]) == 2
    assert "'cut.png' cannot be read" in capsys.readouterr().err
    assert main([*words, "--images", "[large.png, cut.png]", "--window", "true", "--on_bad", "skip"]) == 0
    rows = table(Path("w.csv"))
    assert sum(int(row["pixels"]) for row in rows[:3]) == 70 * 130
    assert "cut.png" in rows[3]["error"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "--checkpoint", "nowhere", "--data", "cells"], "no model at 'nowhere'"),
        (["evaluate", "--checkpoint", "runs/segment", "--data", "gone"], "'gone' does not exist"),
        (["evaluate", "--checkpoint", "runs/segment", "--data", "cells", "--part", "test"], "no part 'test'"),
        (["evaluate", "--checkpoint", "runs/segment", "--data", "cells", "--out", "a.txt"], ".csv"),
        (["export-graph", "--checkpoint", "runs/segment", "--out", "a.zip"], ".pt2 or .onnx"),
        (["export-graph", "--checkpoint", "runs/segment", "--out", "a.pt2", "--batch", "0"], "at least 1 image"),
        (["evaluate", "--checkpoint", "runs/segment", "--data", "cells", "--device", "tpu9"], "unknown device 'tpu9'"),
        (["evaluate", "--checkpoint", "runs/segment", "--data", "cells", "--device", "cuda:99"], "is not there"),
        (["predict", "--checkpoint", "runs/segment", "--images", "[cells]", "--threshold", "2"], "in [0, 1], got 2"),
        (
            ["fit", "--config", "segment.yaml", "--run", "other", "--model.init_args.head", "unet"],
            "head must be one of",
        ),
    ],
)
def test_faults_of_the_user(folder, monkeypatch, capsys, words, message):
    monkeypatch.chdir(folder)
    assert main(["vision", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_evaluation_sees_no_image_of_the_training(folder, tmp_path, monkeypatch):
    """Without a table the split that was trained with, its share and seed, is in the saved model."""
    import shutil

    from omnissm.vision.data import MaskFolder
    from omnissm.vision.dense import predictor, verbs

    for name in ("images", "masks"):
        shutil.copytree(folder / "cells" / name, tmp_path / "cells" / name)
    monkeypatch.chdir(folder)
    about = MaskFolder(tmp_path / "cells", ["a", "b", "c"], val_share=0.4, seed=5, image_size=32)
    trained = {path.name for path in about.part("train").paths}
    model = predictor.load("runs/segment")
    assert model.split == {"table": "labels.csv", "val_share": 0.1, "seed": 0}
    monkeypatch.setattr(predictor, "load", lambda *_: dataclasses.replace(model, split=about.state()["split"]))
    read = []
    monkeypatch.setattr(MaskFolder, "eval_loader", _noting(MaskFolder.eval_loader, read))
    for part, count in (("val", 9), ("all", 22)):
        read.clear()
        verbs.evaluate(Path("runs/segment"), tmp_path / "cells", str(tmp_path / "a.csv"), part)
        assert len(read) == count
        assert int(table(tmp_path / "a.csv")[-1]["pixels"]) == count * 48 * 64
        assert trained.isdisjoint(read) is (part == "val")


def _noting(loader, read):
    def noted(self, name):
        read.extend(path.name for path in self.part(name).paths)
        return loader(self, name)

    return noted


def test_no_drawing_replaces_another():
    from omnissm.vision.dense.verbs import _names

    names = _names([Path(p) for p in ("a.png", "b/a.png", "a_2.png", "a.mask.png", "c.mask.png", "c.png")])
    files = [f"{name}{end}" for name in names for end in (".png", ".mask.png")]
    assert len(set(files)) == 12
    assert names[0] == "a"


def test_the_legend_of_many_classes_fits_the_sheet(tmp_path):
    from omnissm.vision.dense.draw import colours, write_sheet

    classes = [f"class {k}" for k in range(60)]
    write_sheet([("x", torch.zeros(3, 40, 40, dtype=torch.uint8))], classes, tmp_path / "s.png")
    seen = {tuple(pixel) for pixel in np.asarray(Image.open(tmp_path / "s.png")).reshape(-1, 3).tolist()}
    assert set(colours(60)) <= seen


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["segment", "detect"])
def test_exported_graphs_compute_the_same(folder, monkeypatch, name):
    if name == "detect" and not BOXES:
        pytest.skip("needs pycocotools")
    from omnissm.vision.dense.predictor import load
    from omnissm.vision.tasks import normalized

    monkeypatch.chdir(folder)
    assert main(["vision", "export-graph", "--checkpoint", f"runs/{name}", "--out", f"{name}.pt2"]) == 0
    program = torch.export.load(f"{name}.pt2")
    own = [str(node.target) for node in program.graph.nodes if "ssm" in str(node.target)]
    assert own == []  # torch's own functions only
    model = load(f"runs/{name}")
    images = torch.rand(3, 3, *model.image_size)
    with torch.no_grad():
        expected = model.net(normalized(images, model.net))
        found = program.module()(images)
    for a, b in zip([expected] if name == "segment" else expected, [found] if name == "segment" else found):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)


ATTENTIVE = {"dims": (8, 8, 12, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 2), "window_size": (5, 3, 3, 3)}
VIM2 = {"dim": 8, "depths": (1, 2, 1, 1), "d_state": 4}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("backbone", "options", "head"), [("segman_t", ATTENTIVE, "segman"), ("vim2_tiny", VIM2, "fpn")]
)
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_graphs_of_the_larger_pyramids_compute_the_same(tmp_path, backbone, options, head, suffix):
    from omnissm.vision.dense.predictor import DenseModel
    from omnissm.vision.dense.segmenter import create_segmenter
    from omnissm.vision.tasks import normalized

    torch.manual_seed(0)
    net = create_segmenter(backbone, 3, options, head=head, head_args={"width": 8}).eval()
    _same_graph(DenseModel("segmentation", net, ("a", "b", "c"), (32, 48)), tmp_path / f"graph{suffix}")
    with torch.no_grad():
        logits = net(normalized(torch.rand(1, 3, 32, 48), net))
    assert float(logits.std()) > 1e-3  # the comparison is of something


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_onnx_of_a_detector_computes_the_same(tmp_path):
    from omnissm.vision.dense.detectors import create_detector
    from omnissm.vision.dense.predictor import DenseModel

    torch.manual_seed(0)
    small = {"widths": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}
    net = create_detector("yolo", 2, (32, 64), backbone_args=small).eval()
    _same_graph(DenseModel("detection", net, ("a", "b"), (32, 64)), tmp_path / "detector.onnx")


def _same_graph(model, out):
    """Write a graph, run it where it runs without this package, and compare."""
    from omnissm.vision.dense.export import write_graph
    from omnissm.vision.tasks import normalized

    runtime = None
    if out.suffix == ".onnx":
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
    write_graph(model, out)
    images = torch.rand(3 if runtime is None else 1, 3, *model.image_size)
    with torch.no_grad():
        expected = model.net(normalized(images, model.net))
        if runtime is None:
            program = torch.export.load(out)
            called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
            assert [name for name in called if name.startswith("ssm.")] == []  # torch's own functions only
            found = program.module()(images)
        else:
            session = runtime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
            names = ["boxes", "scores"] if model.kind == "detection" else ["logits"]
            arrays = session.run(names, {"image": images.numpy()})
            found = tuple(torch.from_numpy(array) for array in arrays)
            found = found if isinstance(expected, tuple) else found[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
