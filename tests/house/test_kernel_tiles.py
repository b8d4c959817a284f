"""benchmarks/kernel_tiles.py: its choices change one kernel's entries, and nothing for longer than they are timed."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from omnissm.kernels.quasiseparable import triton_impl as two_sided
from omnissm.kernels.selective_scan import triton_impl as selective
from omnissm.kernels.ssd import triton_outputs, triton_tiles


@pytest.fixture
def tiles(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    yield import_module("benchmarks.kernel_tiles")
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


def test_a_choice_changes_its_kernel_alone_and_only_for_the_time_of_the_context(tiles):
    sizes = 64, 128, torch.bfloat16
    before = triton_outputs.alternatives("fwd", *sizes)
    sweep = triton_outputs.tiles("sweep", *sizes)
    with tiles.chosen(tiles.Choice("ssd", 0, "fwd", {"stages": 7})):
        assert triton_tiles.tiles("fwd", *sizes).stages == 7
        assert triton_outputs.alternatives("fwd", *sizes)[0] == before[0]._replace(stages=7)
        assert two_sided.tiles("sweep", *sizes) == triton_outputs.tiles("sweep", *sizes) == sweep
    assert triton_outputs.alternatives("fwd", *sizes) == before


def test_choices_of_a_gradient_reach_its_tiles(tiles):
    x = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16)
    before = triton_tiles.gradient_tiles(x, 64)
    with tiles.chosen(tiles.Choice("ssd", 0, "links", {"warps": 1})):
        assert triton_tiles.gradient_tiles(x, 64) == before._replace(links=before.links._replace(warps=1))
    assert triton_tiles.gradient_tiles(x, 64) == before


def test_choices_of_selective_scan_tell_forward_from_backward(tiles):
    sizes = 2, 64, 1, 16, 2, torch.float32, torch.device("cpu"), False
    plain = selective._cached_options
    with tiles.chosen(tiles.Choice("selective_scan", 0, "bwd", {"TIME": 2})):
        assert selective._cached_options(*sizes, True) == plain(*sizes, True) | {"TIME": 2}
        assert selective._cached_options(*sizes, False) == plain(*sizes, False)
    assert selective._cached_options is plain


def test_every_choice_is_of_a_size_that_there_is_and_none_comes_twice(tiles):
    specs = tiles.read_specs()
    assert all(choice.index < len(specs[choice.op].bench_sizes) for choice in tiles.CHOICES)
    assert len({(*choice[:3], *choice.changed.items()) for choice in tiles.CHOICES}) == len(tiles.CHOICES)
