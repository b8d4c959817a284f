"""`ssd` and `ssd_step`: facts of the recurrence, chunks, packing, numerics, torch's transforms."""

import pytest
import torch

from omnissm.kernels import BackendError, linear_scan, ssd, ssd_step, ssd_step_
from omnissm.kernels.ssd.spec import SPEC, make_inputs
from omnissm.kernels.testing import check_op, relative_error, run_with_gradients

PATHS = pytest.mark.parametrize("path", ["reference", "chunked"])


def inputs_of(device, b=2, l=10, h=2, p=3, n=4, g=1, dtype=torch.float32, seed=0, **options):  # noqa: E741
    generator = torch.Generator(device).manual_seed(seed)
    return make_inputs(b, l, h, p, n, g, dtype=dtype, device=device, generator=generator, **options)


def part_of(inputs, start, stop):
    """The positions start .. stop of every tensor that has positions."""
    along = ("x", "log_decay", "B", "C", "weight", "seq_idx")
    return {name: value[:, start:stop] if name in along else value for name, value in inputs.items()}


@PATHS
def test_sum_without_decay(path, device):
    """No decay, B = C = 1: y is the running sum of x."""
    x, one = torch.randn(1, 90, 2, 3, device=device), torch.ones(1, 90, 1, 1, device=device)
    y, final = ssd(x, torch.zeros(1, 90, 2, device=device), one, one, chunk_size=16, backend=path)
    torch.testing.assert_close(y, x.cumsum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final[..., 0], x.sum(1), rtol=1e-5, atol=1e-5)


def test_equals_its_matrix(device):
    """y = M x with M[t,s] = (C_t . B_s) exp(sum of log_decay over s+1 .. t), one matrix per head."""
    inputs = inputs_of(device, l=21, h=4, g=2, dtype=torch.float64, weight=False, D=None, state=False)
    sums = inputs["log_decay"].cumsum(1)
    decays = (sums[:, :, None] - sums[:, None]).exp()
    scores = torch.einsum("btgn,bsgn->btsg", inputs["C"], inputs["B"]).repeat_interleave(2, dim=3)
    matrix = scores * decays * torch.ones(21, 21, device=device).tril()[:, :, None]
    expected = torch.einsum("btsh,bshp->bthp", matrix, inputs["x"])
    torch.testing.assert_close(ssd(**inputs, chunk_size=8)[0], expected)


@PATHS
def test_with_one_state_entry_is_the_linear_scan(path, device):
    inputs = inputs_of(device, l=70, h=3, p=1, n=1, g=3, weight=False, D=None)
    inputs["B"], inputs["C"] = torch.ones_like(inputs["B"]), torch.ones_like(inputs["C"])
    y, final = ssd(**inputs, backend=path)
    states, last = linear_scan(inputs["log_decay"].exp(), inputs["x"][..., 0], inputs["initial_state"][..., 0, 0])
    torch.testing.assert_close(y[..., 0], states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final[..., 0, 0], last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 63, 64, 65, 127, 128, 129, 197, 300, 1000])
def test_lengths(length, device):
    check_op(SPEC, {"b": 1, "l": length, "h": 2, "p": 3, "n": 2}, "chunked", torch.float32, device)


@pytest.mark.parametrize("sizes", [(96, 3, 1, 1), (1, 64, 3, 3), (8, 128, 12, 1), (48, 16, 12, 4)], ids=str)
def test_widths(sizes, device):
    p, n, h, g = sizes
    check_op(SPEC, {"b": 1, "l": 20, "h": h, "p": p, "n": n, "g": g, "chunk_size": 8}, "chunked", torch.float32, device)


