"""The shortcuts of the interpreter give the numbers of a loop."""

import os
from itertools import pairwise

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("for Triton's interpreter", allow_module_level=True)


@triton.jit
def _affine(a, b, c, d):
    return a * c, b * c + d


@triton.jit
def _scan_kernel(a, b, x, y, ROWS: tl.constexpr, COLS: tl.constexpr, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    place = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None]
    first, second = tl.associative_scan((tl.load(a + place), tl.load(b + place)), AXIS, _affine, reverse=REVERSE)
    tl.store(x + place, first)
    tl.store(y + place, second)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_scans_of_a_pair(axis, reverse):
    from triton.runtime.interpreter import ScanOps

    assert ScanOps.generic_scan.__module__ == "quick_interpreter"
    a, b = torch.rand(8, 4), torch.randn(8, 4)
    found = [torch.empty(8, 4) for _ in range(2)]
    _scan_kernel[(1,)](a, b, *found, 8, 4, axis, reverse)
    order = [(slice(None),) * axis + (k,) for k in range(a.shape[axis])]
    order = order[::-1] if reverse else order
    x, y = a.clone(), b.clone()
    for before, here in pairwise(order):
        x[here], y[here] = x[before] * a[here], y[before] * a[here] + b[here]
    torch.testing.assert_close(found, [x, y], rtol=1e-6, atol=1e-6)
