"""`rounded_layer_norm`: torch's own norm, rounded by one kernel where a product would round it next."""

import pytest
import torch
import torch.nn.functional as F

from omnissm.kernels import add_rounded_layer_norm, available_backends, rounded_layer_norm, use_backend


@pytest.fixture
def triton(device):
    if reason := available_backends(device)["triton"]:
        pytest.skip(reason)


def draw(device, *shape):
    generator = torch.Generator(device).manual_seed(0)
    x = 3 * torch.randn(*shape, generator=generator, device=device) + 5
    weight, bias = torch.randn(2, shape[-1], generator=generator, device=device)
    return x, weight, bias


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 33), (4, 384)])
def test_rounded(device, triton, shape):
    x, weight, bias = draw(device, *shape)
    expected = F.layer_norm(x, shape[-1:], weight, bias, 1e-6)
    with torch.no_grad(), torch.autocast(device.type, torch.float16), use_backend("triton"):
        got = rounded_layer_norm(x, weight, bias, 1e-6)
        rows = rounded_layer_norm(x.mT.contiguous().mT, weight, bias, 1e-6) if len(shape) > 1 else got
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), expected, rtol=1e-3, atol=2e-3)
    assert torch.equal(got, rows)


@pytest.mark.parametrize("case", ["gradient", "no autocast", "double"])
def test_what_torch_does(device, triton, case):
    x, weight, bias = (one.double() if case == "double" else one for one in draw(device, 4, 6))
    x.requires_grad_(case == "gradient")
    enabled = case != "no autocast"
    with torch.set_grad_enabled(case == "gradient"), torch.autocast(device.type, torch.bfloat16, enabled=enabled):
        with use_backend("triton"):
            got = rounded_layer_norm(x, weight, bias, 1e-6)
        expected = F.layer_norm(x, (6,), weight, bias, 1e-6)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    assert got.requires_grad == (case == "gradient")


def test_tensors_without_data_have_no_autocast():
    x, weight = torch.zeros(2, 3, 6, device="meta"), torch.zeros(6, device="meta")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = rounded_layer_norm(x, weight, weight, 1e-6)
        total, normed = add_rounded_layer_norm(x, x, weight, weight, 1e-6)
    assert y.shape == total.shape == normed.shape == x.shape
    assert y.device.type == "meta"


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 33)])
def test_sum_and_norm(device, triton, shape):
    x, weight, bias = draw(device, *shape)
    added = draw(device, *shape)[0].flip(0).half()
    with torch.no_grad(), torch.autocast(device.type, torch.float16), use_backend("triton"):
        total, normed = add_rounded_layer_norm(x, added, weight, bias, 1e-6)
        assert torch.equal(normed, rounded_layer_norm(x + added, weight, bias, 1e-6))
    assert torch.equal(total, x + added)
    expected = x + added, F.layer_norm(x + added, shape[-1:], weight, bias, 1e-6)
    for one, other in zip(add_rounded_layer_norm(x, added, weight, bias, 1e-6), expected, strict=True):
        assert torch.equal(one, other)
