"""Shape contracts and their messages."""

import pytest
import torch

from omnissm.kernels import (
    TrapezoidState,
    causal_conv1d,
    conv_step,
    conv_step_,
    selective_step,
    selective_step_,
    ssd_step,
    ssd_step_,
    trapezoid_step,
    trapezoid_step_,
    use_backend,
)
from omnissm.kernels.checks import call_kind, check_devices, check_floating, check_shapes, known, remember


def test_returns_the_size_of_each_letter():
    sizes = check_shapes(x=(torch.zeros(2, 3, 4), "b l d"), state=(None, "b d"), w=(torch.zeros(4, 7), "d k"))
    assert sizes == {"b": 2, "l": 3, "d": 4, "k": 7}


def test_message_names_tensor_dimension_and_origin():
    with pytest.raises(
        ValueError, match=r"`b` has l=9, expected 10 \(from `a`\); `b` is \(b, l, d\), got shape \(2, 9"
    ):
        check_shapes(a=(torch.zeros(2, 10, 3), "b l d"), b=(torch.zeros(2, 9, 3), "b l d"))


def test_number_of_dimensions():
    with pytest.raises(ValueError, match=r"`x` must have 3 dimensions, \(b, l, d\); got shape \(2, 3\)"):
        check_shapes(x=(torch.zeros(2, 3), "b l d"))


def test_digits_are_fixed_sizes():
    check_shapes(x=(torch.zeros(2, 4), "b 4"))
    with pytest.raises(ValueError, match=r"`x` has 4=5, expected 4 \(always\)"):
        check_shapes(x=(torch.zeros(2, 5), "b 4"))


def test_question_mark_allows_one():
    b = torch.zeros(2, 3, 4)
    assert check_shapes(b=(b, "b l d"), a=(torch.zeros(2, 3, 1), "b l d?"))["d"] == 4
    with pytest.raises(ValueError, match="`a` has d=2, expected 4"):
        check_shapes(b=(b, "b l d"), a=(torch.zeros(2, 3, 2), "b l d?"))


def test_dots_allow_leading_dimensions():
    assert check_shapes(x=(torch.zeros(2, 3, 4), "... d"), w=(torch.zeros(4), "d")) == {"d": 4}
    with pytest.raises(ValueError, match="`x` must have at least 1 dimensions"):
        check_shapes(x=(torch.zeros(()), "... d"))


def test_no_tensor():
    with pytest.raises(TypeError, match=r"`x` must be a torch.Tensor of shape \(b, l\), got list"):
        check_shapes(x=([1, 2], "b l"))


def test_devices_and_dtypes():
    x, meta = torch.zeros(2), torch.zeros(2, device="meta")
    assert check_devices(x=x, absent=None) == x.device
    with pytest.raises(ValueError, match="`y` is on device 'meta', expected 'cpu'"):
        check_devices(x=x, y=meta)
    with pytest.raises(TypeError, match="`x` must have a floating dtype, got torch"):
        check_floating(x=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="complex64"):
        check_floating(x=torch.zeros(2, dtype=torch.complex64))
    check_floating(x=torch.zeros(2, dtype=torch.complex64), allow_complex=True)


def test_calls_of_a_known_kind_pass_and_others_do_not():
    x = torch.zeros(2, 5, 3)
    kind = call_kind("test", x, None, 7, "silu")
    assert not known(kind)
    remember(kind)
    assert known(call_kind("test", torch.ones(2, 5, 3), None, 7, "silu"))
    others = [
        ("other", x, None, 7, "silu"),
        ("test", torch.zeros(2, 5, 4), None, 7, "silu"),
        ("test", x.double(), None, 7, "silu"),
        ("test", x.to("meta"), None, 7, "silu"),
        ("test", x, x, 7, "silu"),
        ("test", x, None, 8, "silu"),
        ("test", x, None, 7.0, "silu"),
    ]
    assert not any(known(call_kind(*one)) for one in others)


def test_classes_that_are_always_checked():
    assert call_kind("test", [1.0]) is None
    assert not known(None)
    remember(None)


def test_an_op_checks_other_calls_after_a_right_one():
    x, weight = torch.zeros(1, 5, 3), torch.zeros(3, 4)
    causal_conv1d(x, weight)
    causal_conv1d(x, weight)
    with pytest.raises(ValueError, match="`weight` has c=2, expected 3"):
        causal_conv1d(x, weight[:2])
    with pytest.raises(TypeError, match="floating"):
        causal_conv1d(x.int(), weight)
    with pytest.raises(ValueError, match="activation"):
        causal_conv1d(x, weight, activation="relu")


def _steps(device):
    """Calls of every step with two rows and a pool of three states, by name."""
    like = {"device": device}
    trapezoid = TrapezoidState(*(torch.zeros(3, *shape, **like) for shape in ((1, 1), (1, 2, 4), (1, 1, 4), (1, 2))))
    row, x, maps = torch.zeros(2, 1, **like), torch.zeros(2, 1, 2, **like), torch.zeros(2, 1, 4, **like)
    ranked = maps[:, None]
    return {
        "conv_step": (conv_step, conv_step_, (row, torch.zeros(3, 1, 2, **like), torch.zeros(1, 3, **like))),
        "ssd_step": (ssd_step, ssd_step_, (x, row, maps, maps, torch.zeros(3, 1, 2, 4, **like))),
        "selective_step": (
            selective_step,
            selective_step_,
            (row, row, -torch.ones(1, 4, **like), maps[:, 0], maps[:, 0], torch.zeros(3, 1, 4, **like)),
        ),
        "trapezoid_step": (
            trapezoid_step,
            trapezoid_step_,
            (x, row, row, row, torch.zeros(2, 1, **like), ranked, ranked, trapezoid),
        ),
    }


@pytest.mark.parametrize("op", ["conv_step", "ssd_step", "selective_step", "trapezoid_step"])
def test_states_of_a_pool_that_no_row_can_take(op, backend, device):
    *steps, arguments = _steps(device)[op]
    with use_backend(backend), torch.no_grad():
        _refuse_states(steps, arguments, device)


def _refuse_states(steps, arguments, device):
    for step in steps:
        step(*arguments, state_index=torch.tensor([2, -1], device=device))
        for wrong in ([0.0, 1.0], [True, False]):
            with pytest.raises(TypeError, match="`state_index` must be a tensor of integers, got torch"):
                step(*arguments, state_index=torch.tensor(wrong, device=device))
        if device.type != "cpu":
            continue  # looking at them would wait for the device
        with pytest.raises(ValueError, match="`state_index` names state 3, the pool has 3, numbered from 0"):
            step(*arguments, state_index=torch.tensor([0, 3]))
        with pytest.raises(ValueError, match="`state_index` names state 1 more than once"):
            step(*arguments, state_index=torch.tensor([1, 1]))
        step(*arguments, state_index=torch.tensor([-1, -1]))
