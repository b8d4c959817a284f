"""What `benchmarks/kernel_profile.py` reads from Nsight Compute and works out without it."""

import csv
import io
import sys
from importlib import import_module
from pathlib import Path

import pytest

PERCENT = ".avg.pct_of_peak_sustained_elapsed"
COLUMNS = {  # name: unit, and what two kernels have
    "ID": ("", "0", "1"),
    "Kernel Name": ("", "_one_kernel", "_two_kernel"),
    "gpu__time_duration.sum": ("ns", "1,250,000", "2500"),
    f"dram__throughput{PERCENT}": ("%", "71.5", "7.5"),
    f"sm__throughput{PERCENT}": ("%", "30", "30"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "25", "25"),
    "launch__registers_per_thread": ("register/thread", "168", "40"),
    f"sm__pipe_tensor_cycles_active{PERCENT}": ("%", "12.5", "n/a"),
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ("ratio", "0.5", "0.5"),
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": ("ratio", "1.25", "1.25"),
}


@pytest.fixture
def profile(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    yield import_module("benchmarks.kernel_profile")
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


def test_tables_of_ncu_are_read(profile):
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([COLUMNS, *zip(*COLUMNS.values(), strict=True)])
    one, two = profile.read_counters("==PROF== Connected to process 7\n" + text.getvalue())
    assert (one["ms"], two["ms"]) == pytest.approx((1.25, 0.0025))
    assert (one["kernel"], one["registers"], one["occupancy"], one["tensor_pct"]) == ("_one_kernel", 168, 25, 12.5)
    assert two["tensor_pct"] is None
    assert one["limits_by"] == "DRAM"
    assert two["limits_by"] == "waits: wait 1.2, barrier 0.5"


def test_launches_of_one_kernel_are_one_row(profile):
    rows = [{"kernel": name, "ms": ms} for name, ms in (("a", 3.0), ("b", 1.0), ("a", 1.0), ("a", 2.0))]
    assert profile.merged(rows) == [
        {"kernel": "a", "ms": 2.0, "launches": 3},
        {"kernel": "b", "ms": 1.0, "launches": 1},
    ]


def test_a_message_of_ncu_is_no_table(profile):
    with pytest.raises(ValueError, match="expected a table of ncu with a row per kernel, got '==ERROR== no permission"):
        profile.read_counters("==ERROR== no permission\n")


def test_only_counters_that_the_gpu_has_are_asked_for(profile):
    known = {"sm__pipe_tensor_cycles_active", "smsp__average_warps_issue_stalled_wait_per_issue_active"}
    asked = profile.counters(known)
    assert [one for one in asked if "stalled" in one] == [f"{profile.STALLED}wait_per_issue_active.ratio"]
    assert sum("tensor" in one for one in asked) == 1 < sum("tensor" in one for one in profile.counters(None))


def test_occupancy_is_what_the_scarcest_resource_allows(profile):
    """168 registers in 4 warps: 21504 of 65536, so 3 programs and 12 of 64 warps; 100 KiB: 2 programs."""
    assert profile.occupancy({"warps": 4, "registers": 168, "shared": 0}) == (100 * 12 / 64, "registers")
    assert profile.occupancy({"warps": 4, "registers": 32, "shared": 100 * 1024}) == (100 * 8 / 64, "shared memory")
