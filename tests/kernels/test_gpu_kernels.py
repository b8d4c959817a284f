"""What only a GPU shows of Triton kernels of sequence ops: digits, races, recorded graphs, offsets beyond 32 bits."""

from importlib import import_module

import pytest
import torch

from omnissm.kernels import (
    causal_conv1d,
    ema_scan,
    gated_norm,
    linear_scan,
    quasiseparable,
    selective_scan,
    ssd,
    trapezoid_ssd,
)
from omnissm.kernels.testing import check_op, relative_error, run_with_gradients

pytestmark = pytest.mark.gpu

# Rows of many chunks, of widths that models have.
SIZES = {
    "linear_scan": {"b": 2, "l": 700, "d": 512},
    "ema_scan": {"b": 2, "l": 700, "d": 512, "state": True},
    "selective_scan": {"b": 2, "l": 700, "d": 256, "n": 16, "gate": True, "state": True},
    "ssd": {"b": 2, "l": 700, "h": 8, "p": 64, "n": 128},
    "quasiseparable": {"b": 2, "l": 700, "h": 8, "p": 64, "n": 64},
    "trapezoid_ssd": {"b": 2, "l": 700, "h": 8, "p": 64, "n": 64},
    "causal_conv1d": {"b": 2, "l": 700, "c": 512, "k": 4},
    "gated_norm": {"r": 1400, "d": 1024},
}
EVERY = pytest.mark.parametrize("name", SIZES)
OUTPUTS = ("y", "states", "means")
DECAYS = ("dA", "dlog_decay", "dlog_decay_f", "dlog_decay_b")


def digits_of(name, kind, tensor):
    """The error that bfloat16 may make. Rounding one number makes 1.7e-3.

    `trapezoid_ssd` rounds keys and queries once more, turned, and with ranks inputs too.
    """
    if tensor == "dtheta":
        return 1e-2
    if name == "trapezoid_ssd":
        return 4e-3 if tensor in ("dB", "dC", *DECAYS) else 4.5e-3 if kind else 3.5e-3
    return 2.3e-3 if tensor in OUTPUTS else 4e-3 if tensor in DECAYS else 3e-3


def spec_of(name):
    return import_module(f"omnissm.kernels.{name}.spec").SPEC


def inputs_of(name, dtype, device, **size):
    generator = torch.Generator(device).manual_seed(0)
    return spec_of(name).make_inputs(**SIZES[name] | size, dtype=dtype, device=device, generator=generator)


def gradients_of(name, inputs):
    """Outputs and gradients, for gradients of the first output that stay the same."""
    spec = spec_of(name)
    with torch.no_grad():
        found = spec.op(**inputs, backend="triton")
    y = found[0] if isinstance(found, tuple) else found
    ones = torch.randn(y.shape, device=y.device, generator=torch.Generator(y.device).manual_seed(1)).to(y.dtype)
    return run_with_gradients(
        lambda **kw: spec.op(**kw, backend="triton"), inputs, spec.outputs, {spec.outputs[0]: ones}
    )


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_digits(name, dtype, device):
    """float32 within 1e-5 everywhere, bfloat16 within little more than the rounding of inputs and results."""
    spec, size = spec_of(name), SIZES[name]
    kinds = [{}, {"r": 4, "rotation": "half", "x_rank": True}] if name == "trapezoid_ssd" else [{}]
    for kind in kinds:
        errors = check_op(spec, size | kind, "triton", dtype, device)
        for tensor, error in errors.items():
            if dtype == torch.bfloat16:
                assert error < digits_of(name, kind, tensor), (kind, tensor, error)


@EVERY
def test_twenty_runs_agree_to_the_bit(name, device):
    inputs = inputs_of(name, torch.bfloat16, device)
    first = gradients_of(name, inputs)
    for _ in range(19):
        for tensor, value in gradients_of(name, inputs).items():
            assert torch.equal(value, first[tensor]), tensor


