"""`causal_conv1d`: against torch's convolution, states at any cut, packing, torch's transforms."""

from importlib import import_module

import pytest
import torch
from torch.nn import functional as F

from omnissm.kernels import BackendError, available_backends, causal_conv1d
from omnissm.kernels.testing import run_with_gradients


def random_inputs(device, b=2, l=20, c=3, k=4):  # noqa: E741
    return {
        "x": torch.randn(b, l, c, device=device),
        "weight": torch.randn(c, k, device=device),
        "bias": torch.randn(c, device=device),
    }


@pytest.mark.parametrize("k", range(1, 9))
def test_equals_torch_convolution(k, backend, device):
    inputs = random_inputs(device, k=k)
    x, weight, bias = inputs.values()
    expected = F.silu(F.conv1d(F.pad(x.mT, (k - 1, 0)), weight[:, None], bias, groups=3).mT)
    y, state = causal_conv1d(**inputs, backend=backend)
    torch.testing.assert_close(y, expected)
    assert torch.equal(state, x[:, 21 - k :].mT)
    if k % 2:
        plain = F.conv1d(x.mT, weight[:, None], bias, padding=k // 2, groups=3).mT
        y, state = causal_conv1d(**inputs, symmetric=True, activation=None, backend=backend)
        torch.testing.assert_close(y, plain)
        assert state.shape == (2, 3, 0)


def test_last_tap_is_the_current_position(backend, device):
    x = torch.zeros(1, 6, 1, device=device)
    x[0, 2] = 1
    weight = torch.tensor([[1.0, 2.0, 3.0]], device=device)
    y, _ = causal_conv1d(x, weight, activation=None, backend=backend)
    assert y[0, :, 0].tolist() == [0, 0, 3, 2, 1, 0]


@pytest.mark.parametrize("cut", [1, 2, 3, 11, 19])
def test_any_cut_carries_state_and_gradients(cut, backend, device):
    inputs = random_inputs(device) | {"initial_state": torch.randn(2, 3, 3, device=device)}
    cotangents = {"y": torch.randn(2, 20, 3, device=device), "state": torch.randn(2, 3, 3, device=device)}

    def in_two(x, initial_state, **parameters):
        first, state = causal_conv1d(x[:, :cut], initial_state=initial_state, **parameters, backend=backend)
        second, state = causal_conv1d(x[:, cut:], initial_state=state, **parameters, backend=backend)
        return torch.cat([first, second], 1), state

    def whole(**arguments):
        return causal_conv1d(**arguments, backend=backend)

    expected = run_with_gradients(whole, inputs, ("y", "state"), cotangents)
    for name, value in run_with_gradients(in_two, inputs, ("y", "state"), cotangents).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_position_by_position_equals_the_whole(backend, device):
    inputs = random_inputs(device, l=7)
    whole, final = causal_conv1d(**inputs, backend=backend)
    x, parameters = inputs.pop("x"), inputs
    state, outputs = None, []
    for t in range(7):
        y, state = causal_conv1d(x[:, t : t + 1], initial_state=state, **parameters, backend=backend)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    assert torch.equal(state, final)


@pytest.mark.parametrize("symmetric", [False, True])
def test_packed_equals_separate(symmetric, backend, device):
    lengths = [1, 6, 2, 10, 1]
    inputs = random_inputs(device, b=1, l=20, k=5)
    seq_idx = torch.repeat_interleave(torch.arange(5, device=device), torch.tensor(lengths, device=device))[None]
    cotangents = {"y": torch.randn(1, 20, 3, device=device), "state": torch.randn(1, 3, 4, device=device)}

    def packed(**arguments):
        return causal_conv1d(**arguments, seq_idx=seq_idx, symmetric=symmetric, backend=backend)

    def separate(x, **parameters):
        parts = [
            causal_conv1d(part, **parameters, symmetric=symmetric, backend=backend) for part in x.split(lengths, 1)
        ]
        return torch.cat([y for y, _ in parts], 1), parts[-1][1]

    expected = run_with_gradients(
        separate, inputs, ("y", "state"), cotangents if not symmetric else {"y": cotangents["y"]}
    )
    got = run_with_gradients(packed, inputs, ("y", "state"), cotangents if not symmetric else {"y": cotangents["y"]})
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_state_enters_the_first_sequence_only(backend, device):
    inputs = random_inputs(device, b=1, l=6)
    state = torch.randn(1, 3, 3, device=device)
    seq_idx = torch.tensor([[4, 4, 7, 7, 7, 7]], device=device)
    y, _ = causal_conv1d(**inputs, initial_state=state, seq_idx=seq_idx, backend=backend)
    x, parameters = inputs.pop("x"), inputs
    head, _ = causal_conv1d(x[:, :2], initial_state=state, **parameters, backend=backend)
    tail, _ = causal_conv1d(x[:, 2:], **parameters, backend=backend)
    torch.testing.assert_close(y, torch.cat([head, tail], 1))


def test_no_positions(backend, device):
    inputs = random_inputs(device, l=0)
    state = torch.randn(2, 3, 3, device=device)
    y, final = causal_conv1d(**inputs, initial_state=state, backend=backend)
    assert y.shape == (2, 0, 3)
    assert torch.equal(final, state)
    packed = torch.zeros(2, 0, dtype=torch.int32, device=device)
    assert torch.equal(causal_conv1d(**inputs, initial_state=state, seq_idx=packed, backend=backend)[1], state)
    assert not causal_conv1d(**inputs, backend=backend)[1].any()


def test_wrong_arguments(device):
    inputs = random_inputs(device)
    with pytest.raises(ValueError, match=r"`weight` has c=2, expected 3 \(from `x`\)"):
        causal_conv1d(inputs["x"], torch.zeros(2, 4, device=device))
    with pytest.raises(ValueError, match="`weight` has k=9, expected 1 to 8"):
        causal_conv1d(inputs["x"], torch.zeros(3, 9, device=device))
    with pytest.raises(ValueError, match="`initial_state` has 3=4, expected 3"):
        causal_conv1d(**inputs, initial_state=torch.zeros(2, 3, 4, device=device))
    with pytest.raises(ValueError, match="needs an odd k and no initial_state, got k=4"):
        causal_conv1d(**inputs, symmetric=True)
    with pytest.raises(ValueError, match="activation must be 'silu' or None, got 'relu'"):
        causal_conv1d(**inputs, activation="relu")


def test_autocast_narrows_the_input_and_not_the_parameters(backend, device):
    inputs = {name: value.requires_grad_() for name, value in random_inputs(device).items()}
    with torch.autocast(device.type, torch.bfloat16):
        y, state = causal_conv1d(**inputs, backend=backend)
    assert y.dtype == state.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().sum(), list(inputs.values()))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    narrowed = inputs | {"x": inputs["x"].bfloat16()}
    assert torch.equal(y, causal_conv1d(**narrowed, backend=backend)[0])


