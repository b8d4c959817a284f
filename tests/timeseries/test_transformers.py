"""The transformers to compare with: what mixes what."""

import pytest
import torch

from omnissm.timeseries import create_model
from omnissm.timeseries.windows import WindowBatch


def make_batch(x):
    mask = torch.ones_like(x, dtype=torch.bool)
    y = torch.zeros(*x.shape[:2], 6)
    given = ("x", "x_mask", "y", "y_mask", "series", "origin")
    rest = {name: None for name in WindowBatch._fields if name not in given}
    place = torch.zeros(len(x), dtype=torch.long)
    return WindowBatch(x=x, x_mask=mask, y=y, y_mask=y.bool(), series=place, origin=place, **rest)


def create(name, **options):
    torch.manual_seed(0)
    return create_model(name, lookback=32, horizon=6, n_variates=3, d_model=16, n_heads=2, **options).eval()


def test_patches_see_their_own_variate_only():
    model, x = create("patch_tst"), torch.randn(2, 3, 32)
    changed = x.clone()
    changed[:, 0] += torch.randn(2, 32)
    before, after = model(make_batch(x)), model(make_batch(changed))
    torch.testing.assert_close(after[:, 1:], before[:, 1:], rtol=0, atol=1e-6)
    assert (after[:, 0] - before[:, 0]).abs().max() > 0.01


def test_variates_as_tokens_have_no_order():
    model, x, order = create("i_transformer"), torch.randn(2, 3, 32), [2, 0, 1]
    torch.testing.assert_close(model(make_batch(x[:, order])), model(make_batch(x))[:, order], rtol=0, atol=1e-5)
    changed = x.clone()
    changed[:, 0] = torch.randn(2, 32)
    assert (model(make_batch(changed)) - model(make_batch(x)))[:, 1].abs().max() > 1e-3


def test_order_of_patches_counts():
    model, x = create("patch_tst", patch_len=8, stride=8), torch.randn(1, 1, 32)
    swapped = torch.cat([x[..., 8:16], x[..., :8], x[..., 16:]], dim=-1)
    assert (model(make_batch(x)) - model(make_batch(swapped))).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["patch_tst", "i_transformer"])
def test_says_what_is_wrong(name):
    with pytest.raises(ValueError, match="multiple of n_heads"):
        create_model(name, lookback=32, horizon=6, n_variates=3, d_model=15, n_heads=4)
