"""The table of mixers: it holds them all, says what is known of some, and the documentation shows it as it is."""

import re
from pathlib import Path

import pytest

from omnissm import __main__ as cli
from omnissm.ssmcore.mixers import MIXERS
from omnissm.ssmcore.mixers.table import mixer_rows, mixer_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "mixers.md"


@pytest.fixture(scope="module")
def table():
    return mixer_table(markdown=True)


def test_documentation_shows_the_table(table):
    shown = re.search(r"<!-- omnissm mixers --markdown true -->\n(.*?)<!-- end -->", PAGE.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == table, "paste what `omnissm mixers --markdown true` prints into docs/mixers.md"


def test_verb_lists_all_mixers(capsys):
    assert cli.main(["mixers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "kind", "sees", "packed", "linear", "state", "parameters", "kernels"]
    assert [line.split()[0] for line in lines[1:]] == sorted(MIXERS)


def test_known_facts():
    rows = {row.name: row for row in mixer_rows()}
    assert rows["mamba2"].parameters == 3_764_552
    assert rows["mamba2"].state == f"{24 * 64 * 128 + (1536 + 256) * 3:,}"
    assert {"ssd", "ssd_step", "causal_conv1d", "conv_step", "gated_norm"} == set(rows["mamba2"].kernels)
    assert rows["hydra"][2:6] == ("both sides", True, True, "none")
    assert rows["s4d"].sees == "past or both sides"
    assert rows["attention"].state == f"{2 * 768:,} per position"
    assert not rows["paragru"].linear
    assert not rows["dense"].packed
    assert rows["graph_ssm"].kind == "graph"
