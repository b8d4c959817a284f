"""`ema_scan`: facts of the average, packing, digits, torch's transforms."""

import pytest
import torch

from omnissm.kernels import BackendError, available_backends, ema_scan, linear_scan, ssd
from omnissm.kernels.ema_scan.spec import SPEC, make_inputs
from omnissm.kernels.testing import check_op, relative_error, run_with_gradients


@pytest.fixture(params=["reference", "chunked", "triton"])
def path(request, device) -> str:
    if reason := available_backends(device)[request.param]:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def triton_impl(device):
    """The Triton implementation, where it runs."""
    if reason := available_backends(device)["triton"]:
        pytest.skip(reason)
    from omnissm.kernels.ema_scan import triton_impl

    return triton_impl


def inputs_of(device, b=2, l=10, d=3, dtype=torch.float32, **options):  # noqa: E741
    generator = torch.Generator(device).manual_seed(0)
    return make_inputs(b, l, d, dtype=dtype, device=device, generator=generator, **options)


def test_equal_weights_are_the_running_mean(path, device):
    """p_t = 1 / (t + 1) weighs all positions so far alike."""
    x = torch.randn(1, 50, 3, device=device)
    count = torch.arange(1.0, 51.0, device=device)
    means, final = ema_scan(x, 1 / count[None], backend=path)
    torch.testing.assert_close(means, x.cumsum(1) / count[:, None])
    torch.testing.assert_close(final, x.mean(1))


def test_one_copies_and_zero_holds_to_the_bit(path, device):
    inputs = inputs_of(device, l=40, state=True)
    inputs["p"] = (inputs["p"] > 0.5).float()
    inputs["p"][:, :2] = 0
    means, final = ema_scan(**inputs, backend=path)
    held = inputs["initial_state"]
    for t in range(40):
        held = torch.where(inputs["p"][:, t, None] == 1, inputs["x"][:, t], held)
        assert torch.equal(means[:, t], held)
    assert torch.equal(final, held)


def test_equals_linear_scan_and_ssd(path, device):
    inputs = inputs_of(device, l=70, state=True)
    x, p, state = inputs.values()
    means, final = ema_scan(**inputs, backend=path)
    states, last = linear_scan(1 - p[..., None], p[..., None] * x, state)
    torch.testing.assert_close(means, states)
    torch.testing.assert_close(final, last)
    one = torch.ones(2, 70, 1, 1, device=device)
    state, weight = state[:, None, :, None], p[..., None]
    y, _ = ssd(x[:, :, None], torch.log1p(-p)[..., None], one, one, state, weight=weight, backend="chunked")
    torch.testing.assert_close(y[:, :, 0], means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 63, 64, 65, 127, 128, 129, 197, 300, 1000])
def test_lengths(length, backend, device):
    check_op(SPEC, {"b": 1, "l": length, "d": 3, "state": True}, backend, torch.float32, device)


@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("packed", [False, True])
def test_triton_parts_agree(parts, packed, triton_impl, device):
    """Cutting a sequence into parts is a matter of speed only."""
    inputs = inputs_of(device, b=2, l=150, state=True, packed=packed)
    x, p, state = (inputs[name] for name in ("x", "p", "initial_state"))
    index = inputs.get("seq_idx")
    means, final = triton_impl._forward(x, p, state, index, parts)
    expected, last = ema_scan(x.double(), p.double(), state.double(), seq_idx=index, backend="reference")
    torch.testing.assert_close(means, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final, last.float(), rtol=1e-5, atol=1e-5)
    saved = (x, p, state, index, means, torch.randn_like(means), torch.randn_like(final))
    for one, whole in zip(triton_impl._backward(*saved, parts), triton_impl._backward(*saved, 1)):
        torch.testing.assert_close(one, whole, rtol=1e-5, atol=1e-5)


