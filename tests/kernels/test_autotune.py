"""The search for tiles: off by default, the fastest candidate otherwise, remembered in a file."""

import json

import pytest
import torch

pytest.importorskip("triton")

from omnissm.kernels import autotune

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Times of candidates as given by the test, and how many were taken."""
    times, taken = {}, []

    def time(run, device):
        taken.append(run.args[0])
        return times[run.args[0]]

    monkeypatch.setattr(autotune, "_time", time)
    monkeypatch.setenv("SSM_AUTOTUNE", "1")
    monkeypatch.setenv("SSM_AUTOTUNE_CACHE", str(tmp_path / "folder" / "tiles.json"))
    return times, taken


def pick(run=print, **key):
    return autotune.fastest("kernel", ((64, 4), (32, 4), (64, 8)), run, CPU, **key)


@pytest.mark.parametrize("value", [None, "", "0"])
def test_off_by_default(clock, monkeypatch, value):
    _times, taken = clock
    if value is None:
        monkeypatch.delenv("SSM_AUTOTUNE")
    else:
        monkeypatch.setenv("SSM_AUTOTUNE", value)
    assert pick() == (64, 4)
    assert not taken
    assert not autotune.cache_file().exists()


def test_fastest_is_kept_per_size(clock):
    times, taken = clock
    times |= {(64, 4): 3.0, (32, 4): 1.0, (64, 8): float("inf")}
    assert pick(n=64) == (32, 4)
    times |= {(64, 4): 0.5}
    assert pick(n=64) == (32, 4)  # found already
    assert pick(n=128) == (64, 4)
    assert len(taken) == 6
    assert sorted(json.loads(autotune.cache_file().read_text()).values()) == [0, 1]


def test_broken_file_is_replaced(clock):
    times, taken = clock
    times |= {(64, 4): 3.0, (32, 4): 4.0, (64, 8): 2.0}
    autotune.cache_file().parent.mkdir()
    autotune.cache_file().write_text("{")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert pick() == (64, 8)
    assert pick() == (64, 8)
    assert len(taken) == 3


@pytest.mark.gpu
def test_ssd_with_a_search_gives_the_same(device, monkeypatch, tmp_path):
    from omnissm.kernels.ssd import triton_gradients, triton_outputs, triton_tiles
    from omnissm.kernels.ssd.spec import SPEC
    from omnissm.kernels.testing import check_op

    monkeypatch.setenv("SSM_AUTOTUNE", "1")
    monkeypatch.setenv("SSM_AUTOTUNE_CACHE", str(tmp_path / "tiles.json"))
    few = lambda first, *rest: (first, first._replace(stages=1))  # noqa: E731
    monkeypatch.setattr(triton_outputs, "alternatives", lambda *sizes: few(triton_tiles.tiles(*sizes)))
    monkeypatch.setattr(triton_gradients, "gradient_alternatives", lambda first, x, n: (first, first))
    check_op(SPEC, {"b": 2, "l": 200, "h": 2, "p": 16, "n": 16}, "triton", torch.float32, device)
    assert len(json.loads((tmp_path / "tiles.json").read_text())) == 2
