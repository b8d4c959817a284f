"""cross_scan against single selective scans, and what turning a grid does to it; check_op runs in test_every_op."""

from importlib import import_module

import pytest
import torch

from omnissm.kernels import cross_scan, selective_scan
from omnissm.kernels.cross_scan.spec import make_inputs


def inputs_of(**size):
    sizes = {"b": 2, "i": 3, "j": 5, "d": 4, "n": 2} | size
    return make_inputs(**sizes, dtype=torch.float64, device="cpu", generator=torch.Generator().manual_seed(0))


def test_one_row_is_two_scans_each_way():
    inputs = inputs_of(i=1, skip=False)
    expected = torch.zeros_like(inputs["x"][:, 0])
    for k in range(4):
        flat = [inputs["x"][:, 0], *(inputs[name][:, k, 0] for name in ("dt", "B", "C"))]
        u, dt, B, C = (t.flip(1) if k >= 2 else t for t in flat)
        y, _ = selective_scan(u, dt, inputs["A"][k], B, C)
        expected = expected + (y.flip(1) if k >= 2 else y)
    torch.testing.assert_close(cross_scan(**inputs)[:, 0], expected)


def test_transposed_grid_exchanges_the_orders():
    inputs = inputs_of()
    swap = torch.tensor([1, 0, 3, 2])
    turned = {"x": inputs["x"].transpose(1, 2), "A": inputs["A"][swap], "D": inputs["D"][swap]}
    turned |= {name: inputs[name][:, swap].transpose(2, 3) for name in ("dt", "B", "C")}
    torch.testing.assert_close(cross_scan(**turned).transpose(1, 2), cross_scan(**inputs))


@pytest.mark.parametrize(("order", "cell", "reached"), [(0, (0, 4), (1, 0)), (1, (2, 0), (0, 1)), (2, (1, 0), (0, 4))])
def test_each_order_goes_its_way(order, cell, reached):
    inputs = inputs_of(b=1, skip=False)
    inputs["C"][:, [k for k in range(4) if k != order]] = 0
    x = inputs["x"].requires_grad_()
    (gradient,) = torch.autograd.grad(cross_scan(**inputs)[0, *reached].sum(), x)
    assert gradient[0, *cell].abs().min() > 0
    (gradient,) = torch.autograd.grad(cross_scan(**inputs)[0, *cell].sum(), x)
    assert gradient[0, *reached].abs().max() == 0


def test_large_grids_take_the_orders_one_by_one(monkeypatch):
    inputs = inputs_of()
    at_once = cross_scan(**inputs)
    monkeypatch.setattr(import_module("omnissm.kernels.cross_scan.chunked"), "_SMALL", 0)
    torch.testing.assert_close(cross_scan(**inputs), at_once)


def test_sums_in_float32():
    inputs = {name: t.to(torch.bfloat16) for name, t in inputs_of().items()}
    assert cross_scan(**inputs).dtype == torch.float32


def test_wrong_arguments():
    inputs = inputs_of()
    three = {name: inputs[name][:, :3] for name in ("dt", "B", "C")} | {name: inputs[name][:3] for name in ("A", "D")}
    with pytest.raises(ValueError, match="4 orders in dim 1, got 3"):
        cross_scan(inputs["x"], **three)
