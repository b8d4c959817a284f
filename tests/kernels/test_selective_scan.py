"""`selective_scan` and its step: golden numbers, identities, packing, cuts, torch's transforms, memory."""

import pytest
import torch

from omnissm.kernels import linear_scan, selective_scan, selective_step, selective_step_, ssd
from omnissm.kernels.selective_scan import chunked, stepwise
from omnissm.kernels.selective_scan.spec import SPEC
from omnissm.kernels.testing import check_op, relative_error, run_with_gradients

OUTPUTS = ("y", "final_state")


@pytest.fixture(params=["reference", "chunked"])
def path(request) -> str:
    return request.param


def inputs_of(device, dtype=torch.float32, **size):
    generator = torch.Generator(device).manual_seed(3)
    size = {"b": 2, "l": 20, "d": 4, "n": 3} | size
    return SPEC.make_inputs(**size, dtype=dtype, device=device, generator=generator)


def compare(first, second, inputs, rtol=1e-4, atol=1e-5):
    """Outputs and all gradients of two functions of the same inputs."""
    with torch.no_grad():
        found = dict(zip(OUTPUTS, first(**inputs)))
    cotangents = {name: torch.randn_like(value) for name, value in found.items()}
    expected = run_with_gradients(first, inputs, OUTPUTS, cotangents)
    for name, value in run_with_gradients(second, inputs, OUTPUTS, cotangents).items():
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def waves(*shape, seed):
    """Element i in row-major order is sin(0.7 i + 1.3 seed + 0.1)."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.7 * index + 1.3 * seed + 0.1).reshape(shape)


def golden():
    return {
        "u": waves(1, 5, 3, seed=1),
        "dt": torch.nn.functional.softplus(waves(1, 5, 3, seed=2)),
        "A": -torch.exp(waves(3, 2, seed=3)),
        "B": waves(1, 5, 2, seed=4),
        "C": waves(1, 5, 2, seed=5),
    }


def test_golden_numbers(path):
    y, final = selective_scan(**golden(), D=waves(3, seed=6), backend=path)
    assert y.sum().item() == pytest.approx(-0.883269754, abs=1e-8)
    assert y[0, -1].tolist() == pytest.approx([-0.452907574, -0.707955161, -0.221660966], abs=1e-8)
    assert final.sum().item() == pytest.approx(0.101559649, abs=1e-8)


def test_golden_numbers_of_the_window(path):
    y, _ = selective_scan(**golden(), window=3, backend=path)
    assert y.sum().item() == pytest.approx(-3.646690470, abs=1e-8)
    assert y[0, 0].tolist() == pytest.approx([-0.836340560, -0.436659365, -0.221177634], abs=1e-8)


def test_zero_step_changes_nothing(path, device):
    inputs = inputs_of(device, state=True, skip=False) | {"dt": torch.zeros(2, 20, 4, device=device)}
    y, final = selective_scan(**inputs, backend=path)
    assert torch.equal(final, inputs["initial_state"])
    torch.testing.assert_close(y, torch.einsum("bln,bdn->bld", inputs["C"], final))


def test_one_state_is_the_linear_scan(path, device):
    inputs = inputs_of(device, n=1, state=True, skip=False)
    inputs["B"], inputs["C"] = torch.ones_like(inputs["B"]), torch.ones_like(inputs["C"])
    dt, u = inputs["dt"], inputs["u"]
    states, last = linear_scan(torch.exp(dt * inputs["A"][:, 0]), dt * u, inputs["initial_state"][..., 0])
    y, final = selective_scan(**inputs, backend=path)
    torch.testing.assert_close(y, states)
    torch.testing.assert_close(final[..., 0], last)


def test_groups_are_separate_scans(path, device):
    inputs = inputs_of(device, d=6, g=3, gate=True, state=True)
    y, final = selective_scan(**inputs, backend=path)
    for group in range(3):
        own = slice(2 * group, 2 * group + 2)
        part = {name: inputs[name][..., own] for name in ("u", "dt", "D", "z")}
        part |= {name: inputs[name][:, :, group] for name in ("B", "C")}
        part |= {"A": inputs["A"][own], "initial_state": inputs["initial_state"][:, own]}
        y_part, final_part = selective_scan(**part, backend=path)
        torch.testing.assert_close(y_part, y[..., own])
        torch.testing.assert_close(final_part, final[:, own])


def test_conjugate_pairs_are_the_full_complex_system(path, device):
    """2 Re(C h) over half of the states equals the plain sum over all of them."""
    inputs = inputs_of(device, complex_rates=True, skip=False)
    y, final = selective_scan(**inputs, backend=path)
    decay = torch.exp(inputs["dt"][..., None] * torch.cat([inputs["A"], inputs["A"].conj()], 1))
    weighted = (inputs["dt"] * inputs["u"])[..., None] * torch.cat([inputs["B"]] * 2, -1)[:, :, None]
    states = linear_scan(decay.flatten(2), weighted.flatten(2).to(decay.dtype))[0].view(decay.shape)
    full = (states * torch.cat([inputs["C"]] * 2, -1)[:, :, None]).sum(-1)
    torch.testing.assert_close(y, full.real)
    assert full.imag.abs().max() < 1e-5
    assert final.is_complex()


@pytest.mark.parametrize("options", [{}, {"packed": True}])
def test_complex_maps(options, device):
    inputs = inputs_of(device, complex_rates=True, state=True, gate=True, l=40, **options)
    for name in ("B", "C"):
        inputs[name] = torch.complex(inputs[name], torch.randn_like(inputs[name]))
    compare(
        lambda **kw: selective_scan(**kw, backend="reference"),
        lambda **kw: selective_scan(**kw, backend="chunked"),
        inputs,
    )


@pytest.mark.parametrize("cut", [1, 63, 64, 65, 99])
def test_any_cut_carries_state_and_gradients(cut, path, device):
    def in_two(u, dt, B, C, z, initial_state, A, D, **options):
        head, tail = zip(*((x[:, :cut], x[:, cut:]) for x in (u, dt, B, C, z)))
        outputs, state = [], initial_state
        for u_part, dt_part, B_part, C_part, z_part in (head, tail):
            y, state = selective_scan(u_part, dt_part, A, B_part, C_part, D, z_part, state, **options)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    inputs = inputs_of(device, l=100, d=2, n=2, gate=True, state=True) | {"backend": path}
    compare(selective_scan, in_two, inputs)


def test_window_cut_at_its_multiples(path, device):
    inputs = inputs_of(device, window=4) | {"backend": path}
    y, _ = selective_scan(**inputs)
    parts, state = [], None
    for span in (slice(0, 8), slice(8, 20)):
        cut = {name: inputs[name][:, span] for name in ("u", "dt", "B", "C")}
        part, state = selective_scan(**(inputs | cut), initial_state=state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), y)


def test_window_of_one_is_none_and_of_all_is_both_directions(path, device):
    inputs = inputs_of(device, skip=False)
    plain, _ = selective_scan(**inputs, backend=path)
    assert torch.equal(selective_scan(**(inputs | {"window": 1}), backend=path)[0], plain)
    flipped = inputs | {name: inputs[name].flip(1) for name in ("u", "dt", "B", "C")}
    later = selective_scan(**flipped, backend=path)[0].flip(1)
    own = inputs["dt"] * inputs["u"] * (inputs["B"] * inputs["C"]).sum(-1, keepdim=True)
    for window in (20, 1000):
        both, _ = selective_scan(**(inputs | {"window": window}), backend=path)
        torch.testing.assert_close(both, plain + later - own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_equals_separate(window, path, device):
    lengths = [1, 7, 1, 70, 1, 20]
    inputs = inputs_of(device, b=1, l=sum(lengths), state=True, gate=True, window=window) | {"backend": path}
    index = torch.arange(len(lengths), device=device)
    seq_idx = torch.repeat_interleave(index, torch.tensor(lengths, device=device))[None]

    def separate(u, dt, B, C, z, initial_state, **options):
        outputs, state = [], initial_state
        for one in zip(*(x.split(lengths, 1) for x in (u, dt, B, C, z))):
            named = dict(zip(("u", "dt", "B", "C", "z"), one))
            y, final = selective_scan(**named, initial_state=state, **options)
            outputs.append(y)
            state = None
        return torch.cat(outputs, 1), final

    compare(separate, lambda **kw: selective_scan(**kw, seq_idx=seq_idx), inputs)


def test_no_sequence_sees_another(device):
    """A huge input in one packed sequence leaves the others' bits alone, on the serial and on the chunked path."""
    for d, n in ((4, 2), (300, 16)):
        inputs = inputs_of(device, b=1, l=90, d=d, n=n)
        seq_idx = (torch.arange(90, device=device) >= 37).long()[None]
        y, final = selective_scan(**inputs, seq_idx=seq_idx)
        inputs["u"][:, :37] = 1e30
        changed, changed_final = selective_scan(**inputs, seq_idx=seq_idx)
        assert torch.equal(y[:, 37:], changed[:, 37:])
        assert torch.equal(final, changed_final)


