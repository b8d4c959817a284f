"""Training on two processes (gloo) is that on one, by copies and by shards, in each domain; the guide's commands."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser
from torch.optim import AdamW

from omnissm.ssmcore.training import ShardedStrategy

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "guides" / "distributed.md"
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHORT = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1"]
LAUNCH = {"omnissm": ["-m", "omnissm"], "torchrun": ["-m", "torch.distributed.run"]}


def run(folder, *words):
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("domain", ["timeseries", "genomics", "vision", "graphs"])
def test_two_processes_equal_one(domain, tmp_path):
    options = ["--devices", "2", "--accelerator", "cpu", "--small", "--steps", "11", "--out", "found.json"]
    run(tmp_path, ROOT / "benchmarks" / "distributed.py", "--domain", domain, *options)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["strategy"] for row in found["rows"]] == ["ddp", "fsdp2"]
    for row in found["rows"]:
        assert 0 <= row["difference"] < 1e-3
        assert row["devices"] == 2
        assert row["efficiency"] == pytest.approx(row["samples_per_second"] / (2 * row["samples_per_second_one"]))


@pytest.fixture
def benchmark(monkeypatch):
    """`benchmarks/distributed.py` on a machine where runs take no time: two devices are 1.5 times as fast as one."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    program = import_module("distributed")

    def train(domain, name, options, strategy, batch, steps, device=None):
        folder = options.work / domain / name
        folder.mkdir(parents=True)
        found = {"seconds": steps / (150 if strategy else 200), "devices": 2 if strategy else 1}
        (folder / "clock.json").write_text(json.dumps(found))
        return folder

    monkeypatch.setattr(program, "train", train)
    yield program
    for name in ("distributed", "run", "command", "op_case", "op_peers", "tables"):
        sys.modules.pop(name, None)


def test_calls_complete_a_file(benchmark, tmp_path):
    path = tmp_path / "speed.json"

    def measured(*words, commit, steps=11):
        options = ["--devices", "2", "--accelerator", "cpu", "--only", "speed", "--small", "--steps", str(steps)]
        assert benchmark.main([*options, *words, "--commit", commit, "--out", str(path)]) == 0
        rows = json.loads(path.read_text())["rows"]
        return {(row["domain"], row["strategy"]): (row["commit"], row["steps"]) for row in rows}

    first = {("graphs", "ddp"): ("a", 11), ("graphs", "fsdp2"): ("a", 11), ("vision", "ddp"): ("b", 11)}
    assert measured("--domain", "graphs", commit="a") == dict(list(first.items())[:2])
    assert measured("--domain", "vision", "--strategy", "ddp", commit="b") == first
    again = first | {("graphs", "fsdp2"): ("c", 20)}
    assert measured("--domain", "graphs", "--strategy", "fsdp2", commit="c", steps=20) == again
    content = json.loads(path.read_text())
    assert [row["efficiency"] for row in content["rows"]] == pytest.approx([0.75] * 3)
    said = "python benchmarks/distributed.py --devices 2 --accelerator cpu --only speed --small --steps 20"
    assert content["rows"][-1]["command"] == f"{said} --domain graphs --strategy fsdp2"
    assert content["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ({"torch": "1.0", "rows": []}, r"has rows of .*torch 1\.0, not .*name another file with --out"),
        ({"rows": [{"path": "x"}]}, "is no file that this program wrote"),
        ([], "is no file that this program wrote"),
    ],
)
def test_a_file_of_another_kind_is_refused_first(benchmark, tmp_path, content, answer):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=answer):
        benchmark.main(["--devices", "2", "--accelerator", "cpu", "--small", "--out", str(path)])
    assert json.loads(path.read_text()) == content


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_guide(tmp_path):
    printed = []
    for language, block in BLOCK.findall(GUIDE.read_text()):
        if language == "python":
            run(tmp_path, "-c", block)
            continue
        for line in block.strip().splitlines():
            program, *words = shlex.split(line)
            printed.append(run(tmp_path, *LAUNCH[program], *words, *(SHORT if "fit" in words else [])))
    weights = [tmp_path / "runs" / name / "model" / "model.safetensors" for name in ("copies", "shards")]
    assert all(path.is_file() for path in weights)
    alone = run(tmp_path, *LAUNCH["torchrun"], "--standalone", "--nproc_per_node", "1", "segments.py")
    numbers = [[float(n) for n in re.findall(r"\d+\.\d+", text)] for text in (printed[-1], alone)]
    assert len(numbers[0]) == 2
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)


def test_torchrun_hands_on_the_words_of_the_guide():
    """Its parser takes `--run` for the start of an option of its own, unless `--` stands before."""
    text = GUIDE.read_text().replace("\\\n", " ")
    shown = [shlex.split(line)[1:] for line in text.splitlines() if re.match(r"    torchrun .*omnissm", line)]
    assert len(shown) == 2
    for words in shown:
        parsed = get_args_parser().parse_args(words)
        assert parsed.module
        assert parsed.training_script == "omnissm"
        assert parsed.training_script_args == words[words.index("--") + 1 :]
    assert "--run" in shown[1]


def test_a_checkpoint_before_the_first_step_changes_no_optimiser(monkeypatch):
    """Torch fills an empty optimiser by a step without gradients, which must not count."""
    network = torch.nn.Linear(2, 1)
    strategy, optimizer = ShardedStrategy(), AdamW(network.parameters())
    monkeypatch.setattr(ShardedStrategy, "model", network)
    monkeypatch.setattr(ShardedStrategy, "global_rank", 1)  # whose part stays as torch gives it
    saved = strategy.optimizer_state(optimizer)
    assert not optimizer.state
    assert {float(part["step"]) for part in saved["state"].values()} == {0.0}
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = strategy.optimizer_state(optimizer)
    assert {float(part["step"]) for part in saved["state"].values()} == {1.0}
    assert {float(part["step"]) for part in optimizer.state.values()} == {1.0}
