"""The code keeps the figures that `python tests/house/metrics.py` prints, and these count what they say."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

import metrics


@pytest.fixture(scope="module")
def figures():
    return metrics.figures()


@pytest.mark.parametrize("name", metrics.LIMITS)
def test_figures_keep_their_limits(figures, name):
    value, places = figures[name]
    low, high = metrics.LIMITS[name]
    assert low <= value <= high, "\n".join(places)


BAD = '''
"""A file with one fault of each kind."""

import torch
from torch import Tensor

__all__ = ["bare", "good"]


def bare(x: Tensor, size):
    """Something."""
    assert size > 0, "no"
    assert x is not None
    # y = x + 1
    # TODO: more
    return x


def good(x: Tensor) -> Tensor:
    """(b, l, d) to (b, d)."""
    a0 = 0
    # Why zero: it is the start.
    return x
'''


def test_figures_count_faults(tmp_path, monkeypatch):
    """Each fault of a small package is found, and nothing else."""
    for folder in ("kernels", "tests"):
        (tmp_path / folder).mkdir()
    copied = "\n".join(f"    v{n} = {n}" for n in range(metrics.BLOCK))
    (tmp_path / "kernels" / "__init__.py").write_text(BAD.strip() + "\n")
    for name in ("one", "two"):
        (tmp_path / "kernels" / f"{name}.py").write_text(f"def _{name}() -> None:\n{copied}\n")
    (tmp_path / "tests" / "long.py").write_text("x = 1\n" * (metrics.LONG_FILE + 1))
    monkeypatch.setattr(metrics, "ROOT", tmp_path)
    for cached in (metrics.library, metrics.tests, metrics.listed):
        cached.cache_clear()
    try:
        places = {name: found for name, (_, found) in metrics.figures().items()}
        shaped = dict(metrics.tensor_functions())
    finally:
        for cached in (metrics.library, metrics.tests, metrics.listed):
            cached.cache_clear()
    assert places["annotated functions, %"] == ["kernels/__init__.py:9 bare"]
    assert shaped == {"kernels/__init__.py:18 good": True}
    assert places["asserts on arguments"] == ["kernels/__init__.py:11 assert size > 0, 'no'"]
    assert places["lines of commented-out code"] == ["kernels/__init__.py:13 # y = x + 1"]
    assert places["TODO, FIXME, XXX"] == ["kernels/__init__.py:14 # TODO: more"]
    assert places["files over 600 lines"] == ["tests/long.py 601"]
    assert places["duplicated blocks of 12 lines"] == ["kernels/one.py:2 and kernels/two.py:2, 12 lines"]