@pytest.mark.parametrize("numbers", [1, 2**10, 2**14])
@pytest.mark.parametrize("chunk_size", [1, 16, 32, 64, 128, 1000])
def test_chunks_and_blocks_are_a_matter_of_speed_only(chunk_size, numbers, device, monkeypatch):
    from omnissm.kernels.ssd import chunked

    inputs = inputs_of(device, b=1, l=150, dtype=torch.float64, packed=True)
    cotangents = {"y": torch.randn_like(inputs["x"]), "final_state": torch.randn_like(inputs["initial_state"])}
    expected = run_with_gradients(lambda **kw: ssd(**kw, backend="chunked"), inputs, SPEC.outputs, cotangents)
    monkeypatch.setattr(chunked, "_BLOCK_NUMBERS", {})
    monkeypatch.setattr(chunked, "_BLOCK_NUMBERS_ELSEWHERE", numbers)
    found = run_with_gradients(lambda **kw: ssd(**kw, chunk_size=chunk_size), inputs, SPEC.outputs, cotangents)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("cut", [1, 64, 70])
@pytest.mark.parametrize("packed", [False, True])
def test_any_cut_with_the_state_handed_on(cut, packed, device):
    """Outputs, final state and all gradients of two calls equal those of one."""
    inputs = inputs_of(device, l=100, dtype=torch.float64, packed=packed)
    if packed:
        inputs["seq_idx"][:, cut - 1 : cut + 1] = inputs["seq_idx"][:, cut, None]  # a cut inside of a sequence
    cotangents = {"y": torch.randn_like(inputs["x"]), "final_state": torch.randn_like(inputs["initial_state"])}

    def in_two(**arguments):
        left, state = ssd(**part_of(arguments, 0, cut))
        right, final = ssd(**part_of(arguments, cut, None) | {"initial_state": state})
        return torch.cat([left, right], 1), final

    expected = run_with_gradients(ssd, inputs, SPEC.outputs, cotangents)
    for name, value in run_with_gradients(in_two, inputs, SPEC.outputs, cotangents).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@PATHS
def test_packed_rows_equal_separate_ones(path, device):
    """Segments of 1 position, across chunk borders and of a whole chunk; the state enters the first one only."""
    lengths = [5, 1, 30, 16, 1, 12]
    inputs = inputs_of(device, b=1, l=sum(lengths), dtype=torch.float64)
    inputs["seq_idx"] = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths))[None].to(device)
    cotangents = {"y": torch.randn_like(inputs["x"]), "final_state": torch.randn_like(inputs["initial_state"])}

    def packed(**arguments):
        return ssd(**arguments, chunk_size=16, backend=path)

    def separate(**arguments):
        outputs, start, state = [], 0, arguments.pop("initial_state")
        arguments.pop("seq_idx")
        for length in lengths:
            y, final = ssd(**part_of(arguments, start, start + length), initial_state=state, backend="reference")
            outputs.append(y)
            start, state = start + length, None
        return torch.cat(outputs, 1), final

    expected = run_with_gradients(separate, inputs, SPEC.outputs, cotangents)
    for name, value in run_with_gradients(packed, inputs, SPEC.outputs, cotangents).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("regime", ["initial", "strong", "weak"])
def test_float32_digits(regime, device):
    """1e-5 in every output and gradient, also where steps of almost no and almost full decay alternate."""
    size = {"b": 1, "l": 500, "h": 2, "p": 16, "n": 32, "regime": regime, "state": regime == "weak"}
    errors = check_op(SPEC, size, "chunked", torch.float32, device, chunk_size=128)
    assert max(errors.values()) < 3e-6, errors


def test_sixteen_bit_digits(device):
    """Nothing but the rounding of inputs and results: y within 2.3e-3, gradients within 3e-3, sums exact."""
    size = {"b": 1, "l": 200, "h": 2, "p": 16, "n": 32}
    errors = check_op(SPEC, size, "chunked", torch.bfloat16, device)
    assert errors["y"] < 2.3e-3
    assert max(errors[name] for name in ("dx", "dB", "dC")) < 3e-3
    assert max(errors[name] for name in ("dlog_decay", "dweight", "dD", "final_state")) < 1e-5


@PATHS
def test_extremes_stay_finite(path, device):
    """Decay to exactly zero, steps of 1e-7, inputs of 1e4, B of zeros."""
    inputs = inputs_of(device, l=70)
    inputs["log_decay"][:, ::3] = -1e4
    inputs["weight"] = torch.full_like(inputs["weight"], 1e-7)
    inputs["x"] = inputs["x"] * 1e4
    inputs["B"][:, 20:40] = 0
    cotangents = {"y": torch.ones_like(inputs["x"])}
    for value in run_with_gradients(lambda **kw: ssd(**kw, backend=path), inputs, SPEC.outputs, cotangents).values():
        assert torch.isfinite(value).all()


