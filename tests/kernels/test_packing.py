"""Packed rows with the states of all their sequences, for every scan that offers them."""

from itertools import pairwise

import pytest
import torch

from omnissm.kernels import (
    TrapezoidState,
    cu_seqlens_to_seq_idx,
    ema_scan,
    linear_scan,
    selective_scan,
    ssd,
    trapezoid_ssd,
)
from omnissm.kernels.testing import run_with_gradients
from omnissm.kernels.trapezoid_ssd.spec import make_inputs as trapezoid_inputs

LENGTHS = [5, 1, 0, 30, 16, 1, 12]
TOTAL = sum(LENGTHS)


def bounds(device):
    return torch.tensor([0, *LENGTHS], device=device).cumsum(0)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def of_ssd(rows):
    per_position = {"x": normal(1, TOTAL, 4, 3), "log_decay": -normal(1, TOTAL, 4).abs(), "weight": normal(1, TOTAL, 4)}
    per_position |= {name: normal(1, TOTAL, 2, 5) for name in ("B", "C")}
    return ssd, per_position, {"D": normal(4), "initial_state": normal(rows, 4, 3, 5)}, {}


def of_ssd_with_skips(rows):
    op, per_position, rest, options = of_ssd(rows)
    return op, per_position | {"D": normal(1, TOTAL, 4)}, {"initial_state": rest["initial_state"]}, options


def of_selective_scan(rows):
    per_position = {name: normal(1, TOTAL, 4) for name in ("u", "z")} | {"dt": normal(1, TOTAL, 4).abs()}
    per_position |= {name: normal(1, TOTAL, 5) for name in ("B", "C")}
    rest = {"A": -normal(4, 5).abs(), "D": normal(4), "initial_state": normal(rows, 4, 5)}
    return selective_scan, per_position, rest, {"window": 3}


def of_linear_scan(rows):
    per_position = {"a": normal(1, TOTAL, 4), "b": normal(1, TOTAL, 4)}
    return linear_scan, per_position, {"initial_state": normal(rows, 4)}, {}


def of_linear_scan_with_one_decay(rows):
    return (
        linear_scan,
        {"b": normal(1, TOTAL, 4)},
        {"a": normal(4), "initial_state": normal(rows, 4)},
        {"reverse": True},
    )


def of_ema_scan(rows):
    per_position = {"x": normal(1, TOTAL, 4), "p": torch.rand(1, TOTAL, dtype=torch.float64)}
    return ema_scan, per_position, {"initial_state": normal(rows, 4)}, {}


def of_trapezoid_ssd(rows):
    like = {"dtype": torch.float64, "device": "cpu", "generator": torch.Generator().manual_seed(0)}
    inputs = trapezoid_inputs(rows, TOTAL, 4, 3, 8, 2, 2, x_rank=True, rotation="half", **like)
    state = {name: inputs.pop(name) for name in ("phi", "ssm", "k", "v")}
    names = ("x", "log_decay", "gamma", "beta", "theta", "B", "C")
    per_position = {name: inputs.pop(name)[:1] for name in names}
    return trapezoid, per_position, {name: inputs[name] for name in ("B_bias", "C_bias", "D", "x_rank")} | state, {}


def trapezoid(phi=None, ssm=None, k=None, v=None, **inputs):
    initial = None if phi is None else TrapezoidState(phi, ssm, k, v)
    y, final = trapezoid_ssd(**inputs, initial_state=initial, rotation="half")
    return y, *final


STATES = ("initial_state", "phi", "ssm", "k", "v")
CASES = pytest.mark.parametrize(
    "case",
    [
        of_ssd,
        of_ssd_with_skips,
        of_selective_scan,
        of_linear_scan,
        of_linear_scan_with_one_decay,
        of_ema_scan,
        of_trapezoid_ssd,
    ],
    ids=lambda case: case.__name__,
)


def one_by_one(op, per_position, rest, options):
    """Each sequence alone, with its own initial state."""
    outputs, finals = [], []
    edges = bounds("cpu").tolist()
    for segment, (start, stop) in enumerate(pairwise(edges)):
        here = {name: tensor[segment : segment + 1] if name in STATES else tensor for name, tensor in rest.items()}
        parts = {name: tensor[:, start:stop] for name, tensor in per_position.items()}
        y, *final = op(**parts, **here, **options)
        outputs.append(y)
        finals.append(final)
    return torch.cat(outputs, 1), *(torch.cat(parts) for parts in zip(*finals))


def close(found, expected):
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@CASES
def test_states_of_every_sequence(case, device):
    """Outputs, all final states and all gradients equal those of the sequences alone, each with its own state."""
    op, per_position, rest, options = case(len(LENGTHS))
    per_position, rest = ({k: v.to(device) for k, v in part.items()} for part in (per_position, rest))

    def alone(**tensors):
        return one_by_one(op, *({n: tensors[n] for n in part} for part in (per_position, rest)), options)

    def packed(**tensors):
        return op(**tensors, **options, cu_seqlens=bounds(device), final_states="segments")

    names = ("y", *(f"final {count}" for count in range(len(alone(**per_position, **rest)) - 1)))
    outputs = dict(zip(names, alone(**per_position, **rest)))
    cotangents = {name: torch.randn_like(value) for name, value in outputs.items()}
    inputs = per_position | rest
    close(run_with_gradients(packed, inputs, names, cotangents), run_with_gradients(alone, inputs, names, cotangents))


