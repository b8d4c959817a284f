"""`quasiseparable`: against its dense matrix and two calls of `ssd`; symmetry, rank, packing, states, transforms."""

import pytest
import torch

from omnissm.kernels import BackendError, quasiseparable, ssd
from omnissm.kernels.quasiseparable.spec import SPEC, make_inputs
from omnissm.kernels.testing import check_op, relative_error, run_with_gradients

SIZE = {"b": 2, "l": 21, "h": 4, "p": 3, "n": 2, "g": 2, "chunk_size": 8}
OUTPUTS = ("y", "final")
SIDE = ("log_decay", "weight", "B", "C")


@pytest.fixture(params=["reference", "chunked", pytest.param("triton", marks=pytest.mark.gpu)])
def backend(request):
    return request.param


@pytest.fixture
def triton(device):
    """The module of the Triton path, where Triton runs."""
    from omnissm.kernels import available_backends

    if reason := available_backends(device)["triton"]:
        pytest.skip(reason)
    from omnissm.kernels.quasiseparable import triton_impl

    return triton_impl


def inputs_of(device, dtype=torch.float32, **size):
    generator = torch.Generator(device).manual_seed(0)
    return make_inputs(**{**SIZE, **size}, dtype=dtype, device=device, generator=generator)


def exchanged(inputs):
    """The mirror image: rows reversed, the two sides exchanged."""
    found = dict(inputs)
    for name, value in inputs.items():
        if name == "initial_state":
            found[name] = value.flip(0)
        elif torch.is_tensor(value):
            other = {"_f": "_b", "_b": "_f"}.get(name[-2:])
            found[name if other is None else name[:-2] + other] = value.flip(1)
    return found


def assert_equal(got, expected):
    for name, value in got.items():
        assert relative_error(value, expected[name].double()) < 2e-5, name


