"""`genomics score` and `timeseries protocol`, killed at random moments and taken up again, leave the same files."""

import json
import random
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from harness import finish, kill_often
from tiny import contents

from omnissm.genomics import create_model, save_pretrained
from omnissm.genomics.data import synthetic_genome

GRID = {
    "models": {"last_value": {}, "rlinear": {"lr": 0.01}},
    "data": {
        "waves": {
            "class_path": "omnissm.timeseries.data.Synthetic",
            "init_args": {"length": 200, "variate_count": 2},
        }
    },
    "horizons": [2, 4],
    "seeds": [0, 1],
    "training": {"lookback": 12, "max_epochs": 1},
}
OUTS = ("a.vcf.gz", "a.tsv", "a.parquet")


def write_variants(folder: Path) -> None:
    """A genome, 60 variants and an untrained model; outputs will lie in `out` below."""
    genome, _ = synthetic_genome(3000, seed=1)
    (folder / "g.fa").write_text(f">c\n{genome.decode()}\n")
    head = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    rows = [f"c\t{p + 1}\t.\t{chr(genome[p])}\t{'A' if genome[p] != 65 else 'C'}\t.\t.\t." for p in range(40, 2440, 40)]
    (folder / "v.vcf").write_text(head + "\n".join(rows) + "\n")
    torch.manual_seed(0)
    save_pretrained(create_model("hnet_tiny"), folder / "model")


def score(folder: Path, *more: str) -> list[str]:
    files = {"--variants": "v.vcf", "--reference": "g.fa", "--model": "model"}
    words = [word for option, name in files.items() for word in (option, str(folder / name))]
    outs = json.dumps([f"out/{name}" for name in OUTS])
    return ["genomics", "score", *words, "--out", outs, "--window", "48", "--part_size", "4", *more]


def check_score(folder: Path, kills: list[int], seed: int) -> None:
    write_variants(folder)
    (folder / "whole").mkdir()
    whole = finish(score(folder), folder / "whole")
    assert whole.code == 0, whole.err
    dice = random.Random(seed)
    for number, count in enumerate(kills):
        place = folder / f"killed{number}"
        place.mkdir()
        done = []
        kill_often(score(folder), lambda: score(folder, "--resume", "true"), place, whole.moments, count, dice, done)
        said = f"seed {seed}, kills at {done}"
        found, expected = contents(place / "out"), contents(folder / "whole/out")
        assert sorted(found) == sorted(expected), said
        assert [name for name in found if found[name] != expected[name]] == [], said


def tables(folder: Path) -> tuple[pd.DataFrame, list[dict]]:
    """The table and the cells without what time they took."""
    table = pd.read_csv(folder / "results.csv").drop(columns="seconds")
    cells = [json.loads(path.read_text()) for path in sorted((folder / "cells").iterdir())]
    return table, [{key: value for key, value in cell.items() if key != "seconds"} for cell in cells]


def check_protocol(folder: Path, kills: list[int], seed: int) -> None:
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID))
    words = ["timeseries", "protocol", "--grid", str(folder / "grid.yaml"), "--out", "out", "--accelerator", "cpu"]
    (folder / "whole").mkdir()
    whole = finish(words, folder / "whole")
    assert whole.code == 0, whole.err
    expected, cells = tables(folder / "whole/out")
    assert len(cells) == 8
    dice = random.Random(seed)
    for number, count in enumerate(kills):
        place = folder / f"killed{number}"
        place.mkdir()
        done = []
        kill_often(words, lambda: words, place, whole.moments, count, dice, done)
        said = f"seed {seed}, kills at {done}"
        table, found = tables(place / "out")
        assert found == cells, said
        pd.testing.assert_frame_equal(table, expected, check_exact=True, obj=said)
        assert not list((place / "out").rglob(".*")), said


def test_scores_killed_twice_are_the_same(tmp_path):
    check_score(tmp_path, [2], seed=2)


def test_tables_killed_twice_are_the_same(tmp_path):
    check_protocol(tmp_path, [2], seed=3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("check", [check_score, check_protocol], ids=["score", "protocol"])
def test_twenty_kills_leave_the_same(check, tmp_path):
    check(tmp_path, [1] * 8 + [4] * 3, seed=random.randrange(10**6))
