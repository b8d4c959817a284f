"""The `.ts` format: unequal lengths, missing values, labels, and what is wrong in a file."""

import numpy as np
import pytest
import xarray as xr

from omnissm.timeseries.ts_files import read_ts, write_ts

TEXT = """# remark
@problemName two
@timeStamps false
@classLabel true up down
@data
1,2,?:4,5,6:up
7,8:9,10:down
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "two.ts").write_text(TEXT)
    return tmp_path / "two.ts"


def test_reads_gaps_lengths_and_labels(path):
    ds = read_ts(path)
    assert ds["target"].dims == ("series", "time", "variate")
    np.testing.assert_array_equal(ds["length"], [3, 2])
    assert ds["label"].values.tolist() == ["up", "down"]
    assert list(ds.attrs["classes"]) == ["up", "down"]
    np.testing.assert_array_equal(ds["target"].values[0], [[1, 4], [2, 5], [np.nan, 6]])
    np.testing.assert_array_equal(ds["target"].values[1], [[7, 9], [8, 10], [np.nan, np.nan]])


def test_round_trip(path, tmp_path):
    ds = read_ts(path)
    write_ts(ds, tmp_path / "again.ts")
    again = read_ts(tmp_path / "again.ts")
    xr.testing.assert_identical(again.assign_attrs(name="two"), ds)


def test_target_labels_are_numbers(tmp_path):
    (tmp_path / "r.ts").write_text("@targetLabel true\n@data\n1,2:0.5\n3,4:-1\n")
    np.testing.assert_array_equal(read_ts(tmp_path / "r.ts")["label"], [0.5, -1.0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("@data\n", "holds no series"),
        ("@classLabel true a\n@data\n1,x:a\n", "line 3: 'x' is not a number"),
        ("@classLabel true a\n@data\n1,2:a\n1:2:a\n", "line 4: 2 variates, the series before have 1"),
        ("@classLabel true a\n@data\n1,2:b\n", "label 'b' is not among the classes"),
        ("1,2:a\n", "line 1: expected a header line"),
        ("@data\n(0,1)\n", "time stamps are not read"),
        ("@classLabel true a\n@data\n1,inf:a\n", "infinite"),
    ],
)
def test_says_what_is_wrong(tmp_path, text, message):
    (tmp_path / "bad.ts").write_text(text)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        read_ts(tmp_path / "bad.ts")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_ts(tmp_path / "none.ts")
