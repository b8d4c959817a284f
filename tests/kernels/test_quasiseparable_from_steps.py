"""`quasiseparable_from_steps`: the kernel for short rows against the definition, and what does not go to it."""

import pytest
import torch
import torch.nn.functional as F

from omnissm.kernels import available_backends, quasiseparable, quasiseparable_from_steps
from omnissm.kernels.testing import relative_error


@pytest.fixture
def triton(device):
    """The module of the kernel, where Triton runs."""
    if reason := available_backends(device)["triton"]:
        pytest.skip(reason)
    from omnissm.kernels.quasiseparable import triton_short

    return triton_short


def arguments(device, b, l, h, p, n, g=1, dtype=torch.float16, rate=0.5):  # noqa: E741
    """Slices of one tensor, as a projection gives them."""
    generator = torch.Generator(device).manual_seed(0)
    draw = {"generator": generator, "device": device}
    sizes = [h * p, *4 * [g * n], h, h, 3]
    x, *maps, dt_f, dt_b, _ = torch.randn(b, l, sum(sizes), **draw).to(dtype).split(sizes, dim=-1)
    maps = [one.unflatten(-1, (g, n)) for one in maps]
    dt_bias, A_log, D = torch.randn(h, **draw) - 4, rate * torch.randn(h, **draw), torch.randn(h, **draw)
    return [
        x.unflatten(-1, (h, p)),
        dt_f,
        dt_b,
        dt_bias,
        A_log,
        *maps,
        torch.randn(b, l, h, **draw).to(dtype),
        D,
    ]


def definition(x, dt_f, dt_b, dt_bias, A_log, B_f, C_f, B_b, C_b, diag, D):
    forward, backward = F.softplus(dt_f + dt_bias), F.softplus(dt_b + dt_bias)
    rate = -A_log.exp()
    return quasiseparable(
        x, forward * rate, forward, B_f, C_f, backward * rate, backward, B_b, C_b, diag + D, backend="reference"
    )[0]


@pytest.mark.parametrize(
    "size",
    [
        {"b": 2, "l": 70, "h": 4, "p": 16, "n": 16},
        {"b": 1, "l": 1, "h": 2, "p": 4, "n": 4},
        {"b": 1, "l": 2, "h": 1, "p": 1, "n": 1},
        {"b": 2, "l": 33, "h": 6, "p": 5, "n": 7, "g": 2},
        {"b": 1, "l": 65, "h": 3, "p": 16, "n": 16, "g": 3},
        {"b": 1, "l": 256, "h": 2, "p": 16, "n": 32, "rate": 3.0},
    ],
)
def test_short_rows(device, triton, size):
    given = arguments(device, **size)
    with torch.no_grad():
        got = quasiseparable_from_steps(*given, backend="triton")
    assert got.dtype == torch.float16
    assert relative_error(got, definition(*(one.double() for one in given))) < 5e-4


def test_steps_too_small_for_a_sum_with_one(device, triton):
    given = arguments(device, 1, 40, 2, 4, 4)
    given[3] = given[3] - 14  # steps near 1e-8
    given[-1] = torch.zeros_like(given[-1])
    given[-2] = torch.zeros_like(given[-2])
    given[0] = given[0] * 2.0**10  # products stay above the least number of 16 bits
    given[5], given[7] = (given[k] * 2.0**6 for k in (5, 7))
    with torch.no_grad():
        got = quasiseparable_from_steps(*given, backend="triton")
    assert relative_error(got, definition(*(one.double() for one in given))) < 5e-3


def test_every_tile_gives_the_same(device, triton, monkeypatch):
    given = arguments(device, 2, 100, 4, 16, 16)
    expected = definition(*(one.double() for one in given))
    for tile in ((32, 32, 1, 4, 1), (64, 64, 4, 4, 1), (32, 16, 2, 4, 1), (128, 32, 3, 4, 1)):
        monkeypatch.setattr(triton, "TILE", triton.Tile(*tile))
        with torch.no_grad():
            got = quasiseparable_from_steps(*given, backend="triton")
        assert relative_error(got, expected) < 5e-4


