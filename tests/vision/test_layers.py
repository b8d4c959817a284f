"""Orders of cells, cross scan and merge, patches."""

import pytest
import torch

from omnissm.vision.layers import CROSS4, SNAKE4, PatchEmbed, cross_merge, cross_scan, drop_path_rates, scan_order

NAMES = [name + end for name in ("row", "col", "snake_row", "snake_col", "diag", "antidiag") for end in ("", "_rev")]


@pytest.mark.parametrize("size", [(3, 4), (4, 3), (1, 5), (5, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_orders(name, size):
    rows, columns = size
    order, inverse, move = scan_order(name, rows, columns)
    cells = torch.arange(rows * columns)
    assert torch.equal(order.sort().values, cells)
    assert torch.equal(inverse[order], cells)
    x = torch.randn(rows * columns)
    assert torch.equal(x[order][inverse], x)
    assert move[0] == 0
    steps = {1: (0, 1), 2: (0, -1), 3: (-1, 0), 4: (1, 0)}
    for t in range(1, len(order)):
        step = (int(order[t] // columns - order[t - 1] // columns), int(order[t] % columns - order[t - 1] % columns))
        assert steps.get(int(move[t])) == (step if step in steps.values() else None)
    if name.startswith("snake"):
        assert 5 not in move  # neighbours in the sequence are neighbours in the grid


def test_orders_written_out():
    assert scan_order("col", 2, 3).order.tolist() == [0, 3, 1, 4, 2, 5]
    assert scan_order("snake_row", 3, 2).order.tolist() == [0, 1, 3, 2, 4, 5]
    assert scan_order("snake_col", 2, 3).order.tolist() == [0, 3, 4, 1, 2, 5]
    assert scan_order("diag", 2, 3).order.tolist() == [0, 1, 3, 2, 4, 5]
    assert scan_order("antidiag", 2, 3).order.tolist() == [2, 1, 5, 0, 4, 3]
    assert scan_order("row_rev", 1, 3).order.tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match="unknown order"):
        scan_order("spiral", 2, 2)
    with pytest.raises(ValueError, match="at least one row"):
        scan_order("row", 0, 2)


def test_the_reverses_of_snakes_start_where_they_should():
    for rows, columns in ((4, 3), (3, 5), (3, 4)):
        start = scan_order(SNAKE4[1], rows, columns).order[0]
        assert start == (rows - 1) * columns + (0 if rows % 2 == 0 else columns - 1)


def test_cross_scan_follows_the_orders():
    x = torch.randn(2, 3, 4, 5)
    sequences = cross_scan(x)
    for k, name in enumerate(CROSS4):
        assert torch.equal(sequences[:, k], x.flatten(1, 2)[:, scan_order(name, 3, 4).order])


@pytest.mark.parametrize("size", [(3, 4), (1, 5), (5, 1)], ids=str)
def test_cross_merge_is_the_adjoint(size):
    """<scan(x), y> = <x, merge(y)>, and the gradient of one is the other."""
    x = torch.randn(2, *size, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 4, size[0] * size[1], 3, dtype=torch.float64)
    product = (cross_scan(x) * y).sum()
    torch.testing.assert_close(product, (x * cross_merge(y, *size)).sum())
    (gradient,) = torch.autograd.grad(product, x)
    torch.testing.assert_close(gradient, cross_merge(y, *size))
    torch.testing.assert_close(cross_merge(cross_scan(x), *size), 4 * x)


def test_patches():
    patches = PatchEmbed((8, 12), 4, 3, 6)
    x = torch.randn(2, 3, 8, 12)
    y = patches(x)
    assert y.shape == (2, 2, 3, 6)
    own = (patches.proj.weight * x[0, :, 4:8, 8:12]).sum((1, 2, 3)) + patches.proj.bias
    torch.testing.assert_close(y[0, 1, 2], own)
    padded = PatchEmbed(8, 4, 3, 6, dynamic=True)
    assert padded(torch.randn(1, 3, 9, 8)).shape == (1, 3, 2, 6)
    assert padded.dynamic_feat_size((9, 8)) == (3, 2)
    assert drop_path_rates(0.2, 3) == [0.0, 0.1, 0.2]
    assert drop_path_rates(0.2, 1) == [0.0]
    for rate in (2, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="drop_path_rate is a probability below 1"):
            drop_path_rates(rate, 3)