def test_causal_to_the_bit(path, device):
    inputs = inputs_of(device, l=100)
    y, _ = selective_scan(**inputs, backend=path)
    for name in ("u", "dt", "B", "C"):
        inputs[name][:, 60:] *= 0.7
    changed, _ = selective_scan(**inputs, backend=path)
    assert torch.equal(y[:, :60], changed[:, :60])
    assert not torch.equal(y[:, 60:], changed[:, 60:])


@pytest.mark.parametrize("length", [1, 2, 7, 16, 63, 64, 65, 127, 128, 129, 197, 300, 1000])
def test_lengths(length, device):
    check_op(SPEC, {"b": 1, "l": length, "d": 3, "n": 2, "g": 1, "state": True}, "chunked", torch.float32, device)


@pytest.mark.parametrize("numbers", [1, 16, 48, 100, 1 << 20])
@pytest.mark.parametrize("stepwise", [False, True])
def test_blocks_and_tiles_are_a_matter_of_speed(numbers, stepwise, device, monkeypatch):
    """Any cut into blocks of rows and channels, tiles and chunks gives the same numbers."""
    monkeypatch.setattr(chunked, "_CPU_NUMBERS", numbers)
    monkeypatch.setattr(chunked, "_DEVICE_NUMBERS", numbers)
    monkeypatch.setattr(chunked, "_STEPWISE", 1 if stepwise else 1 << 40)
    monkeypatch.setattr(chunked, "_STEPWISE_BLOCK", numbers)
    size = {"b": 3, "l": 150, "d": 6, "n": 4, "g": 2, "state": True, "packed": True}
    check_op(SPEC, size, "chunked", torch.float32, device)


