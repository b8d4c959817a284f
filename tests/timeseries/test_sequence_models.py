"""What S-Mamba, SpaceTime, TSM2 and HiSS each claim."""

import numpy as np
import pytest
import torch

from omnissm.ssmcore.mixers.companion import companion_matrix, unit_norm
from omnissm.timeseries import Forecaster, create_model
from omnissm.timeseries.data import create_synthetic
from omnissm.timeseries.models.hiss import HierarchicalStack
from omnissm.timeseries.models.spacetime import ClosedLoop, preprocess
from omnissm.timeseries.windows import Windows


def windows(**options):
    return Windows(create_synthetic("sines", length=200, n_variates=3), 24, 6, **options)


def test_closed_loop_equals_explicit_feedback():
    torch.manual_seed(0)
    loop = ClosedLoop(3, 5)
    with torch.no_grad():
        loop.K.mul_(20)
    u = torch.randn(2, 9, 3)
    ahead, outputs, inputs = loop(u, 7)
    A, B = companion_matrix(unit_norm(loop.a)), unit_norm(loop.B)
    h, known = torch.zeros(2, 3, 5), []
    for t in range(9 + 6):
        v = u[:, t] if t < 9 else (loop.K * h).sum(-1)
        h = torch.einsum("dij,bdj->bdi", A, h) + B * v[..., None]
        known.append((loop.C * h).sum(-1))
        if t < 9:
            torch.testing.assert_close(inputs[:, t], (loop.K * h).sum(-1), rtol=1e-4, atol=1e-5)
    known = torch.stack(known, 1)
    torch.testing.assert_close(outputs, known[:, :9], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ahead, known[:, 8:], rtol=1e-4, atol=1e-5)


def test_differences_are_those_of_numpy():
    x = torch.randn(1, 12, 1)
    found = preprocess(x)[0].numpy()
    for order in (1, 2, 3):
        np.testing.assert_allclose(found[order:, order], np.diff(x[0, :, 0].numpy(), order), rtol=1e-4, atol=1e-5)
    mean = np.convolve(x[0, :, 0].numpy(), np.full(4, 0.25), "valid")
    np.testing.assert_allclose(found[3:, 4], x[0, 3:, 0].numpy() - mean, rtol=1e-4, atol=1e-5)


def test_spacetime_trains_on_more_than_the_horizon():
    model = create_model("spacetime", lookback=24, horizon=6, n_variates=3).train()
    batch = windows().get_batch(range(4))
    y, extra = model.forward_train(batch)
    assert y.shape == batch.y.shape
    assert extra > 0
    free = create_model("spacetime", lookback=24, horizon=6, n_variates=3, weights=(0, 0)).forward_train(batch)[1]
    assert free == 0


def test_tsm2_starts_as_a_chain():
    torch.manual_seed(0)
    model = create_model("tsm2", lookback=24, horizon=6, n_variates=3, patch_len=8, stride=4).eval()
    batch = windows().get_batch(range(2))
    seen = []
    for block in (*model.time, *model.variate):
        block.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        block.register_forward_hook(lambda _, __, y: seen.append(y))
    model(batch)
    outputs = dict(zip(("t0", "v0", "t1", "v1"), seen[1::2]))
    torch.testing.assert_close(seen[2], outputs["t0"].transpose(1, 2))  # the first variate mixer reads the time mixer
    torch.testing.assert_close(seen[4], outputs["v0"].transpose(1, 2))  # the second time mixer reads the variate mixer


@pytest.mark.parametrize("length", [20, 23])
def test_pieces_do_not_see_later_ones(length):
    torch.manual_seed(0)
    stack = HierarchicalStack(8, ratio=5, mixer_options={"d_state": 4}).eval()
    x = torch.randn(2, length, 8)
    y = stack(x)
    assert y.shape == (2, -(-length // 5), 8)
    changed = x.clone()
    changed[:, -5:] += 1
    again = stack(changed)
    torch.testing.assert_close(again[:, :-1], y[:, :-1])
    assert (again[:, -1] - y[:, -1]).abs().max() > 1e-3


def test_s_mamba_reads_covariates_as_tokens_and_drops_them():
    batch = windows().get_batch(range(2))
    model = create_model("s_mamba", lookback=24, horizon=6, n_variates=3, n_future=2).eval()
    one, other = (model(batch._replace(future=torch.full((2, 2, 30), value))) for value in (0.0, 1.0))
    assert one.shape == (2, 3, 6)
    assert (one - other).abs().max() > 1e-4
    with pytest.raises(ValueError, match="2 future covariates"):
        model(batch)


@pytest.mark.parametrize("name", ["s_mamba", "spacetime", "tsm2", "hiss"])
def test_learns_seasons_and_saves(name, tmp_path):
    ds = create_synthetic("sines", length=500, n_variates=2, noise=0.02)
    args = {"tsm2": {"patch_len": 8, "stride": 4, "n_layer": 1}}.get(name, {})
    model = Forecaster(name, lookback=24, horizon=6, model_args=args).fit(
        ds.isel(time=slice(0, 400)), max_epochs=3, lr=5e-3, progress=False
    )
    errors = model.evaluate(model.backtest(ds, start=400, progress=False), ("mse",), ())
    naive = Forecaster("last_value", lookback=24, horizon=6).fit(ds.isel(time=slice(0, 400)))
    assert float(errors["mse"]) < 0.5 * float(naive.evaluate(naive.backtest(ds, start=400), ("mse",), ())["mse"])
    again = Forecaster.load(model.save(tmp_path / "model"))
    assert float(abs(again.predict(ds)["mean"] - model.predict(ds)["mean"]).max()) < 1e-6