def dense_matrix(inputs, shift):
    """M with y = M x, (b, h, l, l), entry by entry from the definition."""
    length, heads = inputs["x"].shape[1:3]
    matrix = torch.diag_embed(inputs["diag"].mT)
    for side, step in (("f", 1), ("b", -1)):
        decay, weight = inputs[f"log_decay_{side}"], inputs[f"weight_{side}"]
        B, C = (inputs[f"{name}_{side}"].repeat_interleave(heads // 2, 2) for name in "BC")
        for s in range(length):
            total = torch.zeros_like(decay[:, 0])
            t = s  # the position whose state is read
            while 0 <= t < length:
                row = t + step if shift else t
                if 0 <= row < length:
                    matrix[:, :, row, s] += (C[:, t] * B[:, s]).sum(-1) * total.exp() * weight[:, s]
                t += step
                if 0 <= t < length:
                    total = total + decay[:, t]
    return matrix


@pytest.mark.parametrize("shift", [True, False])
def test_equals_its_dense_matrix(shift, backend, device):
    inputs = inputs_of(device, torch.float64, state=False, shift=shift)
    matrix = dense_matrix(inputs, shift)
    y, _ = quasiseparable(**inputs, backend=backend)
    torch.testing.assert_close(y, torch.einsum("bhts,bshp->bthp", matrix, inputs["x"]))


def test_blocks_off_the_diagonal_have_the_rank_of_the_state(backend, device):
    """Read from the op itself: the Jacobian's blocks below and above the diagonal have rank n."""
    inputs = inputs_of(device, torch.float64, b=1, h=1, g=1, p=1, n=3, state=False)
    x = inputs.pop("x")

    def op(row):
        return quasiseparable(row[None, :, None, None], **inputs, backend=backend)[0].flatten()

    matrix = torch.autograd.functional.jacobian(op, x.flatten())
    for cut in (5, 10, 16):
        assert torch.linalg.matrix_rank(matrix[cut:, :cut], rtol=1e-10) == 3
        assert torch.linalg.matrix_rank(matrix[:cut, cut:], rtol=1e-10) == 3
    assert torch.linalg.matrix_rank(matrix, rtol=1e-10) == 21
    torch.testing.assert_close(matrix.diagonal(), inputs["diag"].flatten())


def test_equals_two_scans_and_a_diagonal(backend, device):
    inputs = inputs_of(device, shift=False)
    x, states = inputs["x"], inputs["initial_state"]
    forward = [inputs[f"{name}_f"] for name in ("log_decay", "B", "C")]
    backward = [inputs[f"{name}_b"].flip(1) for name in ("log_decay", "B", "C")]
    y_f, left = ssd(x, *forward, states[0], weight=inputs["weight_f"], D=inputs["diag"], backend="chunked")
    y_b, right = ssd(x.flip(1), *backward, states[1], weight=inputs["weight_b"].flip(1), backend="chunked")
    y, final = quasiseparable(**inputs, backend=backend)
    assert relative_error(y, (y_f + y_b.flip(1)).double()) < 1e-5
    assert relative_error(final, torch.stack([left, right]).double()) < 1e-5


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_mirror_image(shift, packed, backend, device):
    """Rows reversed and sides exchanged reverse the output and exchange the states."""
    inputs = inputs_of(device, shift=shift, packed=packed)
    mirrored = exchanged(inputs)
    if packed:
        mirrored["seq_idx"] = 100 - mirrored["seq_idx"]
    y, final = quasiseparable(**inputs, backend=backend)
    back, swapped = quasiseparable(**mirrored, backend=backend)
    torch.testing.assert_close(back, y.flip(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(swapped, final.flip(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [True, False])
def test_packed_equals_separate(shift, backend, device):
    lengths = [1, 7, 2, 10, 1]
    inputs = inputs_of(device, b=1, state=False, shift=shift)
    seq_idx = torch.repeat_interleave(torch.arange(5, device=device), torch.tensor(lengths, device=device))[None]
    cotangents = {"y": torch.randn_like(inputs["x"]), "final": torch.randn(2, 1, 4, 3, 2, device=device)}

    def packed(**arguments):
        return quasiseparable(**arguments, seq_idx=seq_idx, backend=backend)

    def separate(**arguments):
        parts, start = [], 0
        for length in lengths:
            part = {k: v[:, start : start + length] if torch.is_tensor(v) else v for k, v in arguments.items()}
            parts.append(quasiseparable(**part, backend="reference"))
            start += length
        return torch.cat([y for y, _ in parts], 1), torch.stack([parts[-1][1][0], parts[0][1][1]])

    expected = run_with_gradients(separate, inputs, OUTPUTS, cotangents)
    assert_equal(run_with_gradients(packed, inputs, OUTPUTS, cotangents), expected)


def test_states_enter_the_outer_sequences_only(backend, device):
    inputs = inputs_of(device, b=1)
    seq_idx = torch.tensor([0] * 6 + [1] * 8 + [2] * 7, device=device)[None]
    y, _ = quasiseparable(**inputs, seq_idx=seq_idx, backend=backend)
    without, _ = quasiseparable(**inputs | {"initial_state": None}, seq_idx=seq_idx, backend=backend)
    assert torch.equal(y[:, 6:14], without[:, 6:14])
    assert (y - without)[:, 1:6].abs().amin(1).gt(0).all()
    assert (y - without)[:, 14:20].abs().amin(1).gt(0).all()


@pytest.mark.parametrize("cut", [1, 8, 13, 20])
def test_any_cut_with_states_handed_over_both_ways(cut, backend, device):
    """Forward states go right, backward states go left: two parts are the whole, gradients included."""
    inputs = inputs_of(device, shift=False)
    cotangents = {"y": torch.randn_like(inputs["x"]), "final": torch.randn(2, 2, 4, 3, 2, device=device)}

    def whole(**arguments):
        return quasiseparable(**arguments, backend=backend)

    def in_two(initial_state, **rest):
        left = {k: v[:, :cut] if torch.is_tensor(v) else v for k, v in rest.items()}
        right = {k: v[:, cut:] if torch.is_tensor(v) else v for k, v in rest.items()}
        forward = quasiseparable(**left, initial_state=initial_state, backend=backend)[1][0]
        right_y, right_final = quasiseparable(
            **right, initial_state=torch.stack([forward, initial_state[1]]), backend=backend
        )
        left_y, left_final = quasiseparable(
            **left, initial_state=torch.stack([initial_state[0], right_final[1]]), backend=backend
        )
        return torch.cat([left_y, right_y], 1), torch.stack([right_final[0], left_final[1]])

    expected = run_with_gradients(whole, inputs, OUTPUTS, cotangents)
    assert_equal(run_with_gradients(in_two, inputs, OUTPUTS, cotangents), expected)


@pytest.mark.parametrize("regime", ["initial", "strong", "weak"])
def test_float32_digits(regime, device):
    """1e-5 in every output and gradient, also where steps of almost no and almost full decay alternate."""
    size = {"b": 1, "l": 300, "h": 2, "p": 16, "n": 16, "regime": regime, "state": regime == "weak"}
    errors = check_op(SPEC, size, "chunked", torch.float32, device)
    assert max(errors.values()) < 5e-6, errors


def test_sixteen_bit_digits(device):
    """The output is rounded once, although two recurrences add up to it."""
    size = {"b": 1, "l": 200, "h": 2, "p": 16, "n": 32}
    errors = check_op(SPEC, size, "chunked", torch.bfloat16, device)
    assert errors["y"] < 2.3e-3
    assert max(errors[f"d{name}"] for name in ("x", "B_f", "C_f", "B_b", "C_b")) < 3e-3
    assert max(errors[f"d{name}"] for name in ("log_decay_f", "weight_b", "diag")) < 1e-5


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 17])
def test_chunks_change_nothing(length, device):
    expected = quasiseparable(**inputs_of(device, l=length), backend="reference")
    for chunk_size in (1, 2, 8, 64):
        got = quasiseparable(**inputs_of(device, l=length, chunk_size=chunk_size), backend="chunked")
        for value, one in zip(got, expected):
            torch.testing.assert_close(value, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129, 197, 300, 1000])
def test_lengths(length, device):
    check_op(SPEC, {"b": 1, "l": length, "h": 2, "p": 3, "n": 2}, "chunked", torch.float32, device)


@pytest.mark.parametrize("sizes", [(96, 3, 1, 1), (1, 64, 3, 3), (8, 128, 12, 1), (48, 16, 12, 4)], ids=str)
def test_widths(sizes, device):
    p, n, h, g = sizes
    check_op(SPEC, {"b": 1, "l": 20, "h": h, "p": p, "n": n, "g": g}, "chunked", torch.float32, device)


def test_extremes_stay_finite(backend, device):
    """Decay to exactly zero, weights of 1e-7, inputs of 1e4, maps of zeros."""
    inputs = inputs_of(device, l=70)
    for side in "fb":
        inputs[f"log_decay_{side}"][:, ::3] = -1e4
        inputs[f"weight_{side}"] = torch.full_like(inputs[f"weight_{side}"], 1e-7)
        inputs[f"B_{side}"][:, 20:40] = 0
    inputs["x"] = inputs["x"] * 1e4
    cotangents = {"y": torch.ones_like(inputs["x"])}
    found = run_with_gradients(lambda **kw: quasiseparable(**kw, backend=backend), inputs, OUTPUTS, cotangents)
    for name, value in found.items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("shift", [True, False])
def test_every_position_sees_every_other(shift, backend, device):
    inputs = inputs_of(device, b=1, l=12, shift=shift)
    x = inputs["x"].requires_grad_()
    y, _ = quasiseparable(**inputs, backend=backend)
    for t in (0, 5, 11):
        (dx,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert dx.ne(0).all()


def test_one_weight_may_be_left_out(backend, device):
    inputs = inputs_of(device)
    ones = torch.ones_like(inputs["weight_b"])
    expected = quasiseparable(**inputs | {"weight_b": ones}, backend=backend)
    for got, value in zip(quasiseparable(**inputs | {"weight_b": None}, backend=backend), expected):
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-5)


def test_no_positions(backend, device):
    inputs = inputs_of(device, l=0)
    y, final = quasiseparable(**inputs, backend=backend)
    assert y.shape == (2, 0, 4, 3)
    assert torch.equal(final, inputs["initial_state"])


def test_wrong_arguments(device):
    inputs = inputs_of(device)
    with pytest.raises(ValueError, match=r"`C_b` has n=1, expected 2 \(from `B_f`\)"):
        quasiseparable(**inputs | {"C_b": inputs["C_b"][..., :1]})
    with pytest.raises(ValueError, match=r"`initial_state` has 2=1, expected 2"):
        quasiseparable(**inputs | {"initial_state": inputs["initial_state"][:1]})
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        quasiseparable(**inputs | {"chunk_size": 0})
    with pytest.raises(BackendError, match="Triton takes n up to 256, got n=257"):
        quasiseparable(**inputs_of(device, n=257), backend="triton")
    thrice = {name: inputs[name].repeat(1, 1, 2, 1)[:, :, :3] for name in ("B_f", "C_f", "B_b", "C_b")}
    with pytest.raises(ValueError, match="has g=3 groups, expected a divisor of the 4 heads"):
        quasiseparable(**inputs | thrice)


def test_autocast_narrows_inputs_and_not_decays(backend, device):
    inputs = inputs_of(device)
    with torch.autocast(device.type, torch.bfloat16):
        y, final = quasiseparable(**inputs, backend=backend)
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    narrow = {name: inputs[name].bfloat16() for name in ("x", "B_f", "C_f", "B_b", "C_b")}
    expected, state = quasiseparable(**inputs | narrow, backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(final, state, rtol=1e-4, atol=1e-4)


def test_vmap_and_functional_gradients(device):
    inputs = inputs_of(device, b=3, state=False)
    tensors = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
    options = {name: value for name, value in inputs.items() if not torch.is_tensor(value)}

    def loss(tensors):
        return quasiseparable(**tensors, **options)[0].square().sum()

    rows = {name: value[:, None] for name, value in tensors.items()}
    each = torch.func.vmap(torch.func.grad(loss))(rows)
    expected = torch.func.grad(loss)(tensors)
    assert_equal({name: value[:, 0] for name, value in each.items()}, expected)


def test_export_with_dynamic_length(device):
    class Mix(torch.nn.Module):
        def forward(self, x, decay, weight, B, C):
            return quasiseparable(x, decay, weight, B, C, decay, weight, C, B, weight)

    def arguments(**size):
        inputs = inputs_of(device, **size)
        return tuple(inputs[name] for name in ("x", "log_decay_f", "weight_f", "B_f", "C_f"))

    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(Mix(), arguments(l=9), dynamic_shapes=({1: length},) * 5)
    for l in (2, 70, 133):  # noqa: E741
        for got, expected in zip(program.module()(*arguments(l=l)), Mix()(*arguments(l=l))):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_compile_once_for_all_lengths(packed, device):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(quasiseparable, backend=counter, fullgraph=True, dynamic=True)
    for length in (20, 41, 90):
        inputs = inputs_of(device, l=length, packed=packed)
        floating = [value for value in inputs.values() if torch.is_tensor(value) and value.is_floating_point()]
        leaves = [value.requires_grad_() for value in floating]
        got = torch.autograd.grad(compiled(**inputs)[0].square().sum(), leaves)
        expected = torch.autograd.grad(quasiseparable(**inputs)[0].square().sum(), leaves)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


NAMES = ("x", *(f"{name}_f" for name in SIDE), *(f"{name}_b" for name in SIDE), "diag", "initial_state", "seq_idx")


@pytest.mark.parametrize("shift", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_triton_chunks_parts_and_blocks_change_nothing(shift, triton, device):
    """Outputs and gradients for other chunks, cuts of the row and blocks of heads, packed."""
    inputs = inputs_of(device, b=1, l=50, h=2, g=1, packed=True)
    arguments = [inputs[name] for name in NAMES]
    dy, dfinal = torch.randn_like(inputs["x"]), torch.randn_like(inputs["initial_state"])
    found = [
        (*triton._forward(*arguments, shift, chunk, parts),
         *triton._backward(*arguments, dy, dfinal, shift, chunk, parts, blocks))
        for chunk, parts, blocks in ((0, 1, 1), (16, 2, 2), (32, 1, 1))
    ]  # fmt: skip
    for other in found[1:]:
        for value, expected in zip(other, found[0], strict=True):
            assert relative_error(value, expected.double()) < 2e-5


def test_triton_second_derivative_names_the_way_out(triton, device):
    inputs = inputs_of(device, b=1, l=5, h=1, g=1)
    x = inputs["x"].requires_grad_()
    (dx,) = torch.autograd.grad(quasiseparable(**inputs, backend="triton")[0].square().sum(), x, create_graph=True)
    with pytest.raises(BackendError, match="quasiseparable has no second derivative in Triton"):
        dx.sum().backward()


def test_triton_under_vmap(triton, device):
    inputs = inputs_of(device, b=2, l=7, h=1, g=1)
    tensors = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
    rows = {k: v[:, :, None].movedim(1, 0) if k == "initial_state" else v[:, None] for k, v in tensors.items()}

    def loss(tensors):
        return quasiseparable(**tensors, backend="triton")[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss))(rows)
    expected = torch.func.grad(loss)(tensors)
    for name, value in each.items():
        got = value[:, :, 0].movedim(0, 1) if name == "initial_state" else value[:, 0]
        torch.testing.assert_close(got, expected[name], rtol=1e-4, atol=1e-5)


def test_triton_opcheck(triton, device):
    inputs = inputs_of(device, b=1, l=5, h=1, g=1)
    arguments = [inputs.get(name) for name in NAMES]
    dy, dfinal = torch.randn_like(inputs["x"]), torch.randn_like(inputs["initial_state"])
    torch.library.opcheck(triton._forward, (*arguments, True, 0, 0))
    torch.library.opcheck(triton._backward, (*arguments, dy, dfinal, True, 0, 0, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [(64, 64), (64, 128), (16, 16), (48, 100), (128, 128), (128, 256), (192, 64)], ids=str)
def test_every_tile_table_with_every_gradient(size, dtype, triton, device):
    p, n = size
    for length, shift in ((197, True), (600, False)):
        case = {"b": 2, "l": length, "h": 4, "p": p, "n": n, "g": 2, "shift": shift}
        check_op(SPEC, case, "triton", dtype, device)


@pytest.mark.parametrize("length", [1, 2, 21])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_chunks_give_the_same_with_and_without_a_gradient(device, length, dtype):
    inputs = inputs_of(device, dtype, l=length)
    with torch.no_grad():
        plain = quasiseparable(**inputs, backend="chunked")
    recorded = quasiseparable(**{**inputs, "x": inputs["x"].requires_grad_()}, backend="chunked")
    assert not plain[0].requires_grad
    assert recorded[0].requires_grad
    for one, other in zip(plain, recorded, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-12 if dtype == torch.float64 else 1e-2, atol=1e-12)
