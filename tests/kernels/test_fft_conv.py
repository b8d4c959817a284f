"""`fft_conv`: against torch's convolution and the recurrence it stands for, states at any cut, packing, transforms."""

import pytest
import torch
from torch.nn import functional as F

from omnissm.kernels import BackendError, causal_conv1d, fft_conv, linear_scan
from omnissm.kernels.fft_conv import chunked
from omnissm.kernels.testing import relative_error, run_with_gradients


@pytest.fixture(params=["reference", "chunked"])
def backend(request):
    return request.param


def random_inputs(device, b=2, l=70, c=3, k=45, dtype=torch.float32, **more):  # noqa: E741
    like = {"device": device, "dtype": dtype}
    inputs = {"x": torch.randn(b, l, c, **like), "kernel": torch.randn(c, k, **like), "D": torch.randn(c, **like)}
    return inputs | ({"kernel_ahead": torch.randn(c, k, **like)} if more.get("ahead") else {})


def assert_equal(got, expected, tolerance=1e-4):
    for name, value in got.items():
        torch.testing.assert_close(
            value, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("k", [1, 2, 16, 17, 70, 90])
def test_equals_torch_convolution(k, backend, device):
    inputs = random_inputs(device, k=k, ahead=True)
    x, kernel, skip, ahead = inputs.values()
    causal = F.conv1d(F.pad(x.mT, (k - 1, 0)), kernel.flip(1)[:, None], groups=3).mT
    later = F.conv1d(F.pad(x.mT, (0, k)), F.pad(ahead, (1, 0))[:, None], groups=3).mT
    y, state = fft_conv(x, kernel, backend=backend)
    torch.testing.assert_close(y, causal, rtol=1e-4, atol=1e-4)
    assert torch.equal(state, F.pad(x.mT, (max(0, k - 1 - 70), 0))[..., max(0, 71 - k) :])
    y, state = fft_conv(**inputs, backend=backend)
    torch.testing.assert_close(y, causal + later + skip * x, rtol=1e-4, atol=1e-4)
    assert state.shape == (2, 3, 0)


def test_entry_0_is_the_current_position_and_the_next(backend, device):
    x = torch.zeros(1, 40, 1, device=device)
    x[0, 20] = 1
    kernel, ahead = torch.arange(1.0, 31, device=device)[None], torch.arange(101.0, 131, device=device)[None]
    y, _ = fft_conv(x, kernel, kernel_ahead=ahead, backend=backend)
    expected = [*range(120, 100, -1), *range(1, 21)]
    expected = torch.tensor(expected, dtype=torch.float32, device=device)
    torch.testing.assert_close(y[0, :, 0], expected, rtol=1e-5, atol=1e-4)


def test_wide_form_of_the_short_convolution(backend, device):
    inputs = random_inputs(device, k=5)
    x, kernel = inputs["x"], inputs["kernel"]
    state = torch.randn(2, 3, 4, device=device)
    expected = causal_conv1d(x, kernel.flip(1), initial_state=state, activation=None)
    for got, value in zip(fft_conv(x, kernel, initial_state=state, backend=backend), expected):
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-5)