@pytest.mark.parametrize("case", ["gradient", "long", "float32", "mixed"])
def test_what_other_paths_take(device, triton, monkeypatch, case):
    monkeypatch.setattr(triton, "quasiseparable_short", None)
    given = arguments(device, 1, 300 if case == "long" else 9, 2, 4, 4)
    if case == "float32":
        given = [one.float() for one in given]
    if case == "mixed":
        given[5] = given[5].float()
    given[0] = given[0].detach().requires_grad_(case == "gradient")
    y = quasiseparable_from_steps(*given, backend="chunked" if case == "long" else "triton")
    assert relative_error(y.detach(), definition(*(one.detach().double() for one in given))) < 1e-2
    assert y.requires_grad == (case == "gradient")


@pytest.mark.parametrize("rate", [7.0, 20.0, 100.0])
def test_decays_that_leave_nothing(device, triton, rate):
    """Neighbours still see each other; sums of the decays of a row would have no digits for that, or be infinite."""
    given = arguments(device, 1, 256, 2, 4, 4)
    given[3], given[4] = torch.zeros_like(given[3]), torch.full_like(given[4], rate)
    with torch.no_grad():
        got = quasiseparable_from_steps(*given, backend="triton")
    assert relative_error(got, definition(*(one.double() for one in given))) < 5e-3


def test_other_layouts(device, triton):
    """Batch and positions exchanged in memory, and positions so far apart that offsets in a row need 64 bits."""
    given = arguments(device, 2, 7, 2, 4, 4)
    swapped = [one.transpose(0, 1).contiguous().transpose(0, 1) if one.dim() > 2 else one for one in given]
    far = torch.empty_strided(given[0].shape, (8, 2**23, 4, 1), dtype=torch.float16, device=device)
    far.copy_(given[0])
    with torch.no_grad():
        expected = quasiseparable_from_steps(*given, backend="triton")
        assert torch.equal(quasiseparable_from_steps(*swapped, backend="triton"), expected)
        assert torch.equal(quasiseparable_from_steps(far, *given[1:], backend="triton"), expected)


@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize(
    ("number", "shape", "message"),
    [
        (1, (1, 9, 1), "`dt_f` has h=1, expected 2"),
        (3, (3,), "`dt_bias` has h=3, expected 2"),
        (4, (1,), "`A_log` has h=1, expected 2"),
        (6, (1, 9, 1, 5), "`C_f` has n=5, expected 4"),
        (7, (1, 8, 1, 4), "`B_b` has l=8, expected 9"),
        (9, (1, 9), "`diag` must have 3 dimensions"),
        (10, (1,), "`D` has h=1, expected 2"),
    ],
)
def test_shapes_that_disagree(device, triton, backend, number, shape, message):
    given = arguments(device, 1, 9, 2, 4, 4)
    with torch.no_grad():
        quasiseparable_from_steps(*given, backend=backend)
        given[number] = torch.zeros(shape, dtype=given[number].dtype, device=device)
        with pytest.raises(ValueError, match=message):
            quasiseparable_from_steps(*given, backend=backend)


def test_other_wrong_calls(device, triton):
    given = arguments(device, 1, 9, 2, 4, 4)
    with torch.no_grad():
        with pytest.raises(ValueError, match="3 groups"):
            quasiseparable_from_steps(*given[:5], *4 * [torch.zeros(1, 9, 3, 4).to(given[5])], *given[9:])
        with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
            quasiseparable_from_steps(*given, chunk_size=0, backend="triton")
        with pytest.raises(TypeError, match="`x` must have a floating dtype"):
            quasiseparable_from_steps(given[0].to(torch.int16), *given[1:], backend="triton")
        with pytest.raises(TypeError, match=r"`dt_b` must be a torch\.Tensor of floating dtype, got NoneType"):
            quasiseparable_from_steps(*given[:2], None, *given[3:], backend="triton")


def test_opcheck(device, triton):
    torch.library.opcheck(triton.quasiseparable_short, tuple(arguments(device, 1, 5, 2, 4, 4)))


def test_compiled(device, triton):
    given = arguments(device, 1, 20, 2, 4, 4)
    compiled = torch.compile(quasiseparable_from_steps, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = quasiseparable_from_steps(*given, backend="triton")
        assert torch.equal(compiled(*given, backend="triton"), expected)
