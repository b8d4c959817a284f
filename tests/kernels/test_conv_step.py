"""`conv_step` and `conv_step_`: one position at a time equals `causal_conv1d`, with pools of states."""

import pytest
import torch

from omnissm.kernels import causal_conv1d, conv_step, conv_step_


def random_inputs(device, b=2, c=3, k=4, dtype=torch.float32):
    like = {"device": device, "dtype": dtype}
    return {
        "x": torch.randn(b, c, **like),
        "state": torch.randn(b, c, k - 1, **like),
        "weight": torch.randn(c, k, **like),
        "bias": torch.randn(c, **like),
    }


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_steps_equal_the_convolution(k, activation, dtype, device):
    """Outputs, states, and gradients through all steps."""
    x = torch.randn(2, 11, 3, dtype=dtype, device=device)
    inputs = random_inputs(device, k=k)
    leaves = [x.requires_grad_(), *(inputs[name].requires_grad_() for name in ("weight", "bias"))]
    _, weight, bias = leaves
    start = inputs["state"].to(dtype).requires_grad_()
    leaves.append(start)
    whole, final = causal_conv1d(x, weight, bias, start, activation=activation, backend="reference")
    state, outputs = start, []
    for t in range(11):
        y, state = conv_step(x[:, t], state, weight, bias, activation=activation)
        outputs.append(y)
    got = torch.stack(outputs, 1)
    assert got.dtype == dtype
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got, whole, **tolerance)
    assert torch.equal(state, final)
    cotangents = torch.randn_like(got), torch.randn_like(final)

    def gradients(*outputs):
        loss = sum((value * cotangent).sum() for value, cotangent in zip(outputs, cotangents))
        return torch.autograd.grad(loss, leaves, materialize_grads=True)

    for gradient, value in zip(gradients(got, state), gradients(whole, final)):
        torch.testing.assert_close(gradient, value, **tolerance)


def test_pool_of_states(device):
    """Rows read and write their own state; padding gives 0 and leaves all states as they are."""
    inputs = random_inputs(device, b=4)
    pool = torch.randn(6, 3, 3, device=device)
    index = torch.tensor([5, -1, 0, 3], dtype=torch.int32, device=device)
    real = index >= 0
    alone, new = conv_step(**inputs | {"state": pool[index.clamp(min=0).long()]})
    expected = pool.clone()
    expected[index[real].long()] = new[real]
    y, found = conv_step(**inputs | {"state": pool}, state_index=index)
    torch.testing.assert_close(y[real], alone[real])
    assert not y[1].any()
    assert torch.equal(found, expected)
    assert torch.equal(conv_step_(**inputs | {"state": pool}, state_index=index), y)
    assert torch.equal(pool, expected)


def test_pool_with_padding_only(device):
    inputs = random_inputs(device)
    pool = torch.randn(3, 3, 3, device=device)
    kept, index = pool.clone(), torch.tensor([-1, -1], device=device)
    y, found = conv_step(**inputs | {"state": pool}, state_index=index)
    assert not y.any()
    assert torch.equal(found, kept)
    assert not conv_step_(**inputs | {"state": pool}, state_index=index).any()
    assert torch.equal(pool, kept)


def test_in_place_overwrites_the_state_and_nothing_else(device):
    inputs = random_inputs(device)
    y, state = conv_step(**inputs)
    kept = inputs["state"].clone()
    assert torch.equal(inputs["state"], kept)
    address = inputs["state"].data_ptr()
    assert torch.equal(conv_step_(**inputs), y)
    assert torch.equal(inputs["state"], state)
    assert inputs["state"].data_ptr() == address


def test_state_keeps_its_dtype(device):
    inputs = random_inputs(device)
    narrow = inputs | {"x": inputs["x"].bfloat16()}
    y, state = conv_step(**narrow)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        y, state = conv_step(**inputs)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_derivatives_by_differences(device):
    leaves = [value.requires_grad_() for value in random_inputs(device, k=3, dtype=torch.float64).values()]
    index = torch.tensor([1, -1], device=device)
    for options in ({}, {"state_index": index}):
        assert torch.autograd.gradcheck(lambda *tensors, o=options: conv_step(*tensors, **o), leaves)
        assert torch.autograd.gradgradcheck(lambda *tensors, o=options: conv_step(*tensors, **o), leaves)


def test_compiles_and_exports(device):
    inputs = random_inputs(device)
    compiled = torch.compile(conv_step, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(**inputs), conv_step(**inputs)):
        torch.testing.assert_close(got, expected)
    pool, other = inputs["state"].clone(), inputs["state"].clone()
    index = torch.tensor([1, -1], device=device)
    compiled = torch.compile(conv_step_, backend="aot_eager", fullgraph=True)
    y = compiled(**inputs | {"state": pool}, state_index=index)
    torch.testing.assert_close(y, conv_step_(**inputs | {"state": other}, state_index=index))
    torch.testing.assert_close(pool, other)


def test_vmap(device):
    inputs = random_inputs(device, b=4)
    expected = conv_step(**inputs)
    rows = torch.func.vmap(conv_step, in_dims=(0, 0, None, None))(
        inputs["x"][:, None], inputs["state"][:, None], inputs["weight"], inputs["bias"]
    )
    for got, value in zip(rows, expected):
        torch.testing.assert_close(got[:, 0], value)


def test_wrong_arguments(device):
    inputs = random_inputs(device)
    with pytest.raises(ValueError, match=r"`state` has 4 inputs, expected 3 .*drop the oldest"):
        conv_step(**inputs | {"state": torch.zeros(2, 3, 4, device=device)})
    with pytest.raises(ValueError, match=r"`weight` has c=2, expected 3 \(from `x`\)"):
        conv_step(**inputs | {"weight": torch.zeros(2, 4, device=device)})
    with pytest.raises(ValueError, match="`weight` has k=9, expected 1 to 8"):
        conv_step(**inputs | {"weight": torch.zeros(3, 9, device=device)})
    with pytest.raises(ValueError, match="activation must be 'silu' or None, got 'relu'"):
        conv_step(**inputs, activation="relu")
    with pytest.raises(ValueError, match="`state` has b=5"):
        conv_step(**inputs | {"state": torch.zeros(5, 3, 3, device=device)})
    with pytest.raises(TypeError, match="`x` must have a floating dtype"):
        conv_step(**inputs | {"x": torch.zeros(2, 3, dtype=torch.int64, device=device)})
