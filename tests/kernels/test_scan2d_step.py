"""`scan2d_step`: columns one after another, gradients, pools of states, in place, compiled."""

import pytest
import torch

from omnissm.kernels import overwrite_states, scan2d, scan2d_step, scan2d_step_


def grid_of(device, dtype=torch.float32, b=2, i=5, j=7, d=3, n=2):
    generator = torch.Generator(device).manual_seed(0)
    like = {"dtype": dtype, "device": device, "generator": generator}
    decays = [0.5 * torch.rand(b, i, j, *width, **like) for width in ((d, n), (1, n), (d, 1), (1, 1))]
    return [*decays, *torch.randn(2, b, i, j, d, n, **like)]


def column_of(grid, t):
    return [part[:, :, t] for part in grid]


def zeros(device, *shape, dtype=torch.float32):
    return torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_columns_are_those_of_the_scan(dtype, rows, device):
    grid = grid_of(device, dtype, i=rows)
    h1, h2 = scan2d(*grid, backend="reference")
    state = zeros(device, 2, rows, 3, 2, dtype=h1.dtype)
    in_place = zeros(device, 2, rows, 3, 2, dtype=h1.dtype)
    for t in range(7):
        column, state = scan2d_step(*column_of(grid, t), state)
        for got, expected in zip(column, (h1, h2)):
            torch.testing.assert_close(got, expected[:, :, t], rtol=1e-5, atol=1e-6)
        again = scan2d_step_(*column_of(grid, t), in_place)
        for one, other, kept, new in zip(again, column, in_place, state):
            assert torch.equal(one, other)
            assert torch.equal(kept, new)


def test_gradients(device):
    inputs = [part.requires_grad_() for part in column_of(grid_of(device, torch.float64), 0)]
    state = [torch.randn(2, 5, 3, 2, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)]

    def step(*tensors):
        column, new = scan2d_step(*tensors[:6], tuple(tensors[6:]))
        return *column, *new

    assert torch.autograd.gradcheck(step, (*inputs, *state), fast_mode=True)


@pytest.mark.parametrize("index", [[2, -1, 0], [-1, -1, 4], [-1, -1, -1]], ids=str)
def test_pools(index, device):
    inputs = column_of(grid_of(device, b=3), 0)
    pools = torch.randn(2, 5, 5, 3, 2, device=device)
    expected, columns = pools.clone(), torch.zeros(2, 3, 5, 3, 2, device=device)
    for row, slot in enumerate(index):
        if slot >= 0:
            one = [part[row : row + 1] for part in inputs]
            column, _ = scan2d_step(*one, tuple(pools[:, slot : slot + 1]))
            for side in range(2):
                columns[side, row], expected[side, slot] = column[side][0], column[side][0]
    slots = torch.tensor(index, device=device, dtype=torch.int32)
    found, new = scan2d_step(*inputs, tuple(pools), state_index=slots)
    torch.testing.assert_close(torch.stack(found), columns)
    torch.testing.assert_close(torch.stack(new), expected)
    again = scan2d_step_(*inputs, tuple(pools), state_index=slots)
    torch.testing.assert_close(torch.stack(again), columns)
    torch.testing.assert_close(pools, expected)


def test_states_keep_their_dtype_and_may_be_written_over(device):
    inputs = column_of(grid_of(device), 0)
    narrow = zeros(device, 2, 5, 3, 2, dtype=torch.bfloat16)
    column, new = scan2d_step(*inputs, narrow)
    assert (column[0].dtype, new[0].dtype, new[1].dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert not narrow[0].any()
    with overwrite_states():
        same, kept = scan2d_step(*inputs, narrow)
    assert kept is narrow
    assert torch.equal(narrow[1], new[1])
    assert torch.equal(same[1], column[1])


def test_compiles_whole(device):
    inputs, state = column_of(grid_of(device), 0), zeros(device, 2, 5, 3, 2)
    compiled = torch.compile(scan2d_step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, state), scan2d_step(*inputs, state))


def test_wrong_arguments(device):
    inputs, state = column_of(grid_of(device), 0), zeros(device, 2, 5, 3, 2)
    with pytest.raises(ValueError, match=r"`state\[1\]` has i=4, expected 5"):
        scan2d_step(*inputs, (state[0], state[1][:, :4]))
    with pytest.raises(TypeError, match="`a3` must have a floating dtype"):
        scan2d_step(*inputs[:2], inputs[2].int(), *inputs[3:], state)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="names state 7, the pool has 2"):
            scan2d_step(*inputs, state, state_index=torch.tensor([0, 7]))
