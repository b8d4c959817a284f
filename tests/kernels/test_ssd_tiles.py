"""No kernel of the ssd family is compiled to wgmma on narrow tiles, where compilers get it wrong."""

import itertools

import pytest
import torch

from omnissm.kernels.ssd.spec import SPEC as SSD
from omnissm.kernels.testing import check_op
from omnissm.kernels.trapezoid_ssd.spec import SPEC as TRAPEZOID

pytest.importorskip("triton")

SIZES = [(p, n) for p, n in itertools.product((16, 32, 64, 128), (16, 32, 64, 128, 256)) if p * n <= 128 * 128]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def tables(monkeypatch):
    """The module of the tables, as on a GPU."""
    from omnissm.kernels.ssd import triton_tiles

    cached = [value for value in vars(triton_tiles).values() if hasattr(value, "cache_clear")]
    monkeypatch.setattr(triton_tiles, "INTERPRETED", False)
    for function in cached:
        function.cache_clear()
    yield triton_tiles
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("p", "n"), SIZES)
def test_tiles_of_fewer_than_64_columns_have_too_few_warps_for_wgmma(p, n, dtype, tables):
    """Tables, what a search tries, and short chunks for gradients in float32; wgmma takes groups of four warps."""
    x = torch.empty(1, 1, 1, p, dtype=dtype)
    outputs = [tables.tiles(kernel, p, n, dtype) for kernel in ("fwd", "two-sided")]
    outputs += tables.alternatives("fwd", p, n, dtype)
    first = tables.gradient_tiles(x, n)
    gradients = [first, *tables.gradient_alternatives(first, x, n), tables.gradient_tiles(x, n, 32)]
    outputs += [one for tiles in gradients for one in tiles[:3]]
    assert all((one.warps < 4) == (min(p, n) < 64) for one in outputs)
    assert all(one.chunk % 16 == 0 for one in outputs)


def test_padding_counts(tables):
    """p = 33 and n = 40 become 64, which is wide; p = 32 stays narrow whatever n is."""
    x = torch.empty(1, 1, 1, 33)
    assert not tables.narrow(*tables.padded(x, 40))
    assert tables.narrow(*tables.padded(x[..., :32], 256))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("spec", "size"), [(TRAPEZOID, {"p": 3, "n": 41, "s": 17}), (SSD, {"p": 17, "n": 33})], ids=["trapezoid_ssd", "ssd"]
)
def test_padded_narrow_tiles_read_their_own_memory(spec, size, device):
    """Sizes at which wgmma took wrong addresses in 16 bit, in more than one chunk."""
    check_op(spec, {"b": 1, "l": 140, "h": 2, "packed": True, **size}, "triton", torch.bfloat16, device)