def test_equals_the_recurrence_it_stands_for(backend, device):
    """K_t = a^t is the response of h_t = a h_{t-1} + x_t."""
    x, a = torch.randn(2, 100, 3, device=device), torch.tensor([0.9, -0.5, 0.99], device=device)
    y, _ = fft_conv(x, a[:, None] ** torch.arange(100, device=device), backend=backend)
    torch.testing.assert_close(y, linear_scan(a, x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cut", [1, 20, 44, 69])
def test_any_cut_carries_state_and_gradients(cut, backend, device):
    inputs = random_inputs(device) | {"initial_state": torch.randn(2, 3, 44, device=device)}
    cotangents = {"y": torch.randn(2, 70, 3, device=device), "state": torch.randn(2, 3, 44, device=device)}

    def in_two(x, initial_state, **parameters):
        first, state = fft_conv(x[:, :cut], initial_state=initial_state, **parameters, backend=backend)
        second, state = fft_conv(x[:, cut:], initial_state=state, **parameters, backend=backend)
        return torch.cat([first, second], 1), state

    def whole(**arguments):
        return fft_conv(**arguments, backend=backend)

    expected = run_with_gradients(whole, inputs, ("y", "state"), cotangents)
    assert_equal(run_with_gradients(in_two, inputs, ("y", "state"), cotangents), expected)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("lengths", [[1, 40, 2, 100, 57, 1], [201], [16, 16, 32, 64, 73]], ids=str)
def test_packed_equals_separate(lengths, ahead, backend, device):
    """Sequences of one position, one over the whole row, and borders on and off those of the blocks."""
    inputs = random_inputs(device, b=1, l=201, k=90, ahead=ahead)
    counts = torch.tensor(lengths, device=device)
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths), device=device), counts)[None]
    cotangents = {"y": torch.randn(1, 201, 3, device=device)}
    if not ahead:
        cotangents["state"] = torch.randn(1, 3, 89, device=device)

    def packed(**arguments):
        return fft_conv(**arguments, seq_idx=seq_idx, backend=backend)

    def separate(x, **parameters):
        parts = [fft_conv(part, **parameters, backend="reference") for part in x.split(lengths, 1)]
        return torch.cat([y for y, _ in parts], 1), parts[-1][1]

    expected = run_with_gradients(separate, inputs, ("y", "state"), cotangents)
    assert_equal(run_with_gradients(packed, inputs, ("y", "state"), cotangents), expected)


def test_state_enters_the_first_sequence_only(backend, device):
    inputs = random_inputs(device, b=1)
    state = torch.randn(1, 3, 44, device=device)
    seq_idx = torch.tensor([4] * 30 + [7] * 40, device=device)[None]
    y, _ = fft_conv(**inputs, initial_state=state, seq_idx=seq_idx, backend=backend)
    x, parameters = inputs.pop("x"), inputs
    head, _ = fft_conv(x[:, :30], initial_state=state, **parameters, backend=backend)
    tail, _ = fft_conv(x[:, 30:], **parameters, backend=backend)
    torch.testing.assert_close(y, torch.cat([head, tail], 1), rtol=1e-4, atol=1e-4)


def test_reversal_exchanges_the_two_kernels(backend, device):
    x, kernel, _, ahead = random_inputs(device, ahead=True).values()
    ahead = F.pad(ahead[:, :-1], (0, 1))  # lags 0 to 44 one way are -1 to -44 the other way
    there, _ = fft_conv(x, kernel, kernel_ahead=ahead, backend=backend)
    later = torch.cat([kernel[:, :1], ahead[:, :-1]], 1)
    back, _ = fft_conv(x.flip(1), later, kernel_ahead=F.pad(kernel[:, 1:], (0, 1)), backend=backend)
    torch.testing.assert_close(there, back.flip(1), rtol=1e-4, atol=1e-4)


def test_no_gradient_from_the_future(backend, device):
    """Exactly none in the loop; through a common FFT none beyond rounding."""
    inputs = random_inputs(device)
    x = inputs["x"].requires_grad_()
    (dx,) = torch.autograd.grad(fft_conv(**inputs, backend=backend)[0][:, 30].sum(), x)
    assert dx[:, :31].any(dim=(0, 2)).all()
    assert dx[:, 31:].abs().max() <= (0 if backend == "reference" else 1e-5)


