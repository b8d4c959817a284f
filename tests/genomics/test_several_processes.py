"""Variants scored by several processes from the command line end in the files of one process."""

import os
import subprocess
import sys

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