@pytest.mark.parametrize("options", [{}, {"complex_rates": True}], ids=["real", "complex"])
@pytest.mark.parametrize("precise", [False, True], ids=["exp", "expm1"])
def test_position_by_position(precise, options, device, monkeypatch):
    """What wide rows do on a CPU, in both forms of the decay, on rows with packing and an uneven end."""
    monkeypatch.setattr(chunked, "_STEPWISE", 1)
    monkeypatch.setattr(stepwise, "_EXP_POSITIONS", 0 if precise else 1024)
    size = {"b": 2, "l": 70, "d": 4, "n": 3, "g": 2, "state": True, "packed": True, **options}
    check_op(SPEC, size, "chunked", torch.float32, device)


def test_pieces_are_a_matter_of_speed(device, monkeypatch):
    monkeypatch.setattr(chunked, "_STEPWISE", 1)
    monkeypatch.setattr(stepwise, "_PIECE", 2 * 4 * 3 * 5)  # five positions
    check_op(SPEC, {"b": 2, "l": 72, "d": 4, "n": 3, "state": True, "packed": True}, "chunked", torch.float32, device)


def test_exp_is_taken_where_states_are_forgotten():
    """Long rows take expm1 only if some stretch of half of 1,024 positions keeps more than 2 / 3."""
    dt, A = torch.full((1500, 1, 1, 2), 0.01), torch.tensor([[[-1.0, -1.0], [-2.0, -0.5]]])
    assert not stepwise.lives_long(dt[:1024], A / 1e6)
    assert not stepwise.lives_long(dt, A)
    assert not stepwise.lives_long(dt, A / 6)
    assert stepwise.lives_long(dt, A / 7)
    assert stepwise.lives_long(dt, A * torch.tensor([1.0, 0.1]))
    quiet = dt.index_fill(0, torch.arange(512, 1024), 0.001)
    assert stepwise.lives_long(quiet, A)
    assert stepwise.lives_long(dt.masked_fill(dt > 0, float("nan")), A)
    assert stepwise.lives_long(dt, -A)