def test_second_derivative_in_triton_names_the_way_out(triton_impl, device):
    inputs = inputs_of(device)
    inputs["x"].requires_grad_()
    means, _ = ema_scan(**inputs, backend="triton")
    (dx,) = torch.autograd.grad(means.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(BackendError, match="no second derivative in Triton; call it with backend='chunked'"):
        dx.sum().backward()


def test_opcheck(triton_impl, device):
    inputs = inputs_of(device, l=5, state=True, packed=True)
    x, p, state, index = (inputs[name] for name in ("x", "p", "initial_state", "seq_idx"))
    torch.library.opcheck(triton_impl._forward, (x, p, state, index, 0))
    torch.library.opcheck(triton_impl._backward, (x, p, state, None, x.clone(), x.clone(), state.clone(), 0))


def test_sixteen_bit_digits(backend, device):
    """Nothing but the rounding of inputs and results; Triton keeps the means as they were returned."""
    errors = check_op(SPEC, {"b": 1, "l": 300, "d": 32, "state": True}, backend, torch.bfloat16, device)
    truncates = backend == "triton" and device.type == "cpu"  # what the interpreter does where a GPU rounds
    assert max(errors["means"], errors["dx"]) < (4e-3 if truncates else 2.3e-3)
    assert errors["dp"] < (1e-5 if backend == "chunked" else 3e-3)
    assert max(errors["final_state"], errors["dinitial_state"]) < 1e-5


def test_gradient_of_the_weight_where_x_is_smooth(backend, device):
    """x varies by 1e-4 of itself: sum g x - sum g m would lose 1e-2 of the gradient in float32."""
    inputs = inputs_of(device, b=1, l=200, d=256, state=True)
    inputs |= {name: 100 + 0.01 * inputs[name] for name in ("x", "initial_state")}
    cotangents = {"means": torch.rand_like(inputs["x"])}
    wide = {name: value.double() for name, value in inputs.items()}
    expected = run_with_gradients(ema_scan, wide, SPEC.outputs, cotangents)["dp"]
    found = run_with_gradients(lambda **kw: ema_scan(**kw, backend=backend), inputs, SPEC.outputs, cotangents)["dp"]
    assert relative_error(found, expected) < 3e-3


@pytest.mark.parametrize("cut", [1, 40, 69])
def test_any_cut_with_the_state_handed_on(cut, device):
    inputs = inputs_of(device, l=70, dtype=torch.float64, state=True)
    cotangents = {"means": torch.randn_like(inputs["x"]), "final_state": torch.randn_like(inputs["initial_state"])}

    def in_two(x, p, initial_state):
        left, state = ema_scan(x[:, :cut], p[:, :cut], initial_state)
        right, final = ema_scan(x[:, cut:], p[:, cut:], state)
        return torch.cat([left, right], 1), final

    expected = run_with_gradients(ema_scan, inputs, SPEC.outputs, cotangents)
    for name, value in run_with_gradients(in_two, inputs, SPEC.outputs, cotangents).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_packed_rows_equal_separate_ones(path, device):
    """The mean of a new sequence starts at zero and not at the input."""
    lengths = [5, 1, 30, 16, 1]
    inputs = inputs_of(device, b=1, l=sum(lengths), dtype=torch.float64, state=True)
    inputs["seq_idx"] = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))[None].to(device)
    cotangents = {"means": torch.randn_like(inputs["x"]), "final_state": torch.randn_like(inputs["initial_state"])}

    def separate(x, p, initial_state, seq_idx):
        outputs, state = [], initial_state
        for one, weight in zip(x.split(lengths, 1), p.split(lengths, 1)):
            means, final = ema_scan(one, weight, state, backend="reference")
            outputs.append(means)
            state = None
        return torch.cat(outputs, 1), final

    expected = run_with_gradients(separate, inputs, SPEC.outputs, cotangents)
    found = run_with_gradients(lambda **kw: ema_scan(**kw, backend=path), inputs, SPEC.outputs, cotangents)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_no_positions(path, device):
    state = torch.randn(2, 3, device=device, requires_grad=True)
    x, p = torch.zeros(2, 0, 3, device=device), torch.zeros(2, 0, device=device)
    means, final = ema_scan(x, p, state, backend=path)
    assert means.shape == (2, 0, 3)
    assert torch.equal(final, state)
    assert torch.equal(torch.autograd.grad(final.sum(), state)[0], torch.ones_like(state))


def test_causal_to_the_bit(path, device):
    inputs = inputs_of(device, l=100)
    means, _ = ema_scan(**inputs, backend=path)
    inputs["x"][:, 60:] += 1
    inputs["p"][:, 60:] = 0.3
    changed, _ = ema_scan(**inputs, backend=path)
    assert torch.equal(means[:, :60], changed[:, :60])
    assert not torch.equal(means[:, 60:], changed[:, 60:])


def test_wrong_arguments(device):
    inputs = inputs_of(device)
    with pytest.raises(ValueError, match=r"`p` has l=9, expected 10 \(from `x`\)"):
        ema_scan(inputs["x"], inputs["p"][:, :9])


def test_autocast(path, device):
    inputs = inputs_of(device)
    with torch.autocast(device.type, torch.bfloat16):
        means, final = ema_scan(**inputs, backend=path)
    expected, last = ema_scan(inputs["x"].bfloat16(), inputs["p"], backend=path)
    assert (means.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(means, expected)
    assert torch.equal(final, last)


def test_vmap_and_gradients_per_sample(backend, device):
    x, p = torch.randn(4, 1, 9, 3, device=device), torch.rand(4, 1, 9, device=device)

    def loss(x, p):
        return ema_scan(x, p, backend=backend)[0].square().sum()

    means = torch.func.vmap(lambda x, p: ema_scan(x, p, backend=backend)[0])(x, p)
    torch.testing.assert_close(means, torch.stack([ema_scan(*row)[0] for row in zip(x, p)]))
    each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(x, p)
    alone = zip(*(torch.func.grad(loss, argnums=(0, 1))(*row) for row in zip(x, p)))
    for found, expected in zip(each, alone):
        torch.testing.assert_close(found, torch.stack(expected))


def test_export_with_dynamic_length(device):
    class Smooth(torch.nn.Module):
        def forward(self, x, p):
            return ema_scan(x, p)

    length = torch.export.Dim("length", min=2, max=4096)
    example = tuple(inputs_of(device, l=6).values())
    program = torch.export.export(Smooth(), example, dynamic_shapes=({1: length}, {1: length}))
    inputs = tuple(inputs_of(device, l=23).values())
    for got, expected in zip(program.module()(*inputs), ema_scan(*inputs)):
        torch.testing.assert_close(got, expected)


def test_compile_once_for_all_lengths(backend, device):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def smooth(**kw):
        return ema_scan(**kw, backend=backend)[0]

    compiled = torch.compile(smooth, backend=counter, fullgraph=True, dynamic=True)
    for length in (5, 9, 70):
        inputs = inputs_of(device, l=length, packed=True, state=True)
        cotangents = {"means": torch.randn_like(inputs["x"])}
        expected = run_with_gradients(smooth, inputs, ("means",), cotangents)
        for name, value in run_with_gradients(compiled, inputs, ("means",), cotangents).items():
            torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")
    assert counter.frame_count == 1