@EVERY
def test_cuda_graph_of_output_and_gradients_takes_new_data(name, device):
    spec, inputs = spec_of(name), inputs_of(name, torch.bfloat16, device)
    leaves = {key: x.requires_grad_() for key, x in inputs.items() if torch.is_tensor(x) and x.is_floating_point()}

    def run():
        found = spec.op(**inputs, backend="triton")
        y = found[0] if isinstance(found, tuple) else found
        return y, *torch.autograd.grad(y.float().square().sum(), list(leaves.values()), allow_unused=True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    for _ in range(2):
        with torch.no_grad():
            next(iter(leaves.values())).mul_(0.5)
        graph.replay()
        for value, expected in zip(recorded, run(), strict=True):
            assert (value is None and expected is None) or torch.equal(value, expected)


LONG, CUT = 1_048_576, 1000


def long_rows(name, device):
    """The op; what gets a gradient; what lies along the row; the rest. The last CUT positions forget all before."""
    like = {"dtype": torch.bfloat16, "device": device}

    def normal(*shape):
        return torch.randn(1, LONG, *shape, **like)

    def level(value, cut, *shape):
        found = torch.full((1, LONG, *shape), value, device=device)
        found[:, -CUT] = cut
        return found

    if name == "linear_scan":
        return linear_scan, "b", {"b": normal(2560), "a": level(0.9, 0.0, 1)}, {}
    if name == "ema_scan":
        return ema_scan, "x", {"x": normal(2560), "p": level(0.1, 1.0)}, {}
    if name == "selective_scan":
        rest = {"dt": level(0.1, 1e4, 2560).bfloat16(), "B": normal(1), "C": normal(1)}
        rest["B"][:, -CUT] = 0  # what a step as long as this would take in
        return selective_scan, "u", {"u": normal(2560)} | rest, {"A": -torch.ones(2560, 1, device=device)}
    if name == "causal_conv1d":
        x = normal(2560)
        x[:, -CUT - 3 : -CUT] = 0
        parameters = {"weight": torch.randn(2560, 4, device=device), "bias": torch.randn(2560, device=device)}
        return causal_conv1d, "x", {"x": x}, parameters
    if name == "gated_norm":
        return gated_norm, "x", {"x": normal(2560), "z": normal(2560)}, {"weight": torch.ones(2560, device=device)}
    decay = level(-0.1, -1e4, 40)
    if name == "ssd":
        return ssd, "x", {"x": normal(40, 64), "log_decay": decay, "B": normal(1, 16), "C": normal(1, 16)}, {}
    if name == "quasiseparable":
        maps = {f"{kind}_{side}": normal(1, 16) for kind in "BC" for side in "fb"}
        weights = {f"weight_{side}": None for side in "fb"}
        sides = {"log_decay_f": decay, "log_decay_b": decay, "diag": level(1.0, 1.0, 40)} | maps
        return quasiseparable, "x", {"x": normal(40, 64)} | sides, {"shift": False} | weights
    gates = {"log_decay": decay, "gamma": level(0.1, 0.1, 40), "beta": level(0.1, 0.1, 40)}
    maps = {"theta": normal(4), "B": normal(1, 1, 16), "C": normal(1, 1, 16)}
    return trapezoid_ssd, "x", {"x": normal(40, 64)} | gates | maps, {}


def tail_of(op, signal, along, rest):
    """The last CUT outputs for a gradient that enters there alone, and the gradient of the signal."""
    x = along[signal].detach().requires_grad_()
    found = op(**along | {signal: x}, **rest, backend="triton")
    y = found[0] if isinstance(found, tuple) else found
    dy = torch.zeros_like(y)
    generator = torch.Generator(y.device).manual_seed(1)
    dy[:, -CUT:] = torch.randn(dy[:, -CUT:].shape, generator=generator, dtype=dy.dtype, device=dy.device)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y[:, -CUT:].double(), dx


@pytest.mark.slow
@EVERY
def test_offsets_beyond_32_bit(name, device):
    """2.7e9 elements forward and backward; what a full decay cuts off equals the same positions run alone."""
    op, signal, along, rest = long_rows(name, device)
    y, dx = tail_of(op, signal, along, rest)
    expected, gradient = tail_of(op, signal, {key: x[:, -CUT:].clone() for key, x in along.items()}, rest)
    assert relative_error(y, expected) < 1e-2  # chunks begin elsewhere, and products round to 16 bits
    assert relative_error(dx[:, -CUT:], gradient.double()) < 1e-2
    assert not dx[:, : -CUT - 3].any()
