"""Model folders and checkpoint files: round trips, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from omnissm.ssmcore.training import (
    checkpoints,
    export_checkpoint,
    load_weights,
    read_checkpoint,
    read_model_folder,
    read_weights,
    save_model_folder,
    write_atomic,
)

CONFIG = {"model": "timeseries/line", "args": {"width": 4}, "task": {"loss": "mse"}}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("counts", torch.arange(4))
        self.register_buffer("empty", torch.zeros(0))


def test_folder_round_trip(tmp_path):
    model = Tied()
    folder = save_model_folder(tmp_path / "model", model.state_dict(), CONFIG, {"data.json": "{}"})
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "data.json",
        "model.safetensors",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    found = read_model_folder(folder)
    assert {key: found.config[key] for key in CONFIG} == CONFIG
    assert found.files == {"data.json": "{}"}
    assert set(found.state) == {"embed.weight", "counts", "empty"}  # tied weights once
    other = Tied()
    assert load_weights(other, found.state) == ""
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert "timeseries/line" in (folder / "README.md").read_text()


def test_weights_are_stored_as_float32_unless_asked(tmp_path):
    state = {"w": torch.randn(3, dtype=torch.float64), "n": torch.tensor([1, 2])}
    assert read_weights(save_model_folder(tmp_path / "a", state, CONFIG))["w"].dtype == torch.float32
    kept = read_weights(save_model_folder(tmp_path / "b", state, CONFIG, dtype=None))
    torch.testing.assert_close(kept, state, rtol=0, atol=0)
    half = read_weights(save_model_folder(tmp_path / "c", state, CONFIG, dtype=torch.float16))
    assert (half["w"].dtype, half["n"].dtype) == (torch.float16, torch.int64)


def test_views_of_one_storage_are_not_taken_for_tied(tmp_path):
    whole = torch.arange(6.0)
    found = read_weights(save_model_folder(tmp_path / "a", {"x": whole[:3], "y": whole[3:]}, CONFIG))
    torch.testing.assert_close(found, {"x": whole[:3], "y": whole[3:]})


def test_failed_write_keeps_the_old_folder(tmp_path, monkeypatch):
    folder = save_model_folder(tmp_path / "model", {"w": torch.ones(2)}, CONFIG)

    def fail(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoints, "write_atomic", fail)
    with pytest.raises(OSError, match="No space left"):
        save_model_folder(folder, {"w": torch.zeros(2)}, CONFIG)
    monkeypatch.undo()
    assert read_weights(folder)["w"].tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    save_model_folder(folder, {"w": torch.zeros(2)}, CONFIG)
    assert read_weights(folder)["w"].tolist() == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_foreign_folder_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"exists and is not a model folder"):
        save_model_folder(tmp_path, {"w": torch.ones(1)}, CONFIG)
    assert (tmp_path / "thesis.tex").exists()


def test_write_atomic(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_atomic(path, "one")
    write_atomic(path, b"two")
    assert path.read_text() == "two"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_atomic(tmp_path / "folder", "x")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["deep", "folder", "plain"]


def test_damaged_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not a model folder: config.json is missing"):
        read_model_folder(tmp_path)
    folder = save_model_folder(tmp_path / "model", {"w": torch.ones(100)}, CONFIG)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:50])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or cut off") as caught:
        read_model_folder(folder)
    assert "\n" not in str(caught.value)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        read_model_folder(folder)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "omnissm": "99.1.0"}))
    with pytest.raises(ValueError, match=r'written by omnissm 99.1.0.*pip install "omnissm>=99.1.0"'):
        read_model_folder(folder)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_checkpoints_never_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "x": Evil()}, "evil.ckpt")
    with pytest.raises(ValueError, match=r"holds more than plain values"):
        read_checkpoint("evil.ckpt")
    assert not Path("pwned").exists()


def test_checkpoints_that_are_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    with pytest.raises(FileNotFoundError, match=r"a.ckpt' does not exist"):
        read_checkpoint(path)
    torch.save({"state_dict": {"net.w": torch.ones(1000)}}, path)
    with pytest.raises(ValueError, match=r"not written by a task"):
        export_checkpoint(path, tmp_path / "model")
    for cut in (0, 3, 500):
        (tmp_path / "cut.ckpt").write_bytes(path.read_bytes()[:cut])
        with pytest.raises(ValueError, match=r"cut.ckpt' is damaged"):
            read_checkpoint(tmp_path / "cut.ckpt")
    torch.save(torch.ones(2), tmp_path / "tensor.ckpt")
    with pytest.raises(ValueError, match=r"holds a Tensor, expected a dictionary"):
        read_checkpoint(tmp_path / "tensor.ckpt")
    torch.save({"w": torch.ones(2)}, tmp_path / "w.bin")
    with pytest.raises(ValueError, match=r"is a pickle file.*allow_pickle=True"):
        read_weights(tmp_path / "w.bin")
    assert read_weights(tmp_path / "w.bin", allow_pickle=True)["w"].tolist() == [1, 1]


def test_averaged_weights_are_exported_unless_raw(tmp_path):
    content = {
        "state_dict": {"net.w": torch.ones(2)},
        "current_model_state": {"net.w": torch.zeros(2)},
        "omnissm": {"config": CONFIG, "files": {"data.json": "{}"}},
    }
    torch.save(content, tmp_path / "a.ckpt")
    assert read_weights(export_checkpoint(tmp_path / "a.ckpt", tmp_path / "m"))["w"].tolist() == [1, 1]
    assert read_weights(export_checkpoint(tmp_path / "a.ckpt", tmp_path / "m", raw=True))["w"].tolist() == [0, 0]


def test_misfits_are_named():
    model = nn.Linear(2, 3)
    state = {"weight": torch.ones(3, 5), "scale": torch.ones(1)}
    message = r"`weight` is \(3, 5\), expected \(3, 2\); `bias` is missing; `scale` is not in the model"
    with pytest.raises(ValueError, match=message):
        load_weights(model, state)
    before = model.weight.clone()
    assert "`bias` is missing" in load_weights(model, {"weight": torch.ones(3, 2)}, strict=False)
    assert not torch.equal(model.weight, before)


def test_reading_a_model_loads_no_lightning():
    code = (
        "import sys, omnissm.ssmcore.training as t; t.read_model_folder; t.param_groups;"
        "sys.exit('pytorch_lightning' in sys.modules or 'jsonargparse' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