@PATHS
def test_no_positions(path, device):
    inputs = part_of(inputs_of(device), 0, 0)
    state = inputs["initial_state"].requires_grad_()
    y, final = ssd(**inputs, backend=path)
    assert y.shape == (2, 0, 2, 3)
    assert torch.equal(final, state)
    assert torch.equal(torch.autograd.grad(final.sum(), state)[0], torch.ones_like(state))
    assert not ssd(**inputs | {"initial_state": None}, backend=path)[1].any()


@PATHS
def test_causal_to_the_bit(path, device):
    inputs = inputs_of(device, l=100)
    y, _ = ssd(**inputs, chunk_size=32, backend=path)
    for name in ("x", "B", "C", "weight"):
        inputs[name] = inputs[name].clone()
        inputs[name][:, 60:] += 1
    changed, _ = ssd(**inputs, chunk_size=32, backend=path)
    assert torch.equal(y[:, :60], changed[:, :60])
    assert not torch.equal(y[:, 60:], changed[:, 60:])


def test_wrong_arguments(device):
    inputs = inputs_of(device, h=3, g=3)
    with pytest.raises(ValueError, match="`B` has g=2 groups, expected a divisor of the 3 heads"):
        ssd(**inputs | {"B": inputs["B"][:, :, :2], "C": inputs["C"][:, :, :2]})
    with pytest.raises(ValueError, match=r"`log_decay` has l=9, expected 10 \(from `x`\)"):
        ssd(**inputs | {"log_decay": inputs["log_decay"][:, :9]})
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        ssd(**inputs, chunk_size=0)
    with pytest.raises(BackendError, match="Triton takes n up to 256, got n=257"):
        ssd(**inputs_of(device, n=257), backend="triton")
    with pytest.raises(BackendError, match="Triton takes p up to 128, or with a divisor from 16 to 64, got p=131"):
        ssd(**inputs_of(device, p=131), backend="triton")


@pytest.mark.parametrize("projected", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_second_derivative_over_chunks(projected, device):
    """By finite differences at 5 positions in chunks of 2, packed, with two groups; along directions or one by one."""
    inputs = inputs_of(device, b=1, l=5, h=2, p=2, n=2, g=2, dtype=torch.float64, packed=True, D="position")
    names = [name for name in inputs if name != "seq_idx"]

    def op(*tensors):
        return ssd(**dict(zip(names, tensors)), seq_idx=inputs["seq_idx"], chunk_size=2, backend="chunked")

    leaves = tuple(inputs[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves, fast_mode=projected)


@PATHS
def test_autocast(path, device):
    """x, B and C are cast; everything else stays float32, in the gradient too."""
    inputs = inputs_of(device, l=30)
    cotangents = {"y": torch.randn_like(inputs["x"])}
    cast = inputs | {name: inputs[name].bfloat16() for name in ("x", "B", "C")}
    expected = run_with_gradients(lambda **kw: ssd(**kw, backend=path), cast, SPEC.outputs, cotangents)
    with torch.autocast(device.type, torch.bfloat16):
        found = run_with_gradients(lambda **kw: ssd(**kw, backend=path), inputs, SPEC.outputs, cotangents)
    assert (found["y"].dtype, found["final_state"].dtype) == (torch.bfloat16, torch.float32)
    for name, value in found.items():
        assert torch.equal(value, expected[name].to(value.dtype)), name


def test_vmap_and_gradients_per_sample(device):
    rows = [inputs_of(device, b=1, l=9, seed=seed, D="position") for seed in range(3)]
    names = list(rows[0])
    stacked = [torch.stack([row[name] for row in rows]) for name in names]

    def op(*tensors):
        return ssd(**dict(zip(names, tensors)), chunk_size=4, backend="chunked")

    def loss(*tensors):
        return op(*tensors)[0].square().sum()

    each = torch.func.vmap(op)(*stacked)
    for found, expected in zip(each, zip(*(op(*row.values()) for row in rows))):
        torch.testing.assert_close(found, torch.stack(expected))
    every = tuple(range(len(names)))
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=every))(*stacked)
    alone = zip(*(torch.func.grad(loss, argnums=every)(*row.values()) for row in rows))
    for found, expected in zip(per_sample, alone):
        torch.testing.assert_close(found, torch.stack(expected))
    bare = [row["x"] for row in rows]
    shared = torch.func.vmap(lambda x: ssd(x, *(rows[0][name] for name in ("log_decay", "B", "C")))[0])
    expected = [ssd(x, *(rows[0][name] for name in ("log_decay", "B", "C")))[0] for x in bare]
    torch.testing.assert_close(shared(torch.stack(bare)), torch.stack(expected))


