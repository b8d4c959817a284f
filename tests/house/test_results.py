"""The page of results: made from result files alone, and new files appear on it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Numbers of other people's papers, which no command of ours makes.
PUBLISHED = {".405", ".424", ".318", ".375"}


@pytest.fixture
def page(monkeypatch):
    """The function that fills a text from a folder of result files."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import table

    yield table.page
    for name in ("table", "tables"):
        del sys.modules[name]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_page_is_that_of_the_result_files():
    command = [sys.executable, ROOT / "benchmarks" / "table.py", "--check"]
    assert subprocess.run(command).returncode == 0, "run `python benchmarks/table.py`"


def test_text_states_no_measured_number():
    text = re.sub(r"`[^`]*`|^    .*$", "", (ROOT / "benchmarks" / "page.md").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"\d*\.\d+", text)) == PUBLISHED


def test_new_files_appear(page, tmp_path):
    write(
        tmp_path / "vision" / "new.json", {"command": "make it", "rows": [{"model": "m", "accuracy": 0.5, "n": 1234}]}
    )
    write(
        tmp_path / "mixed.json", {"rows": [{"job": "a", "ms": {"median": 2.5, "p20": 2}}, {"job": "b", "skipped": "x"}]}
    )
    write(tmp_path / "single.json", {"metrics": {"test/mse": 0.25}, "config": "c", "more": [1]})
    text = page("# Results\n", tmp_path)
    assert text.count("## Other measurements") == 1
    assert "| model | accuracy | n |\n| --- | --- | --- |\n| `m` | 0.5 | 1,234 |\n" in text
    assert "`benchmarks/results/vision/new.json`; `make it`." in text
    assert "| job | ms |\n| --- | --- |\n| a | 2.5 |\n" in text
    assert "| mse | config |\n| --- | --- |\n| 0.2500 | `c` |\n" in text


def test_rows_of_several_calls_name_each_command_and_commit(page, tmp_path):
    calls = [{"x": k, "commit": commit, "command": command} for k, commit, command in ((1, "a", "p"), (2, "b", "q"))]
    write(tmp_path / "t.json", {"device": "G", "rows": [*calls, {**calls[0], "x": 3}]})
    assert "`benchmarks/results/t.json`; G; commit a, b; `p`; `q`." in page("{{ rows t.json | x }}\n", tmp_path)


def test_marks_choose_columns_and_rows(page, tmp_path):
    rows = [
        {"set": s, "method": m, "seed": k, "rmse": v, "job": m}
        for s, m, k, v in [("x", "a", 0, 1.0), ("x", "a", 1, 3.0), ("x", "b", 0, float("nan")), ("y", "a", 0, 0.12345)]
    ]
    write(
        tmp_path / "t" / "gaps.json",
        {"rows": rows, "device": "a CPU", "torch": "2.9.0+cpu", "threads": 2, "notes": "N."},
    )
    text = page(
        "{{ rows t/*.json | set, rmse | job=b }}\n{{ if q.json }}\nno\n{{ end }}\n{{ if t/*.json }}\nyes\n{{ end }}\n",
        tmp_path,
    )
    assert "| set |\n| --- |\n| x |\n" in text
    assert "a CPU, 2 threads, torch 2.9.0." in text
    assert "\nN.\n" in text
    assert "yes" in text
    assert "no\n" not in text
    assert "Other measurements" not in text
    text = page("{{ seeds t/*.json | set, method | rmse }}\n", tmp_path)
    assert "| x | a | 2.000 ± 1.414 | 2 |" in text
    text = page("{{ pivot t/*.json | set | method | rmse }}\n", tmp_path)
    assert "| x | 1.0000, 3.0000 | - |" in text
    assert "| y | 0.1235 |  |" in text


def test_operators_say_a_note_of_several_files_once(page, tmp_path):
    for op, note in (("ssd", "N."), ("dag_scan", "M."), ("ema_scan", "N.")):
        write(tmp_path / "gpu" / f"{op}.json", {"op": op, "device": "G", "commit": "abc", "notes": note, "rows": []})
    text = page("{{ operators */*.json }}\n", tmp_path)
    assert "\n`dag_scan`: M.\n\n`ema_scan`, `ssd`: N.\n" in text


def test_operators_name_what_is_not_timed(page, tmp_path):
    spread = {"median": 1.5, "p20": 1.0, "p80": 2.0}
    times = dict.fromkeys(("forward_ms", "forward_backward_ms", "forward_graph_ms"), spread)
    row = {
        "size": {"b": 2, "state": False},
        "dtype": "float32",
        "path": "chunked",
        **times,
        "forward_backward_graph_ms": None,
    }
    row |= {"forward_floor_ms": 0.1, "forward_backward_floor_ms": 0.2, "required_ms": [1, 2], "peak_mib": None}
    skipped = {"size": {"b": 2}, "dtype": "float32", "path": "triton", "skipped": "no GPU"}
    write(tmp_path / "gpu" / "ssd.json", {"op": "ssd", "device": "G", "commit": "abc", "rows": [row, skipped]})
    write(tmp_path / "gpu" / "core.json", {"rows": [{"path": "x"}]})
    text = page("{{ operators */*.json }}\n{{ untimed */*.json }}\n", tmp_path)
    assert "| `ssd`, b 2, float32 | chunked | 1.500 / 1.500 | 0.100 / 0.200 | 1 / 2 |\n" in text
    assert "G. Commits: `ssd` abc." in text
    untimed = text.partition("Not timed yet:")[2].partition("\n")[0]
    assert "`linear_scan`" in untimed
    assert "`ssd`" not in untimed
    assert "**gpu/core**" in text


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("{{ rows nowhere/*.json }}", "no file"),
        ("{{ colour *.json }}", "unknown kind 'colour'"),
        ("{{ rows a.json | x | job=z }}", "no row with job=z"),
        ("{{ rows a.json | y }}", "none of the columns y"),
    ],
)
def test_marks_that_cannot_be_filled(page, tmp_path, mark, message):
    write(tmp_path / "a.json", {"rows": [{"job": "b", "x": 1}]})
    with pytest.raises(ValueError, match=message):
        page(mark + "\n", tmp_path)