def regime(name, inputs):
    like = inputs["dt"]
    if name == "strong":  # half of the steps log decay -112, the others -0.04
        strong = torch.rand(like.shape, generator=torch.Generator().manual_seed(0)).to(like.device) < 0.5
        return inputs | {"dt": torch.where(strong, 112.0, 0.04), "A": -torch.ones_like(inputs["A"])}
    if name == "weak":
        return inputs | {"dt": torch.full_like(like, 1e-6), "A": -torch.ones_like(inputs["A"])}
    if name == "tiny":
        return inputs | {"dt": torch.full_like(like, 1e-7)}
    if name == "no input":
        return inputs | {"B": torch.zeros_like(inputs["B"])}
    return inputs | {"u": 1e4 * inputs["u"]}


@pytest.mark.parametrize("name", ["strong", "weak", "tiny", "no input", "large"])
@pytest.mark.parametrize("shape", [{"d": 2, "n": 2}, {"d": 256, "n": 16}], ids=["chunks", "serial"])
def test_regimes(name, shape, device):
    long = name == "weak" and shape["d"] == 2
    inputs = regime(name, inputs_of(device, b=1, l=4096 if long else 300, state=True, **shape))
    wide = {key: value.double() if torch.is_tensor(value) else value for key, value in inputs.items()}
    y, final = selective_scan(**inputs)
    cotangents = {"y": torch.randn_like(y), "final_state": torch.randn_like(final)}
    definition = "reference" if shape["d"] == 2 else "chunked"
    expected = run_with_gradients(
        lambda **kw: selective_scan(**kw, backend=definition),
        wide,
        OUTPUTS,
        {k: v.double() for k, v in cotangents.items()},
    )
    for key, value in run_with_gradients(selective_scan, inputs, OUTPUTS, cotangents).items():
        assert relative_error(value, expected[key]) < 1e-5, key


def test_empty(path, device):
    inputs = inputs_of(device, l=0, state=True, gate=True)
    inputs["initial_state"].requires_grad_()
    y, final = selective_scan(**inputs, backend=path)
    assert y.shape == (2, 0, 4)
    assert torch.equal(final, inputs["initial_state"])
    assert torch.autograd.grad(final.sum(), inputs["initial_state"])[0].eq(1).all()
    inputs["initial_state"] = None
    assert not selective_scan(**inputs, backend=path)[1].any()


def test_wrong_arguments(device):
    inputs = inputs_of(device)
    with pytest.raises(ValueError, match=r"`B` has g=3, expected a divisor of d=4 \(from `u`\)"):
        selective_scan(**(inputs | {name: torch.randn(2, 20, 3, 3, device=device) for name in "BC"}))
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        selective_scan(**(inputs | {"window": 0}))
    with pytest.raises(TypeError, match="`B` is complex and `A` is not"):
        selective_scan(**(inputs | {"B": inputs["B"].cfloat()}))
    with pytest.raises(ValueError, match="`A` has d=3, expected 4"):
        selective_scan(**(inputs | {"A": inputs["A"][:3]}))
    with pytest.raises(ValueError, match=r"`C` must have 3 dimensions, \(b, l, n\)"):
        selective_scan(**(inputs | {"C": inputs["C"][:, :, None]}))


def test_autocast_casts_signals_only(path, device):
    inputs = inputs_of(device, gate=True, state=True)
    with torch.autocast(device.type, torch.bfloat16):
        y, final = selective_scan(**inputs, backend=path)
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    by_hand = inputs | {name: inputs[name].bfloat16() for name in ("u", "B", "C", "z")}
    expected, expected_final = selective_scan(**by_hand, backend=path)
    assert torch.equal(y, expected)
    assert torch.equal(final, expected_final)