def test_opcheck(device):
    """Schema, fake tensors and dynamic shapes of the custom ops."""
    from omnissm.kernels.ssd.chunked import _backward, _forward

    inputs = inputs_of(device, l=5, g=2)
    arguments = [inputs[name] for name in ("x", "log_decay", "B", "C", "initial_state")]
    for optional in ((None, None), (inputs["weight"], inputs["weight"])):
        torch.library.opcheck(_forward, (*arguments, *optional, None, 2))
        gradients = (torch.randn_like(inputs["x"]), torch.randn_like(inputs["initial_state"]))
        torch.library.opcheck(_backward, (*arguments, *optional, None, 2, *gradients))


def test_export_with_dynamic_length(device):
    class Scan(torch.nn.Module):
        def forward(self, x, log_decay, B, C):
            return ssd(x, log_decay, B, C)

    def positional(length):
        inputs = inputs_of(device, l=length)
        return tuple(inputs[name] for name in ("x", "log_decay", "B", "C"))

    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(Scan(), positional(6), dynamic_shapes=({1: length},) * 4)
    for count in (2, 23, 130):
        for got, expected in zip(program.module()(*positional(count)), ssd(*positional(count))):
            torch.testing.assert_close(got, expected)


def test_compile_once_for_all_lengths(device):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda **kw: ssd(**kw)[0], backend=counter, fullgraph=True, dynamic=True)
    for length in (5, 9, 70):
        inputs = inputs_of(device, l=length, packed=True)
        cotangents = {"y": torch.randn_like(inputs["x"])}
        expected = run_with_gradients(lambda **kw: ssd(**kw)[0], inputs, ("y",), cotangents)
        for name, value in run_with_gradients(compiled, inputs, ("y",), cotangents).items():
            torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")
    assert counter.frame_count == 1