def test_vmap_and_functional_gradients(backend, device):
    inputs = random_inputs(device, b=4)
    x, weight, bias = inputs.values()

    def convolve(x, weight, bias):
        return causal_conv1d(x, weight, bias, backend=backend)[0]

    expected = convolve(x, weight, bias)
    shared = torch.func.vmap(convolve, in_dims=(0, None, None))(x[:, None], weight, bias)
    torch.testing.assert_close(shared[:, 0], expected)
    own = torch.func.vmap(convolve)(x[:, None], weight.expand(4, 3, 4), bias.expand(4, 3))
    torch.testing.assert_close(own[:, 0], expected)

    def loss(weight, bias, x):
        return convolve(x, weight, bias).square().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1, 2))
    each = torch.func.vmap(gradient, in_dims=(None, None, 0))(weight, bias, x[:, None])
    for k, one in enumerate(zip(*(gradient(weight, bias, row[None]) for row in x))):
        torch.testing.assert_close(each[k], torch.stack(one))


def test_second_derivative_in_triton_names_the_way_out(device):
    if available_backends(device)["triton"]:
        pytest.skip("Triton does not run here")
    inputs = {name: value.requires_grad_() for name, value in random_inputs(device).items()}
    y, _ = causal_conv1d(**inputs, backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(BackendError, match="causal_conv1d has no second derivative in Triton"):
        dx.sum().backward()


def test_opcheck(device):
    if available_backends(device)["triton"]:
        pytest.skip("Triton does not run here")
    from omnissm.kernels.causal_conv1d import triton_impl

    x, weight, bias = random_inputs(device, l=5).values()
    seq_idx = torch.tensor([[0, 0, 1, 1, 1]] * 2, dtype=torch.int32, device=device)
    torch.library.opcheck(triton_impl._forward, (x, weight, bias, seq_idx, 3, 5, True))
    torch.library.opcheck(triton_impl._backward, (x, weight, None, None, x, 3, False))


def test_export_with_dynamic_length(device):
    class Convolution(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(3))

        def forward(self, x):
            return causal_conv1d(x, self.weight, self.bias)

    module = Convolution().to(device)
    length = torch.export.Dim("length", min=4, max=4096)
    program = torch.export.export(module, (torch.randn(2, 9, 3, device=device),), dynamic_shapes=({1: length},))
    x = torch.randn(2, 33, 3, device=device)
    for got, expected in zip(program.module()(x), module(x)):
        torch.testing.assert_close(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_compile_once_for_all_lengths(packed, device):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(causal_conv1d, backend=counter, fullgraph=True, dynamic=True)
    for length in (6, 11, 30):
        inputs = {name: value.requires_grad_() for name, value in random_inputs(device, l=length).items()}
        seq_idx = (torch.arange(length, device=device) // 4).expand(2, -1) if packed else None
        got = torch.autograd.grad(compiled(**inputs, seq_idx=seq_idx)[0].square().sum(), list(inputs.values()))
        y, _ = causal_conv1d(**inputs, seq_idx=seq_idx, backend="reference")
        expected = torch.autograd.grad(y.square().sum(), list(inputs.values()))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation", ["silu", None])
def test_a_state_in_front_of_a_long_row_is_seen_by_the_first_positions_alone(activation, packed, device):
    """Without a gradient they are worked out apart; with one the state is put in front of all."""
    x, weight = torch.randn(2, 70, 5, device=device), torch.randn(5, 4, device=device)
    state, bias = torch.randn(2, 5, 3, device=device), torch.randn(5, device=device)
    seq_idx = None
    if packed:
        seq_idx = torch.arange(70, device=device).ge(torch.tensor([[1], [40]], device=device)).int()
    expected = causal_conv1d(x.requires_grad_(), weight, bias, state, activation=activation, seq_idx=seq_idx)
    with torch.no_grad():
        found = causal_conv1d(x, weight, bias, state, activation=activation, seq_idx=seq_idx)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b.detach())
    assert not torch.equal(found[0][:, 0], causal_conv1d(x, weight, bias, activation=activation)[0][:, 0])


@pytest.mark.parametrize("piece", [500, 1 << 17])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("symmetric", [False, True])
def test_pieces_of_a_cpu_keep_the_inputs_alone_for_the_gradient(symmetric, activation, piece, monkeypatch):
    monkeypatch.setattr(import_module("omnissm.kernels.causal_conv1d.chunked"), "_PIECE", piece)
    inputs = {
        "x": torch.randn(4, 30, 75).mT.requires_grad_(),  # of other strides
        "weight": torch.randn(30, 3).requires_grad_(),
        "bias": torch.randn(30).requires_grad_(),
    }

    def outputs(backend: str, kept: list[torch.Tensor]) -> list[torch.Tensor]:
        options = {"symmetric": symmetric, "activation": activation, "backend": backend}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            y, _ = causal_conv1d(**inputs, **options)
        plain = torch.autograd.grad(y.sin().sum(), list(inputs.values()), retain_graph=True)
        first = torch.autograd.grad(y.sin().sum(), list(inputs.values()), create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), list(inputs.values()), allow_unused=True)
        return [y, *plain, *first, *(torch.zeros(()) if one is None else one for one in second)]

    found, expected = outputs("chunked", kept := []), outputs("reference", [])
    assert not {x.untyped_storage().data_ptr() for x in kept} - {
        x.untyped_storage().data_ptr() for x in inputs.values()
    }
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two.expand_as(one), rtol=1e-4, atol=1e-4)