def test_sequences_packed_side_by_side_do_not_mix(device):
    """Huge values of one sequence do not reach the rounding of another: it is left out before any FFT."""
    inputs = random_inputs(device, b=1, l=128)
    seq_idx = (torch.arange(128, device=device) // 50)[None]
    y, _ = fft_conv(**inputs, seq_idx=seq_idx)
    inputs["x"] = torch.where((seq_idx == 0)[..., None], 1e30, inputs["x"])
    assert torch.equal(fft_conv(**inputs, seq_idx=seq_idx)[0][:, 64:], y[:, 64:])


@pytest.mark.parametrize("packed", [False, True])
def test_accuracy_of_long_rows_and_large_inputs(packed, device):
    x = 1e4 * torch.randn(1, 20000, 2, device=device)
    kernel = torch.randn(2, 20000, device=device)
    seq_idx = (torch.arange(20000, device=device) // 7000)[None] if packed else None
    wide, _ = fft_conv(x.double(), kernel.double(), seq_idx=seq_idx)
    narrow, _ = fft_conv(x, kernel, seq_idx=seq_idx)
    assert narrow.dtype == torch.float32
    assert relative_error(narrow, wide) < 1e-6


def test_blocks_of_channels_change_nothing(device, monkeypatch):
    inputs = random_inputs(device, c=7)
    seq_idx = (torch.arange(70, device=device) // 30).expand(2, -1)
    whole = [fft_conv(**inputs)[0], fft_conv(**inputs, seq_idx=seq_idx)[0]]
    monkeypatch.setattr(chunked, "_BLOCK_NUMBERS", 4 * 2 * 70)
    blocks = [fft_conv(**inputs)[0], fft_conv(**inputs, seq_idx=seq_idx)[0]]
    torch.testing.assert_close(blocks, whole)


def test_workspace_is_bounded(device, monkeypatch):
    """No tensor inside is larger than a few times the block, however many channels there are."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found._base is None:
                self.bytes = max(self.bytes, found.numel() * found.element_size())
            return found

    monkeypatch.setattr(chunked, "_BLOCK_NUMBERS", 4096)
    x, kernel = torch.randn(1, 256, 64, device=device), torch.randn(64, 256, device=device)
    with Largest() as largest:
        fft_conv(x, kernel)
    assert largest.bytes <= max(4 * x.numel(), 8 * 4096)


def test_fft_lengths():
    for least in range(1, 3000):
        n = chunked._fast_length(least)
        assert n >= least
        assert n % 2 == 0
        assert n <= max(2, 1.34 * least)
        while n % 2 == 0:
            n //= 2
        assert n in (1, 3, 5, 9, 15)


def test_no_positions(backend, device):
    inputs = random_inputs(device, l=0)
    state = torch.randn(2, 3, 44, device=device)
    y, final = fft_conv(**inputs, initial_state=state, backend=backend)
    assert y.shape == (2, 0, 3)
    assert torch.equal(final, state)
    assert not fft_conv(**inputs, backend=backend)[1].any()


def test_wrong_arguments(device):
    inputs = random_inputs(device)
    x, kernel = inputs["x"], inputs["kernel"]
    with pytest.raises(ValueError, match=r"`kernel` has c=2, expected 3 \(from `x`\)"):
        fft_conv(x, kernel[:2])
    with pytest.raises(ValueError, match="`initial_state` has 4 inputs, expected 44"):
        fft_conv(x, kernel, initial_state=torch.zeros(2, 3, 4, device=device))
    with pytest.raises(ValueError, match="kernel_ahead takes no initial_state"):
        fft_conv(x, kernel, initial_state=torch.zeros(2, 3, 44, device=device), kernel_ahead=kernel)
    with pytest.raises(ValueError, match="`kernel` has k=0"):
        fft_conv(x, kernel[:, :0])
    with pytest.raises(BackendError, match="fft_conv has no triton implementation"):
        fft_conv(x, kernel, backend="triton")


def test_16_bit_inputs_are_transformed_in_float32(backend, device):
    inputs = random_inputs(device)
    narrow = inputs | {"x": inputs["x"].half()}
    y, state = fft_conv(**narrow, backend=backend)
    assert y.dtype == state.dtype == torch.float16
    expected, _ = fft_conv(**inputs | {"x": narrow["x"].float()}, backend=backend)
    torch.testing.assert_close(y, expected.half(), rtol=2e-3, atol=1e-3)


def test_autocast_narrows_the_input_and_not_the_parameters(backend, device):
    inputs = {name: value.requires_grad_() for name, value in random_inputs(device, ahead=True).items()}
    seq_idx = (torch.arange(70, device=device) // 30).expand(2, -1)
    for index in (None, seq_idx):
        with torch.autocast(device.type, torch.bfloat16):
            y, state = fft_conv(**inputs, seq_idx=index, backend=backend)
        assert y.dtype == state.dtype == torch.bfloat16
        gradients = torch.autograd.grad(y.float().sum(), list(inputs.values()))
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        rounded = inputs | {"x": inputs["x"].bfloat16().float()}
        torch.testing.assert_close(y.float(), fft_conv(**rounded, seq_idx=index)[0], rtol=1e-2, atol=1e-2)


def test_vmap_and_functional_gradients(device):
    x, kernel, skip = random_inputs(device, b=4).values()
    seq_idx = torch.randint(0, 2, (4, 1, 70), device=device).cumsum(-1) // 9

    def convolve(x, kernel, skip, seq_idx=None):
        return fft_conv(x, kernel, skip, seq_idx=seq_idx)[0]

    expected = convolve(x, kernel, skip)
    close = {"rtol": 1e-4, "atol": 1e-4}
    shared = torch.func.vmap(convolve, in_dims=(0, None, None))(x[:, None], kernel, skip)
    torch.testing.assert_close(shared[:, 0], expected, **close)
    own = torch.func.vmap(convolve)(x[:, None], kernel.expand(4, 3, 45), skip.expand(4, 3))
    torch.testing.assert_close(own[:, 0], expected, **close)
    packed = torch.func.vmap(convolve, in_dims=(0, None, None, 0))(x[:, None], kernel, skip, seq_idx)
    torch.testing.assert_close(packed[:, 0], convolve(x, kernel, skip, seq_idx[:, 0]), **close)

    def loss(kernel, skip, x, seq_idx):
        return convolve(x, kernel, skip, seq_idx).square().mean()

    gradient = torch.func.grad(loss, argnums=(0, 1, 2))
    for index in (None, seq_idx):
        dims = (None, None, 0, None if index is None else 0)
        each = torch.func.vmap(gradient, in_dims=dims)(kernel, skip, x[:, None], index)
        alone = [gradient(kernel, skip, x[m, None], None if index is None else index[m]) for m in range(4)]
        for k, one in enumerate(zip(*alone)):
            torch.testing.assert_close(each[k], torch.stack(one), **close)


@pytest.mark.parametrize(("l", "k"), [(5, 3), (21, 20)])
@pytest.mark.parametrize("packed", [False, True])
def test_derivatives_by_differences(l, k, packed, device):  # noqa: E741
    """The direct sums, and the FFTs beyond lag 16."""
    inputs = random_inputs(device, b=1, l=l, k=k, c=1, dtype=torch.float64, ahead=True)
    leaves = [value.requires_grad_() for value in inputs.values()]
    seq_idx = (torch.arange(l, device=device) > l - 2)[None].int() if packed else None

    def convolve(x, kernel, skip, ahead):
        return fft_conv(x, kernel, skip, kernel_ahead=ahead, seq_idx=seq_idx)[0]

    assert torch.autograd.gradcheck(convolve, leaves)
    assert torch.autograd.gradgradcheck(convolve, leaves)


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed, device):
    x, kernel, _ = random_inputs(device, l=30, k=25).values()
    seq_idx = (torch.arange(30, device=device) // 20).expand(2, -1) if packed else None
    torch.library.opcheck(chunked._convolve, (x, kernel, 4, seq_idx))
    torch.library.opcheck(chunked._correlate, (x, x.flip(1), 25, 4, seq_idx))


def test_export_with_dynamic_length(device):
    class Convolution(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = torch.nn.Parameter(torch.randn(3, 40))

        def forward(self, x):
            return fft_conv(x, self.kernel)

    module = Convolution().to(device)
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(module, (torch.randn(2, 9, 3, device=device),), dynamic_shapes=({1: length},))
    for l in (2, 64, 133):  # noqa: E741
        x = torch.randn(2, l, 3, device=device)
        for got, expected in zip(program.module()(x), module(x)):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_compile_once_for_all_lengths(packed, device):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fft_conv, backend=counter, fullgraph=True, dynamic=True)
    for length in (21, 50, 90):
        inputs = random_inputs(device, l=length, k=length)
        leaves = [value.requires_grad_() for value in inputs.values()]
        seq_idx = (torch.arange(length, device=device) // 18).expand(2, -1) if packed else None
        got = torch.autograd.grad(compiled(**inputs, seq_idx=seq_idx)[0].square().sum(), leaves)
        expected = torch.autograd.grad(fft_conv(**inputs, seq_idx=seq_idx)[0].square().sum(), leaves)
        torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1
