"""The grid recurrence: against its equation cell by cell, in blocks, on flipped images."""

import pytest
import torch
import torch.nn.functional as F

from omnissm.vision import grid_mixer
from omnissm.vision.grid_mixer import CORNERS, GROUPS, grid_mix


def inputs(batch=2, rows=4, columns=5, nheads=2, headdim=3, n=4, dtype=torch.float64):
    like = {"dtype": dtype}
    return (
        torch.randn(batch, rows, columns, nheads, headdim, **like),
        torch.randn(batch, rows, columns, nheads, 4, 2, **like),
        torch.randn(nheads, **like),
        torch.randn(batch, rows, columns, 2, n, **like),
        torch.randn(batch, rows, columns, 2, n, **like),
    )


def by_cells(x, dt, dt_bias, B, C, root, published):
    """The recurrence as it is written, one cell after another."""
    steps = F.softplus(dt + dt_bias[:, None, None])
    total = torch.zeros_like(x)
    for corner, dims in enumerate(CORNERS):
        u, s, into, out = (
            t.flip(dims) for t in (x, steps[..., corner, :], B[..., GROUPS[corner], :], C[..., GROUPS[corner], :])
        )
        rows, columns = u.shape[1:3]
        state, y = {}, torch.zeros_like(u)
        for i in range(rows):
            for j in range(columns):
                m = (i > 0) + (j > 0)
                w = max(1, m) ** 0.5 if root else max(1, m)
                along, across = s[:, i, j, :, 0], s[:, i, j, :, 1]
                gain = (along * (j > 0) + across * (i > 0) if published else along + across) / w
                S = gain[..., None, None] * torch.einsum("bn,bhp->bhnp", into[:, i, j], u[:, i, j])
                if j:
                    S = S + torch.exp(-along)[..., None, None] * state[i, j - 1] / w
                if i:
                    S = S + torch.exp(-across)[..., None, None] * state[i - 1, j] / w
                state[i, j] = S
                y[:, i, j] = torch.einsum("bn,bhnp->bhp", out[:, i, j], S)
        total += y.flip(dims)
    return total / 2


@pytest.mark.parametrize("cells", [256, 8, 1], ids=["one block", "blocks", "single rows"])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("normalization", ["sqrt_in", "in"])
@pytest.mark.parametrize("size", [(4, 5), (1, 6), (5, 1), (1, 1)], ids=str)
def test_equals_the_recurrence(size, normalization, published, cells, monkeypatch):
    monkeypatch.setattr(grid_mixer, "_CELLS", cells)
    tensors = inputs(rows=size[0], columns=size[1])
    expected = by_cells(*tensors, normalization == "sqrt_in", published)
    torch.testing.assert_close(grid_mix(*tensors, normalization, published), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cells", [256, 6])
def test_gradients(cells, monkeypatch):
    monkeypatch.setattr(grid_mixer, "_CELLS", cells)
    tensors = [t.requires_grad_() for t in inputs(batch=1, rows=3, columns=3, nheads=1, headdim=2, n=2)]
    assert torch.autograd.gradcheck(lambda *a: grid_mix(*a, "in"), tensors)


def test_flipping_the_image_swaps_the_corners():
    """Left and right flipped: corners 0 and 1, 2 and 3 change places, and with them the two sets of B and C."""
    x, dt, bias, B, C = inputs()
    mirrored = [t.flip(2) for t in (x, dt[..., [1, 0, 3, 2], :], B.flip(3), C.flip(3))]
    y = grid_mix(mirrored[0], mirrored[1], bias, mirrored[2], mirrored[3])
    torch.testing.assert_close(y.flip(2), grid_mix(x, dt, bias, B, C))


def test_stays_bounded_on_large_grids():
    """With "auto" the weights from both neighbours sum to at most 1 on a grid where sqrt_in would explode."""
    x, dt, bias, B, _ = inputs(1, 40, 40, 1, 1, 1, torch.float32)
    dt = torch.full_like(dt, -6.0)
    ones = torch.ones_like(B)
    assert grid_mix(x.abs(), dt, 0 * bias, ones, ones).max() < 100
    assert grid_mix(x.abs(), dt, 0 * bias, ones, ones, "sqrt_in").max() > 1e6


def test_low_precision_has_float32_states():
    tensors = inputs(dtype=torch.float32)
    narrow = [t.bfloat16() for t in tensors]
    y = grid_mix(*narrow)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, grid_mix(*(t.float() for t in narrow)))
    with pytest.raises(ValueError, match="normalization must be"):
        grid_mix(*tensors, "out")
