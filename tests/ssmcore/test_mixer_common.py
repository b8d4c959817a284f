"""What sequence mixers share: rows, states and what is refused."""

import pytest
import torch

from omnissm.ssmcore import create_mixer
from omnissm.ssmcore.mixers.common import ConvSSMState, decay_matrix, decay_since_start, lay_out, softplus_steps


def test_rows_are_aligned_and_restored():
    x = torch.arange(1.0, 9.0).view(2, 4, 1)
    mask = torch.tensor([[False, True, True, False], [False, False, False, False]])
    layout = lay_out(x, mask, torch.tensor([[0, 3, 4, 4], [1, 1, 2, 2]]))
    assert layout.align(x)[0, :, 0].tolist() == [2, 3, 4, 1]
    assert layout.mask.tolist() == [[True, True, False, False], [False] * 4]
    assert layout.index.tolist() == [[0, 1, 1, 1], [0] * 4]
    assert layout.count.tolist() == [2, 0]
    assert layout.restore(layout.align(x))[..., 0].tolist() == [[0, 2, 3, 0], [0] * 4]


def test_rows_with_padding_behind_only_stay_where_they_are():
    x = torch.arange(1.0, 9.0).view(2, 4, 1)
    mask = torch.tensor([[True, True, True, False], [False, False, False, False]])
    layout = lay_out(x, mask, torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0]]))
    assert layout.order is None
    assert layout.align(x) is x
    assert layout.count.tolist() == [3, 0]
    assert layout.restore(x)[..., 0].tolist() == [[1, 2, 3, 0], [0] * 4]
    assert lay_out(x, mask.flip(1)).order is not None


def test_sequences_begin_where_the_number_changes_or_a_reset_is():
    x = torch.zeros(1, 6, 1)
    reset = torch.tensor([[True, False, False, False, True, False]])
    layout = lay_out(x, seq_idx=torch.tensor([[5, 5, 2, 2, 2, 5]]), reset=reset)
    assert layout.index.diff().tolist() == [[0, 1, 0, 1, 1]]
    assert layout.fresh.tolist() == [True]
    assert lay_out(x) == lay_out(x)
    padded = lay_out(x, torch.arange(6)[None] > 0, reset=reset)  # the reset of padding is no reset
    assert padded.fresh.tolist() == [False]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"`mask` must be \(2, 4\)"),
        ({"mask": torch.ones(2, 4)}, TypeError, r"`mask` must be bool, got torch.float32"),
        ({"reset": torch.ones(2, 4, dtype=torch.int64)}, TypeError, "`reset` must be bool"),
        ({"seq_idx": torch.ones(2, 4)}, TypeError, "`seq_idx` must be of integers"),
        ({"mask": torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]).bool()}, ValueError, "hole in row 1"),
    ],
)
def test_wrong_rows_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        lay_out(torch.zeros(2, 4, 1), **arguments)


def test_states_are_checked():
    mixer = create_mixer("mamba", 8, d_state=3)
    x, state = torch.randn(2, 5, 8), mixer.init_state(2)
    with pytest.raises(TypeError, match=r"`state` must be a ConvSSMState, got Tensor; init_state\(\) makes one"):
        mixer.prefill(x, state.ssm)
    with pytest.raises(ValueError, match=r"`state.conv` must have shape \(2, 16, 3\), got \(3, 16, 3\)"):
        mixer.step(x[:, 0], mixer.init_state(3))
    rounded = ConvSSMState(state.conv, state.ssm.bfloat16())
    with pytest.raises(TypeError, match=r"`state.ssm` must be float32 or float64, got torch.bfloat16"):
        mixer.step(x[:, 0], rounded)
    elsewhere = state.to(device="meta")
    with pytest.raises(ValueError, match=r"`state.conv` is on 'meta', expected 'cpu'"):
        mixer.step(x[:, 0], elsewhere)
    with pytest.raises(ValueError, match=r"`x` must be \(b, 8\), got shape \(2, 5, 8\)"):
        mixer.step(x, state)
    assert state.to(dtype=torch.float64).ssm.dtype == torch.float64
    assert state.to(dtype=torch.bfloat16).tensors()["conv"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["mamba", "mamba2", "discrete_mamba2"])
def test_no_positions_change_nothing(name):
    mixer = create_mixer(name, 32, d_state=4)
    state = mixer.prefill(torch.randn(2, 5, 32))[1]
    empty = torch.zeros(2, 0, 32)
    y, after = mixer.prefill(empty, state, mask=torch.zeros(2, 0, dtype=torch.bool))
    assert y.shape == empty.shape
    assert torch.equal(after.ssm, state.ssm)
    assert torch.equal(after.conv, state.conv)


def test_decays():
    log_decay = -torch.rand(1, 5, 1, dtype=torch.float64)
    matrix = decay_matrix(log_decay)[0, 0]
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for t in range(5):
        for s in range(t + 1):
            expected[t, s] = log_decay[0, s + 1 : t + 1].sum().exp()
    torch.testing.assert_close(matrix, expected)
    index = torch.tensor([[0, 0, 1, 1, 1]])
    since = decay_since_start(log_decay, index)[0, :, 0]
    starts = [0, 0, 2, 2, 2]
    expected = torch.stack([log_decay[0, start : t + 1].sum().exp() for t, start in enumerate(starts)])
    torch.testing.assert_close(since, expected)


def test_steps():
    raw = torch.tensor([[[-50.0], [0.0], [3.0]]])
    dt = softplus_steps(raw, torch.tensor([1.0]), (0.1, 2.0))
    torch.testing.assert_close(dt.flatten(), torch.tensor([0.1, 1.3132617, 2.0]))
    layout = lay_out(raw, torch.tensor([[True, True, False]]))
    assert softplus_steps(raw, layout=layout, limit=(0.1, 2.0))[0, 2, 0] == 0
    assert softplus_steps(raw.bfloat16()).dtype == torch.float32