def test_memory_of_forward_and_backward(device, monkeypatch):
    """No temporary is larger than inputs or block: the (q, q) matrices of all chunks never exist together."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            for value in found if isinstance(found, tuple | list) else (found,):
                if isinstance(value, torch.Tensor) and not value._is_view():
                    self.numbers = max(self.numbers, value.untyped_storage().nbytes() // 4)
            return found

    from omnissm.kernels.ssd import chunked
    from omnissm.kernels.ssd.chunked import _gradients, _outputs

    monkeypatch.setattr(chunked, "_BLOCK_NUMBERS_ELSEWHERE", 2**18)  # as on a CPU: larger devices take larger blocks
    inputs = inputs_of(device, b=1, l=4096, h=4, p=16, n=16, weight=False, D=None)
    arguments = [inputs[name] for name in ("x", "log_decay", "B", "C", "initial_state")] + [None, None, None, 64]
    with Largest() as largest, torch.no_grad():
        y, final = _outputs(*arguments)
        _gradients(*arguments, y, final)
    assert largest.numbers <= max(inputs["x"].numel(), 2**18)  # all chunks together: 2^20


@pytest.fixture
def triton(device):
    """The module of the Triton path, where Triton runs."""
    from omnissm.kernels import available_backends

    if reason := available_backends(device)["triton"]:
        pytest.skip(reason)
    from omnissm.kernels.ssd import triton_impl

    return triton_impl


NAMES = ("x", "log_decay", "B", "C", "initial_state", "weight", "D", "seq_idx")


@pytest.mark.parametrize("regime", [pytest.param("initial", marks=pytest.mark.slow), "strong"])
def test_triton_chunks_parts_and_blocks_change_nothing(regime, triton, device, monkeypatch):
    """Outputs and gradients for other chunks, cuts of the row, blocks of heads, groups of rows and columns, packed.

    Also where the gradient of a row is made in stretches, of one part and of two.
    """
    from omnissm.kernels.ssd import triton_gradients

    inputs = inputs_of(device, l=50, n=32, g=1, packed=True, D="position", regime=regime)
    arguments = [inputs[name] for name in NAMES]
    dy, dfinal = torch.randn_like(inputs["x"]), torch.randn_like(inputs["initial_state"])

    def run(chunk, parts, blocks):
        backward = triton._backward(*arguments, dy, dfinal, chunk, parts, blocks)
        return *triton._forward(*arguments, chunk, parts), *backward

    expected = run(0, 1, 1)
    found = [run(16, 2, 2), run(32, 1, 1)]
    monkeypatch.setattr(triton_gradients, "_BORDER_NUMBERS", 1)
    monkeypatch.setattr(triton_gradients, "_STRETCH_NUMBERS", 1)
    monkeypatch.setattr(triton_gradients, "map_columns", lambda x, n: 16)
    found += [run(32, 2, 1), run(16, 1, 1), run(16, 2, 2)]
    for other in found:
        for value, one in zip(other, expected, strict=True):
            torch.testing.assert_close(value, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_triton_outputs_with_states_in_halves(packed, triton, device):
    """The kernel for large float32 states: chunks, parts, a state that enters, sequences."""
    inputs = inputs_of(device, b=1, l=40, h=2, p=64, n=128, packed=packed)
    expected = ssd(**inputs, backend="chunked")
    inputs["D"] = inputs["D"].expand(1, 40, 2)
    arguments = [inputs.get(name) for name in NAMES]
    for chunk, parts in ((0, 1), (16, 1), (16, 2)):
        for found, value in zip(triton._forward(*arguments, chunk, parts), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)


def test_triton_second_derivative_names_the_way_out(triton, device):
    inputs = inputs_of(device, b=1, l=5, h=1)
    x = inputs["x"].requires_grad_()
    (dx,) = torch.autograd.grad(ssd(**inputs, backend="triton")[0].square().sum(), x, create_graph=True)
    with pytest.raises(BackendError, match="ssd has no second derivative in Triton; call it with backend='chunked'"):
        dx.sum().backward()


def test_triton_cuts_wide_heads(triton, device):
    """p above what a program holds: the head is cut into narrower ones, gradients included."""
    check_op(SPEC, {"b": 1, "l": 9, "h": 1, "p": 160, "n": 3}, "triton", torch.float32, device)


def test_triton_under_vmap(triton, device):
    rows = [inputs_of(device, b=1, l=9, h=1, seed=seed, D="position") for seed in range(2)]
    names = list(rows[0])

    def loss(*tensors):
        return ssd(**dict(zip(names, tensors)), backend="triton")[0].square().sum()

    every = tuple(range(len(names)))
    stacked = [torch.stack([row[name] for row in rows]) for name in names]
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=every))(*stacked)
    alone = zip(*(torch.func.grad(loss, argnums=every)(*row.values()) for row in rows))
    for found, expected in zip(per_sample, alone):
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_triton_opcheck(triton, device):
    inputs = inputs_of(device, b=1, l=5, h=1, D="position")
    arguments = [inputs.get(name) for name in NAMES]
    torch.library.opcheck(triton._forward, (*arguments, 0, 0))
    torch.library.opcheck(triton._backward, (*arguments, torch.randn_like(inputs["x"]), None, 0, 0, 0))


def test_triton_compiles_once_for_all_lengths(triton, device):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    scan = lambda **kw: ssd(**kw, backend="triton")[0]  # noqa: E731
    compiled = torch.compile(scan, backend=counter, fullgraph=True, dynamic=True)
    for length in (5, 9, 20):
        inputs = inputs_of(device, b=1, l=length, h=2)
        cotangents = {"y": torch.randn_like(inputs["x"])}
        expected = run_with_gradients(scan, inputs, ("y",), cotangents)
        for name, value in run_with_gradients(compiled, inputs, ("y",), cotangents).items():
            torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("size", [(64, 64), (64, 128), (16, 16), (48, 100), (128, 128), (128, 256), (192, 64)], ids=str)
def test_every_tile_table_with_every_gradient(size, dtype, triton, device):
    p, n = size
    for length, regime in ((197, "initial"), (600, "strong")):
        case = {"b": 2, "l": length, "h": 4, "p": p, "n": n, "g": 2, "regime": regime, "packed": regime == "strong"}
        check_op(SPEC, case, "triton", dtype, device)


def step_inputs(inputs, t):
    return {name: inputs[name][:, t] for name in ("x", "log_decay", "B", "C", "weight")} | {"D": inputs["D"]}


def test_steps_equal_the_scan(device):
    inputs = inputs_of(device, l=70, h=4, g=2)
    y, final = ssd(**inputs, backend="chunked")
    state, place = inputs["initial_state"], inputs["initial_state"].clone()
    for t in range(70):
        one, state = ssd_step(**step_inputs(inputs, t), state=state)
        same = ssd_step_(**step_inputs(inputs, t), state=place)
        assert torch.equal(one, same)
        assert relative_error(one, y[:, t].double()) < 1e-5
    assert torch.equal(state, place)
    assert relative_error(state, final.double()) < 1e-6


def test_step_gradients(device):
    inputs = inputs_of(device, l=1, dtype=torch.float64)
    arguments = step_inputs(inputs, 0) | {"state": inputs["initial_state"]}
    leaves = tuple(value.requires_grad_() for value in arguments.values())
    assert torch.autograd.gradcheck(lambda *tensors: ssd_step(**dict(zip(arguments, tensors))), leaves)

    pooled = [value.detach().requires_grad_() for value in (arguments["x"], torch.randn_like(arguments["state"]))]
    index = torch.tensor([1, -1], device=device)

    def paged(x, pool):
        return ssd_step(**arguments | {"x": x, "state": pool}, state_index=index)

    assert torch.autograd.gradcheck(paged, pooled)


@pytest.mark.parametrize("index", [[4, -1, 0], [-1, -1, -1], [2, 1, 3], [-1, 0, -1]], ids=str)
def test_paged_states(index, device):
    """Rows use the states they name; padding rows give 0 and leave every state as it was."""
    inputs = step_inputs(inputs_of(device, b=3), 0)
    pool = torch.randn(5, 2, 3, 4, device=device)
    index = torch.tensor(index, dtype=torch.int32, device=device)
    expected, kept = pool.clone(), pool.clone()
    y, new = ssd_step(**inputs, state=pool, state_index=index)
    assert torch.equal(pool, kept)
    for row, place in enumerate(index.tolist()):
        if place < 0:
            assert not y[row].any()
            continue
        alone = {name: value if name == "D" else value[row : row + 1] for name, value in inputs.items()}
        found, state = ssd_step(**alone, state=kept[place : place + 1])
        assert torch.equal(y[row], found[0])
        expected[place] = state[0]
    assert torch.equal(new, expected)
    assert torch.equal(ssd_step_(**inputs, state=pool, state_index=index), y)
    assert torch.equal(pool, expected)


def test_step_keeps_the_dtype_of_the_state(device):
    inputs = step_inputs(inputs_of(device, dtype=torch.bfloat16), 0)
    y, state = ssd_step(**inputs, state=torch.zeros(2, 2, 3, 4, dtype=torch.bfloat16, device=device))
    assert y.dtype == state.dtype == torch.bfloat16
    assert ssd_step(**inputs, state=torch.zeros(2, 2, 3, 4, device=device))[1].dtype == torch.float32
    with pytest.raises(ValueError, match=r"`state` has n=3, expected 4 \(from `B`\)"):
        ssd_step(**inputs, state=torch.zeros(2, 2, 3, 3, device=device))
