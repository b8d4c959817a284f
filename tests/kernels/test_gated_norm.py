"""`gated_norm`: against torch's RMS norm, groups, the two orders, torch's transforms."""

import pytest
import torch
from torch.nn import functional as F

from omnissm.kernels import BackendError, available_backends, gated_norm, rms_norm, use_backend


def random_inputs(device, *shape):
    shape = shape or (5, 12)
    x, z = torch.randn(shape, device=device), torch.randn(shape, device=device)
    return x, z, 1 + 0.1 * torch.randn(shape[-1], device=device)


def test_both_orders_equal_torch_rms_norm(backend, device):
    x, z, weight = random_inputs(device)
    first = F.rms_norm(x * F.silu(z), (12,), weight, eps=1e-5)
    torch.testing.assert_close(gated_norm(x, z, weight, backend=backend), first)
    then = F.rms_norm(x, (12,), weight, eps=1e-5) * F.silu(z)
    torch.testing.assert_close(gated_norm(x, z, weight, norm_before_gate=True, backend=backend), then)
    assert not torch.allclose(first, then, rtol=0.1)


@pytest.mark.parametrize("group_size", [1, 3, 4, 12])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_groups_are_separate_norms(group_size, norm_before_gate, backend, device):
    x, z, weight = random_inputs(device)
    options = {"norm_before_gate": norm_before_gate, "backend": backend}
    y = gated_norm(x, z, weight, group_size=group_size, **options)
    parts = zip(x.split(group_size, -1), z.split(group_size, -1), weight.split(group_size))
    torch.testing.assert_close(y, torch.cat([gated_norm(*part, **options) for part in parts], -1))


def test_output_has_unit_mean_square(backend, device):
    x, z, _ = random_inputs(device, 7, 100)
    y = gated_norm(30 * x, z, torch.ones(100, device=device), backend=backend)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(7, device=device), rtol=1e-4, atol=0)


def test_leading_dimensions(backend, device):
    x, z, weight = random_inputs(device, 2, 3, 4, 6)
    y = gated_norm(x, z, weight, backend=backend)
    torch.testing.assert_close(y, gated_norm(x.view(-1, 6), z.view(-1, 6), weight, backend=backend).view(2, 3, 4, 6))
    torch.testing.assert_close(y[1, 2, 3], gated_norm(x[1, 2, 3], z[1, 2, 3], weight, backend=backend))
    turned = gated_norm(x.transpose(0, 1), z.transpose(0, 1), weight, backend=backend)
    torch.testing.assert_close(turned, y.transpose(0, 1))


def test_zero_rows_and_large_values_stay_finite(backend, device):
    x, z, weight = random_inputs(device)
    x[0], x[1], z[2], z[3] = 0, 1e4, 100, -100
    leaves = [tensor.requires_grad_() for tensor in (x, z, weight)]
    y = gated_norm(*leaves, backend=backend)
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(y.sum(), leaves))


def test_no_rows(backend, device):
    x, z, weight = random_inputs(device, 0, 4)
    assert gated_norm(x, z, weight, backend=backend).shape == (0, 4)


def test_wrong_arguments(device):
    x, z, weight = random_inputs(device)
    with pytest.raises(ValueError, match=r"`weight` has d=11, expected 12 \(from `x`\)"):
        gated_norm(x, z, weight[:11])
    with pytest.raises(ValueError, match=r"`z` must have the shape of `x`, \(5, 12\); got \(4, 12\)"):
        gated_norm(x, z[:4], weight)
    with pytest.raises(ValueError, match="group_size must divide d=12, got 5"):
        gated_norm(x, z, weight, group_size=5)
    with pytest.raises(ValueError, match="eps must be positive, got 0"):
        gated_norm(x, z, weight, eps=0)


def test_groups_too_wide_for_triton(device):
    if available_backends(device)["triton"]:
        pytest.skip("Triton does not run here")
    x = torch.randn(1, 20000, device=device)
    assert torch.isfinite(gated_norm(x, x, x[0])).all()
    with pytest.raises(BackendError, match="a group has 20000 channels, Triton takes 16384 at most"):
        gated_norm(x, x, x[0], backend="triton")


def test_autocast_narrows_x_and_z_and_not_the_weight(backend, device):
    leaves = [tensor.requires_grad_() for tensor in random_inputs(device)]
    with torch.autocast(device.type, torch.bfloat16):
        y = gated_norm(*leaves, backend=backend)
    assert y.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in torch.autograd.grad(y.float().sum(), leaves))
    torch.testing.assert_close(y.float(), gated_norm(*leaves), rtol=5e-2, atol=5e-2)


