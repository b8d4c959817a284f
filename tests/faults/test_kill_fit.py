"""`fit` of each domain, killed with SIGKILL at random moments and resumed, ends as if nothing had happened."""

import random
from pathlib import Path

import pytest
from harness import finish, kill_often
from tiny import TINY, assert_same_run, fit, go_on


def check(domain: str, folder: Path, kills: list[int], seed: int) -> None:
    (folder / "whole").mkdir()
    whole = finish(fit(domain), folder / "whole")
    assert whole.code == 0, whole.err
    dice = random.Random(seed)
    for number, count in enumerate(kills):
        place = folder / f"killed{number}"
        place.mkdir()
        done = []
        try:
            kill_often(fit(domain), lambda place=place: go_on(domain, place), place, whole.moments, count, dice, done)
            assert_same_run(folder / "whole/runs/run", place / "runs/run")
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, run {number}, kills at {done}: {error}") from error


@pytest.mark.parametrize("domain", TINY)
def test_a_run_killed_twice_ends_the_same(domain, tmp_path):
    check(domain, tmp_path, [2], seed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("domain", TINY)
def test_a_run_killed_twenty_times_ends_the_same(domain, tmp_path):
    check(domain, tmp_path, [1] * 8 + [4] * 3, seed=random.randrange(10**6))