def test_vmap_and_gradients_per_sample(device):
    samples = [inputs_of(device, b=1, l=9, gate=True, state=True) for _ in range(3)]
    stacked = {name: value for name, value in samples[0].items() if torch.is_tensor(value)}
    stacked = {name: torch.stack([(k + 1) * value for k in range(3)]) for name, value in stacked.items()}
    every = [{name: value[k] for name, value in stacked.items()} for k in range(3)]

    def scan(inputs):
        return selective_scan(**inputs, backend="chunked")

    for k, value in enumerate(torch.func.vmap(scan)(stacked)):
        torch.testing.assert_close(value, torch.stack([scan(one)[k] for one in every]))

    def loss(inputs):
        y, final = scan(inputs)
        return y.square().sum() + final.sum()

    scanned = [stacked[name] for name in ("u", "dt", "A", "B", "C")]
    for dims in ((0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, None)):
        keep = torch.rand(3, 1, 9, 1, device=device).round()
        keep = keep if dims[-1] == 0 else keep[0]

        def masked(u, dt, A, B, C, keep):
            return chunked._forward(u, dt, A, B[:, :, None], C[:, :, None], None, keep)[0]

        got = torch.func.vmap(masked, in_dims=dims)(*scanned, keep)
        each = [masked(*(x[k] for x in scanned), keep[k] if dims[-1] == 0 else keep) for k in range(3)]
        torch.testing.assert_close(got, torch.stack(each))

    shared = dict.fromkeys(stacked, 0) | {"A": None, "B": None, "D": None, "initial_state": None}
    mixed = {name: value if shared[name] == 0 else value[0] for name, value in stacked.items()}
    got = torch.func.vmap(torch.func.grad(loss), in_dims=(shared,))(mixed)
    for k in range(3):
        one = {name: value[k] if shared[name] == 0 else value for name, value in mixed.items()}
        for name, value in torch.func.grad(loss)(one).items():
            torch.testing.assert_close(got[name][k], value, msg=lambda m, n=name: f"{n}: {m}")


def test_opcheck(device):
    inputs = inputs_of(device, l=5, state=True, g=2)
    scanned = [inputs[name] for name in ("u", "dt", "A", "B", "C")]
    y, final, saved = (x.clone() for x in chunked._forward(*scanned, inputs["initial_state"], None))
    keep = torch.ones(2, 5, 1, device=device)
    torch.library.opcheck(chunked._forward, (*scanned, inputs["initial_state"], keep))
    torch.library.opcheck(chunked._forward, (*scanned, None, None))
    torch.library.opcheck(chunked._backward, (*scanned, keep, saved, y, final))


class Scan(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, u, dt, A, B, C, D, z, seq_idx):
        return selective_scan(u, dt, A, B, C, D, z, seq_idx=seq_idx, **self.options)


def positional(device, length):
    inputs = inputs_of(device, l=length, gate=True, packed=True)
    return tuple(inputs[name] for name in ("u", "dt", "A", "B", "C", "D", "z", "seq_idx"))


@pytest.mark.parametrize("window", [None, 4])
def test_export_with_dynamic_length(window, device):
    length = {1: torch.export.Dim("length", min=2, max=4096)}
    shapes = (length, length, None, length, length, None, length, length)
    program = torch.export.export(Scan(window=window), positional(device, 6), dynamic_shapes=shapes)
    for got, expected in zip(program.module()(*positional(device, 23)), Scan(window=window)(*positional(device, 23))):
        torch.testing.assert_close(got, expected)


def test_compile_once_for_all_lengths(device):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Scan(), backend=counter, fullgraph=True, dynamic=True)
    for length in (5, 9, 70):
        *inputs, seq_idx = positional(device, length)
        inputs = [x.requires_grad_() for x in inputs]
        got = torch.autograd.grad(compiled(*inputs, seq_idx)[0].square().sum(), inputs)
        expected = torch.autograd.grad(Scan()(*inputs, seq_idx)[0].square().sum(), inputs)
        torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


