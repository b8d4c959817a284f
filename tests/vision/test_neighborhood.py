"""Windows of cells: against loops over cells, their borders, and their adjoints of first and second order."""

import pytest
import torch

from omnissm.vision.neighborhood import axis_neighbors, fitted_axis, neighborhood_average, neighborhood_scores

SIZES = [(5, 7, 3, 1), (7, 9, 3, 2), (7, 10, 3, 3), (3, 4, 7, 7), (1, 6, 5, 1), (2, 40, 5, 2), (4, 45, 3, 1)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearest(length, window, dilation):
    """Cells that each cell sees: the `window` nearest of its class, the lower ones of a tie left out."""
    seen = []
    for t in range(length):
        own = range(t % dilation, length, dilation)
        starts = [own[k : k + window] for k in range(len(own) - window + 1)]
        seen.append(list(min(starts, key=lambda cells: abs(cells[window // 2] - t))))
    return seen


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scores_and_averages_are_loops(size):
    rows, columns, window, dilation = size
    q, k, v = draw(3, 2, 2, rows, columns, 3)
    bias = draw(2, 2 * window - 1, 2 * window - 1, seed=1)
    (height, step), (width, stride) = fitted_axis(rows, window, dilation), fitted_axis(columns, window, dilation)
    scores = neighborhood_scores(q, k, bias, window, dilation)
    assert scores.shape == (2, 2, rows, columns, height, width)
    weights = draw(*scores.shape, seed=2)
    averages = neighborhood_average(weights, v, window, dilation)
    for i, above in enumerate(nearest(rows, height, step)):
        for j, beside in enumerate(nearest(columns, width, stride)):
            total = 0
            for a, y in enumerate(above):
                for b, x in enumerate(beside):
                    by = bias[:, (y - i) // step + window - 1, (x - j) // stride + window - 1]
                    expected = (q[:, :, i, j] * k[:, :, y, x]).sum(-1) + by
                    torch.testing.assert_close(scores[:, :, i, j, a, b], expected)
                    total = total + weights[:, :, i, j, a, b, None] * v[:, :, y, x]
            torch.testing.assert_close(averages[:, :, i, j], total)


@pytest.mark.parametrize("size", [(3, 4, 3, 1), (2, 6, 3, 2), (2, 3, 5, 1)], ids=str)
def test_adjoints_are_exact(size):
    rows, columns, window, dilation = size
    q, k, v = (draw(1, 1, rows, columns, 2, seed=s).requires_grad_() for s in range(3))
    bias = draw(1, 2 * window - 1, 2 * window - 1, seed=3).requires_grad_()

    def attention(q, k, v, bias):
        scores = neighborhood_scores(q, k, bias, window, dilation)
        return neighborhood_average(scores.flatten(-2).softmax(-1).view(scores.shape), v, window, dilation)

    assert torch.autograd.gradcheck(attention, (q, k, v, bias))
    assert torch.autograd.gradgradcheck(attention, (q, k, v, bias))


def test_a_window_as_large_as_the_grid_is_full_attention():
    q, k, v = draw(3, 1, 2, 5, 5, 4)
    scores = neighborhood_scores(q, k, None, 5, 1)
    ours = neighborhood_average(scores.flatten(-2).softmax(-1).view(scores.shape), v, 5, 1)
    flat = (t.flatten(2, 3) for t in (q, k, v))
    full = torch.nn.functional.scaled_dot_product_attention(*flat, scale=1.0)
    torch.testing.assert_close(ours.flatten(2, 3), full)


def test_axes():
    assert [fitted_axis(n, 7, 7) for n in (1, 2, 3, 6, 7, 13, 14, 100)] == [
        (1, 1),
        (1, 2),
        (3, 1),
        (5, 1),
        (7, 1),
        (7, 1),
        (7, 2),
        (7, 7),
    ]
    keys, entries = axis_neighbors(7, 3, 2)
    assert keys == [[0, 2, 4], [1, 3, 5], [0, 2, 4], [1, 3, 5], [2, 4, 6], [1, 3, 5], [2, 4, 6]]
    assert entries[0] == [2, 3, 4]  # at a border the window moves inside, the bias stays by distance
    assert entries[6] == [0, 1, 2]
    for window, dilation, message in ((4, 1, "odd"), (0, 1, "odd"), (3, 0, "at least 1")):
        with pytest.raises(ValueError, match=message):
            fitted_axis(9, window, dilation)


def test_narrow_types():
    q, v = draw(2, 1, 2, 6, 6, 4).float()
    wide = neighborhood_average(neighborhood_scores(q, q, None, 3, 2), v, 3, 2)
    narrow = neighborhood_average(neighborhood_scores(q.bfloat16(), q, None, 3, 2), v.bfloat16(), 3, 2)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), wide, rtol=0.1, atol=0.3)
