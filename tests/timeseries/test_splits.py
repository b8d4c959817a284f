import numpy as np
import pytest

from omnissm.timeseries.frames import from_numpy
from omnissm.timeseries.splits import split


@pytest.fixture
def ds():
    return from_numpy(np.arange(200.0).reshape(100, 2), start="2020-01-01", freq="D")


def ends(parts):
    return {name: (part.targets.start, part.targets.stop) for name, part in parts.items()}


def test_counts_leave_the_end_unused(ds):
    assert ends(split(ds, 60, 20, 10)) == {"train": (0, 60), "val": (60, 80), "test": (80, 90)}


def test_fractions_round_down_and_the_middle_takes_the_rest():
    ds = from_numpy(np.zeros((8735, 1)))
    expected = {"train": (0, 6114), "val": (6114, 6988), "test": (6988, 8735)}  # floor(.7 n), rest, floor(.2 n)
    assert ends(split(ds, 0.7, None, 0.2)) == expected
    assert ends(split(ds, 0.7, 0.1, 0.2)) == expected
    assert split(from_numpy(np.zeros((100, 1))), 0.29, None, 0.5)["train"].targets.stop == 29  # 0.29 * 100 < 29


def test_dates_are_exclusive_ends(ds):
    parts = split(ds, "2020-03-01", "2020-04-01", None)
    assert ends(parts) == {"train": (0, 60), "val": (60, 91), "test": (91, 100)}
    assert parts["train"].dataset["time"].to_numpy()[-1] == np.datetime64("2020-02-29")


def test_a_part_of_size_zero_is_left_out(ds):
    assert set(split(ds, 0.8, 0, 0.2)) == {"train", "test"}


def test_inputs_reach_back_but_targets_and_later_values_do_not(ds):
    parts = split(ds, 60, 20, 20, lookback=10)
    assert ends(parts) == {"train": (10, 60), "val": (60, 80), "test": (80, 100)}
    for part in parts.values():
        assert part.dataset.sizes["time"] == part.targets.stop  # nothing behind the part is in its Dataset
        assert np.shares_memory(part.dataset["target"].to_numpy(), ds["target"].to_numpy())
    steps = [step for part in parts.values() for step in part.targets]
    assert len(steps) == len(set(steps))


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ((90, 20, 10), r"\(train 90, val 20, test 10\) need 120 steps, the series has 100"),
        ((0.7, None, None), "Only one of train, val and test may be None"),
        ((1.7, None, 0.2), "train=1.7 is a fraction"),
        ((-5, None, 0.2), "must not be negative"),
        (("2020-03-01", "2020-02-01", None), "The val part would end at step 31, outside 60..100"),
        ((None, 0.1, "2020-03-01"), "a date behind a part without a size"),
        ((5, None, 5), "fewer than lookback 10"),
    ],
)
def test_impossible_cuts(ds, cuts, message):
    with pytest.raises(ValueError, match=message) as caught:
        split(ds, *cuts, lookback=10)
    assert "\n" not in str(caught.value)


def test_dates_need_a_calendar():
    with pytest.raises(ValueError, match="counts integer steps"):
        split(from_numpy(np.zeros((10, 1))), "2020-01-01", None, 2)
