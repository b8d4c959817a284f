"""HierarchicalStack: chunks apart, what outputs depend on, padding in front, and going on."""

import pytest
import torch

from omnissm.ssmcore.hiss import HierarchicalStack

OPTIONS = {"mamba2": {"d_state": 4, "headdim": 4}}


def build(**options):
    torch.manual_seed(0)
    sizes = {"chunk": 4, "low": "m1", "high": "m2", "d_low": 8, "d_high": 6 * 2, "mixer_options": OPTIONS}
    return HierarchicalStack(3, **sizes | options, dtype=torch.float64)


def test_chunks_do_not_see_each_other_below():
    model, x = build(), torch.randn(2, 12, 3, dtype=torch.float64)
    apart = torch.cat([model.features(part) for part in x.split(4, dim=1)], dim=1)
    torch.testing.assert_close(model.features(x), apart)
    assert model(x).shape == (2, 3, 12)


def test_outputs_depend_on_their_chunk_and_those_before():
    model, x = build(), torch.randn(1, 12, 3, dtype=torch.float64, requires_grad=True)
    assert model.causal
    (dx,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    assert dx[:, :8].abs().amax(-1).min() > 0
    assert not dx[:, 8:].any()


def test_odd_lengths_are_filled_with_zeros_in_front():
    model, x = build(), torch.randn(1, 10, 3, dtype=torch.float64)
    whole = torch.cat([torch.zeros(1, 2, 3, dtype=torch.float64), x], dim=1)
    torch.testing.assert_close(model(x), model(whole))


def test_prefill_goes_on_in_whole_chunks():
    model, x = build(), torch.randn(2, 12, 3, dtype=torch.float64)
    first, state = model.prefill(x[:, :4])
    second, _ = model.prefill(x[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), model(x))
    with pytest.raises(ValueError, match="expected whole chunks of 4 positions, got 6"):
        model.prefill(x[:, :6])


def test_gradients_and_refusals():
    model = build()
    model(torch.randn(2, 9, 3, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="`chunk` must be at least 1, got 0"):
        build(chunk=0)
    with pytest.raises(ValueError, match=r"`x` must be \(b, l, 3\)"):
        model(torch.zeros(2, 9, 4))
