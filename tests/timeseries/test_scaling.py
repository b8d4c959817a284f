import json

import numpy as np
import pytest
import torch

from omnissm.timeseries.frames import from_numpy
from omnissm.timeseries.scaling import STATISTICS, Scaler, create_scaler
from omnissm.timeseries.schema import canonical


@pytest.fixture
def ds():
    rng = np.random.default_rng(0)
    values = rng.gamma(2.0, size=(2, 50, 3)) * np.array([1.0, 100.0, 0.01]) + np.array([0.0, 1000.0, -3.0])
    values[0, 5:9, 1] = np.nan
    return canonical(from_numpy(values, series=["north", "south"], variates=["a", "b", "c"]))


def test_statistics_per_series_and_variate_of_observed_values(ds):
    values = ds["target"].to_numpy().astype(np.float64)
    expected = {
        "standard": (np.nanmean(values, 1), np.nanstd(values, 1)),
        "robust": (np.nanmedian(values, 1), np.nanpercentile(values, 75, 1) - np.nanpercentile(values, 25, 1)),
        "minmax": (np.nanmin(values, 1), np.nanmax(values, 1) - np.nanmin(values, 1)),
        "none": (np.zeros((2, 3)), np.ones((2, 3))),
    }
    for kind, (center, scale) in expected.items():
        scaler = create_scaler(kind).fit(ds)
        np.testing.assert_allclose(scaler.center, center, rtol=1e-12)
        np.testing.assert_allclose(scaler.scale, scale, rtol=1e-12)


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("shared", [False, True])
def test_inverse_is_exact(ds, kind, shared):
    values = ds["target"].to_numpy()
    scaler = create_scaler(kind, shared=shared).fit(ds)
    np.testing.assert_allclose(scaler.inverse(scaler.transform(values)), values, rtol=1e-6)
    double = values.astype(np.float64)
    np.testing.assert_allclose(scaler.inverse(scaler.transform(double)), double, rtol=1e-12)


def test_standard_gives_zero_mean_and_unit_population_deviation(ds):
    z = create_scaler().fit(ds).transform(ds["target"].to_numpy().astype(np.float64))
    np.testing.assert_allclose(np.nanmean(z, axis=1), 0.0, atol=1e-10)
    np.testing.assert_allclose(np.nanstd(z, axis=1), 1.0, rtol=1e-10)


def test_log1p_is_the_logarithm_and_odd():
    ds = canonical(from_numpy(np.array([[0.0], [1.0], [-1.0], [1e6]])))
    z = create_scaler("log1p").fit(ds).transform(ds["target"].to_numpy())[0, :, 0]
    np.testing.assert_allclose(z, [0.0, np.log(2), -np.log(2), np.log1p(1e6)], rtol=1e-6)


def test_constant_and_empty_variates_get_scale_one():
    values = np.stack([np.full(10, 7.0), np.full(10, np.nan), np.arange(10.0)], axis=1)
    ds = canonical(from_numpy(values))
    for kind in STATISTICS:
        scaler = create_scaler(kind).fit(ds)
        assert scaler.scale[0, :2].tolist() == [1.0, 1.0]
        assert np.isfinite(scaler.center).all()


def test_batches_pick_the_numbers_of_their_series(ds):
    scaler = create_scaler().fit(ds)
    values = ds["target"].to_numpy()
    batch = np.stack([values[1, :5].T, values[0, 20:25].T])  # (b, variate, time)
    scaled = scaler.transform(batch, [1, 0], axis=1)
    np.testing.assert_allclose(scaled[0].T, scaler.transform(values)[1, :5], rtol=1e-6)
    np.testing.assert_allclose(scaled[1].T, scaler.transform(values)[0, 20:25], rtol=1e-6)


def test_tensors_keep_gradient_and_agree_with_arrays(ds):
    values = np.nan_to_num(ds["target"].to_numpy())
    for kind in STATISTICS:
        scaler = create_scaler(kind).fit(ds)
        tensor = torch.tensor(values, requires_grad=True)
        out = scaler.inverse(scaler.transform(tensor))
        out.sum().backward()
        np.testing.assert_allclose(tensor.grad.numpy(), 1.0, rtol=1e-4)
        np.testing.assert_allclose(
            scaler.transform(tensor).detach().numpy(), scaler.transform(values), rtol=1e-4, atol=1e-4
        )


def test_state_survives_json_exactly(ds):
    scaler = create_scaler("robust").fit(ds)
    again = Scaler.from_dict(json.loads(json.dumps(scaler.to_dict())))
    np.testing.assert_array_equal(again.center, scaler.center)
    np.testing.assert_array_equal(again.scale, scaler.scale)
    assert again.to_dict() == scaler.to_dict()


def test_rows_match_series_by_name(ds):
    scaler = create_scaler().fit(ds)
    assert scaler.rows(ds.isel(series=[1])).tolist() == [1]
    assert scaler.rows(ds.isel(series=[1, 0])).tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"'west' was not in the training data.*`scaler_shared: true`"):
        scaler.rows(ds.assign_coords(series=["north", "west"]))
    with pytest.raises(ValueError, match="Select and order them"):
        scaler.rows(ds.isel(variate=[1, 0, 2]))
    assert create_scaler(shared=True).fit(ds).rows(ds.assign_coords(series=["x", "y"])).tolist() == [0, 0]


def test_wrong_use_is_named(ds):
    with pytest.raises(ValueError, match="Did you mean 'standard'"):
        create_scaler("standrd")
    with pytest.raises(ValueError, match="not fitted"):
        create_scaler().transform(np.zeros((1, 2, 3)))
    scaler = create_scaler().fit(ds)
    with pytest.raises(ValueError, match="2 variates at axis 2, the scaler was fitted on 3: a, b, c"):
        scaler.transform(np.zeros((2, 5, 2)))
    with pytest.raises(ValueError, match="5 series"):
        scaler.transform(np.zeros((5, 5, 3)))