def test_memory_stays_far_below_the_states():
    """No operation inside forward or backward allocates more than a sixth of the memory of all states."""
    inputs = inputs_of(torch.device("cpu"), b=2, l=1024, d=256, n=16)
    leaves = [inputs[name].requires_grad_() for name in ("u", "dt", "A", "B", "C", "D")]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        y, _ = selective_scan(**inputs)
        torch.autograd.grad(y.sum(), leaves)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 4 * y.numel() <= largest <= 4 * y.numel() * 16 // 6


def step_inputs(inputs, t):
    return {name: inputs[name] if name == "A" else inputs[name][:, t] for name in ("u", "dt", "A", "B", "C")}


@pytest.mark.parametrize("options", [{}, {"g": 2}, {"complex_rates": True}], ids=str)
def test_steps_equal_the_scan(options, device):
    inputs = inputs_of(device, state=True, gate=True, **options)
    y, final = selective_scan(**inputs)
    state, in_place = inputs["initial_state"], inputs["initial_state"].clone()
    for t in range(20):
        arguments, further = step_inputs(inputs, t), {"D": inputs["D"], "z": inputs["z"][:, t]}
        out, state = selective_step(**arguments, state=state, **further)
        torch.testing.assert_close(out, y[:, t], rtol=1e-5, atol=1e-5)
        assert torch.equal(selective_step_(**arguments, state=in_place, **further), out)
        assert torch.equal(in_place, state)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


def test_step_gradients(device):
    inputs = step_inputs(inputs_of(device, torch.float64), 0)
    leaves = [x.requires_grad_() for x in (*inputs.values(), torch.randn(2, 4, 3, device=device, dtype=torch.float64))]
    assert torch.autograd.gradcheck(selective_step, leaves)


@pytest.mark.parametrize("index", [[2, 0, -1, 4], [-1, -1, 0, 3], [-1, -1, -1, -1]], ids=str)
def test_paged_states(index, device):
    inputs = step_inputs(inputs_of(device, b=4), 0)
    pool = torch.randn(5, 4, 3, device=device)
    slots = torch.tensor(index, device=device, dtype=torch.int32)
    expected_y, expected = torch.zeros(4, 4, device=device), pool.clone()
    for row, slot in enumerate(index):
        if slot >= 0:
            one = {name: x if name == "A" else x[row : row + 1] for name, x in inputs.items()}
            y, state = selective_step(**one, state=pool[slot : slot + 1])
            expected_y[row], expected[slot] = y[0], state[0]
    y, new = selective_step(**inputs, state=pool, state_index=slots)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(new, expected)
    assert torch.equal(selective_step_(**inputs, state=pool, state_index=slots), y)
    assert torch.equal(pool, new)


def test_step_checks(device):
    inputs = step_inputs(inputs_of(device), 0)
    with pytest.raises(ValueError, match="`state` has n=2, expected 3"):
        selective_step(**inputs, state=torch.zeros(2, 4, 2, device=device))
    with pytest.raises(TypeError, match=r"`state` has dtype torch\.complex64 and `A` torch\.float32"):
        selective_step(**inputs, state=torch.zeros(2, 4, 3, device=device, dtype=torch.complex64))


def test_rates_shared_by_the_states_are_the_scan_of_mamba2(path, device):
    """A constant over n: `ssd` with one channel per head."""
    inputs = inputs_of(device, l=70, state=True)
    inputs["A"] = inputs["A"][:, :1].expand(-1, 3)
    dt = inputs["dt"]
    y, final = selective_scan(**inputs, backend=path)
    x, B, C = inputs["u"][..., None], inputs["B"][:, :, None], inputs["C"][:, :, None]
    state = inputs["initial_state"][:, :, None]
    expected, last = ssd(x, dt * inputs["A"][:, 0], B, C, state, weight=dt, D=inputs["D"], backend="chunked")
    torch.testing.assert_close(y, expected[..., 0])
    torch.testing.assert_close(final, last[:, :, 0])