@CASES
def test_one_state_enters_the_first_sequence(case, device):
    """As with `seq_idx`: the same outputs and last state, whether the other states are asked for or not."""
    op, per_position, rest, options = case(1)
    inputs = {name: tensor.to(device) for name, tensor in (per_position | rest).items()}
    seq_idx = cu_seqlens_to_seq_idx(bounds(device), TOTAL)
    y, *final = op(**inputs, **options, seq_idx=seq_idx)
    same, *last = op(**inputs, **options, cu_seqlens=bounds(device))
    each, *states = op(**inputs, **options, cu_seqlens=bounds(device), final_states="segments")
    assert torch.equal(y, same)
    torch.testing.assert_close(each, y)
    for value, expected, of_all in zip(last, final, states):
        assert torch.equal(value, expected)
        assert of_all.shape[0] == len(LENGTHS)
        torch.testing.assert_close(of_all[:1] if options.get("reverse") else of_all[-1:], expected)


@CASES
def test_without_a_state(case, device):
    op, per_position, rest, options = case(1)
    inputs = {n: t.to(device) for n, t in (per_position | rest).items() if n not in STATES}
    y, *states = op(**inputs, **options, cu_seqlens=bounds(device), final_states="segments")
    zeros = {n: t.new_zeros(len(LENGTHS), *t.shape[1:]).to(device) for n, t in rest.items() if n in STATES}
    expected, *others = op(**inputs, **zeros, **options, cu_seqlens=bounds(device), final_states="segments")
    torch.testing.assert_close(y, expected)
    for value, other in zip(states, others):
        torch.testing.assert_close(value, other)


def test_numbers_of_positions(device):
    found = cu_seqlens_to_seq_idx(torch.tensor([0, 2, 2, 5], device=device), 7)
    assert found.dtype == torch.int32
    assert found.tolist() == [[0, 0, 2, 2, 2, 3, 3]]
    assert cu_seqlens_to_seq_idx(torch.tensor([0], device=device), 2).tolist() == [[0, 0]]
    compiled = torch.compile(cu_seqlens_to_seq_idx, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.tensor([0, 2, 2, 5], device=device), 7), found)


def test_wrong_arguments(device):
    x, p, ends = torch.randn(1, 6, 2, device=device), torch.rand(1, 6, device=device), torch.tensor([0, 4, 6])
    with pytest.raises(ValueError, match="final_states='segments' needs `cu_seqlens`"):
        ema_scan(x, p, final_states="segments")
    with pytest.raises(ValueError, match="final_states must be 'last' or 'segments', got 'all'"):
        ema_scan(x, p, cu_seqlens=ends, final_states="all")
    with pytest.raises(ValueError, match="either `seq_idx` or `cu_seqlens`, not both"):
        ema_scan(x, p, cu_seqlens=ends, seq_idx=torch.zeros(1, 6, dtype=torch.int32))
    with pytest.raises(ValueError, match="single row, b=1"):
        ema_scan(x.expand(2, 6, 2), p.expand(2, 6), cu_seqlens=ends)
    with pytest.raises(ValueError, match=r"`cu_seqlens` must grow from 0 to l=6, got \[0, 4, 5\]"):
        ema_scan(x, p, cu_seqlens=torch.tensor([0, 4, 5]), final_states="segments")
    with pytest.raises(ValueError, match=r"`cu_seqlens` must grow from 0 to l=6, got \[0, 1, 2, 3, ..., 6\]"):
        ema_scan(x, p, cu_seqlens=torch.tensor([0, 1, 2, 3, 2, 3, 4, 5, 6]), final_states="segments")
    with pytest.raises(ValueError, match="`initial_state` has 3 rows, expected 1 or s=2"):
        ema_scan(x, p, torch.zeros(3, 2, device=device), cu_seqlens=ends)
    with pytest.raises(ValueError, match=r"`p` has shape \(1, 5\), expected \(1, 6, ...\) as `x`"):
        ema_scan(x, p[:, :5], cu_seqlens=ends, final_states="segments")
    with pytest.raises(TypeError, match=r"`cu_seqlens` must be a tensor of integers, got torch\.float32"):
        ema_scan(x, p, cu_seqlens=ends.float())
    with pytest.raises(TypeError, match="`cu_seqlens` must be a tensor of integers, got list"):
        ema_scan(x, p, cu_seqlens=[0, 6])
    with pytest.raises(ValueError, match=r"`cu_seqlens` must be \(s \+ 1,\), got shape \(1, 3\)"):
        ema_scan(x, p, cu_seqlens=ends[None])
