"""Variants scored by several processes from the command line end in the files of one process."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from omnissm.__main__ import main
from omnissm.genomics import create_model, save_pretrained
from omnissm.genomics.data import synthetic_genome


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sequence = synthetic_genome(4000, seed=1)[0].decode()
    (tmp_path / "g.fa").write_text(f">synthetic\n{sequence}\n")
    torch.manual_seed(0)
    save_pretrained(create_model("hnet_tiny"), tmp_path / "hnet")
    rows = [
        f"synthetic\t{k + 1}\t.\t{sequence[k]}\t{'A' if sequence[k] != 'A' else 'C,G'}\t.\t.\t."
        for k in range(0, 900, 41)
    ]
    head = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    (tmp_path / "v.vcf").write_text(head + "\n".join(rows) + "\n")
    words = ["--variants", "v.vcf", "--reference", "g.fa", "--model", "hnet", "--window", "64", "--part_size", "3"]
    assert main(["genomics", "score", *words, "--out", '["one.vcf", "one.tsv"]', "--device", "cpu"]) == 0
    words += ["--out", '["two.vcf", "two.tsv"]', "--device", "cpu", "--devices", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "omnissm", "genomics", "score", *words],
        env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    for kind in ("vcf", "tsv"):
        assert (tmp_path / f"two.{kind}").read_bytes() == (tmp_path / f"one.{kind}").read_bytes()
    assert "SSM_LLR=" in (tmp_path / "two.vcf").read_text()
    assert not list(tmp_path.glob("*.parts"))


WORDS = ["genomics", "score", "--variants", "v.vcf", "--reference", "g.fa", "--model", "m", "--out", "o.vcf"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--devices", "0"], "expected devices of at least 1"),
        (["--devices", "2", "--shard", "0/4"], "1 for a single shard, got 2"),
        (["--devices", "2", "--device", "cuda:1"], "the first GPUs, or --device cpu for processes on it, got 'cuda:1'"),
        (["--devices", "99"], "device 'cuda:98' is not there"),
        (["--devices", "2", "--device", "cpu", "--variants", "-"], "standard input cannot be read by several"),
    ],
)
def test_devices_that_are_refused(more, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["omnissm", *WORDS, *more])
    monkeypatch.setattr(subprocess, "Popen", None)  # no process begins
    assert main([*WORDS, *more]) == 2
    assert said in capsys.readouterr().err


def test_an_end_reaches_all_processes(tmp_path, monkeypatch, capsys):
    """A request to end the first process ends those that it has started, and says how to go on."""
    monkeypatch.chdir(tmp_path)
    words, ended = [*WORDS, "--devices", "2", "--device", "cpu"], []

    class Run:
        def __init__(self, command):
            self.name, self.over = command[command.index("--shard") + 1], False

        def wait(self):
            if not self.over:
                os.kill(os.getpid(), signal.SIGTERM)

        def terminate(self):
            self.over = True
            ended.append(self.name)

    monkeypatch.setattr(sys, "argv", ["omnissm", *words])
    monkeypatch.setattr(subprocess, "Popen", Run)
    assert main(words) == 143
    assert ended == ["0/2", "1/2"]
    assert "go on with the same command and --resume true" in capsys.readouterr().err


@pytest.mark.parametrize(("codes", "code", "advice"), [([2, 2], 2, "see above"), ([0, -9], 1, "--resume true goes on")])
def test_processes_that_fail(codes, code, advice, tmp_path, monkeypatch, capsys):
    """Bad input is no reason to go on; a process that was killed is."""
    monkeypatch.chdir(tmp_path)
    words, left = [*WORDS, "--devices", "2", "--device", "cpu"], list(codes)
    monkeypatch.setattr(sys, "argv", ["omnissm", *words])
    monkeypatch.setattr(subprocess, "Popen", lambda command: SimpleNamespace(wait=lambda: left.pop(0)))
    assert main(words) == code
    assert f"shards ended with exit codes {codes}; {advice}" in capsys.readouterr().err