def test_vmap_and_functional_gradients(backend, device):
    x, z, weight = random_inputs(device, 4, 6)

    def norm(x, z, weight):
        return gated_norm(x, z, weight, backend=backend)

    expected = norm(x, z, weight)
    torch.testing.assert_close(torch.func.vmap(norm, in_dims=(0, 0, None))(x, z, weight), expected)
    torch.testing.assert_close(torch.func.vmap(norm)(x, z, weight.expand(4, 6)), expected)
    gradient = torch.func.grad(lambda *leaves: norm(*leaves).square().sum(), argnums=(0, 1, 2))
    each = torch.func.vmap(gradient, in_dims=(0, 0, None))(x, z, weight)
    for k, one in enumerate(zip(*(gradient(*row, weight) for row in zip(x, z)))):
        torch.testing.assert_close(each[k], torch.stack(one), rtol=1e-4, atol=1e-5)


def test_second_derivative_in_triton_names_the_way_out(device):
    if available_backends(device)["triton"]:
        pytest.skip("Triton does not run here")
    x, z, weight = random_inputs(device)
    y = gated_norm(x.requires_grad_(), z, weight, backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(BackendError, match="gated_norm has no second derivative in Triton"):
        dx.sum().backward()


def test_opcheck(device):
    if available_backends(device)["triton"]:
        pytest.skip("Triton does not run here")
    from omnissm.kernels.gated_norm import triton_impl

    x, z, weight = random_inputs(device)
    torch.library.opcheck(triton_impl._forward, (x, z, weight, 1e-5, 4, False))
    torch.library.opcheck(triton_impl._backward, (x, z, weight, x, 1e-5, 12, True))


def test_export_with_dynamic_rows(device):
    class Norm(torch.nn.Module):
        def forward(self, x, z, weight):
            return gated_norm(x, z, weight, group_size=4)

    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(Norm(), random_inputs(device), dynamic_shapes=({0: rows}, {0: rows}, None))
    inputs = random_inputs(device, 33, 12)
    torch.testing.assert_close(program.module()(*inputs), gated_norm(*inputs, group_size=4))


def test_compiled_code_takes_the_chunked_path(device):
    """torch.compile fuses it; one graph for all numbers of rows."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gated_norm, backend=counter, fullgraph=True, dynamic=True)
    for rows in (3, 8, 20):
        inputs = [tensor.requires_grad_() for tensor in random_inputs(device, rows, 12)]
        got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
        expected = torch.autograd.grad(gated_norm(*inputs).square().sum(), inputs)
        torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1
    assert not any("ssm" in str(node.target) for graph in counter.graphs for node in graph.graph.nodes)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.float32,) * 2, (torch.bfloat16,) * 2], ids=str
)
def test_rms_norm_rounds_a_wide_stream_first(dtypes, backend, device):
    if reason := available_backends(device)[backend]:
        pytest.skip(reason)
    stream, narrow = dtypes
    x = torch.randn(3, 5, 2 * 48, device=device, dtype=stream)[..., :48]
    weight = torch.rand(48, device=device, dtype=narrow) + 0.5
    rounded = x.to(narrow).double()
    expected = rounded / (rounded.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    with torch.no_grad(), use_backend(backend):
        y = rms_norm(x, weight)
    assert y.dtype == narrow
    torch.testing.assert_close(y.double(), expected, rtol=2e-6 if narrow == torch.float32 else 1.6e-2, atol=1e-6)


def test_rms_norm_has_the_gradient_of_its_definition(device):
    x, weight = (
        torch.randn(*shape, device=device, dtype=torch.float64, requires_grad=True) for shape in [(2, 6), (6,)]
    )
    assert torch.autograd.gradcheck(lambda *inputs: rms_norm(*inputs, eps=0.1), (x, weight))
    with pytest.raises(ValueError, match="weight"):
        rms_norm(x, weight[:5])


def test_a_small_eps_is_not_rounded_to_float32(device):
    """Rows so weak that the norm is that of eps alone, in float64."""
    if reason := available_backends(device)["triton"]:
        pytest.skip(reason)
    x, z = (torch.randn(2, 8, device=device, dtype=torch.float64) for _ in range(2))
    x, weight = x * 1e-6, torch.ones(8, device=device, dtype=torch.float64)
    chunked, triton = (gated_norm(x, z, weight, eps=1e-5, backend=name) for name in ("chunked", "triton"))
    torch.testing.assert_close(triton, chunked, rtol=1e-12, atol=0)
