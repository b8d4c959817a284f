"""grid_scan against other scans, and what the mathematics says of it; check_op runs in test_every_op."""

import pytest
import torch

from omnissm.kernels import available_backends, dag_order, dag_scan, grid_scan, selective_scan
from omnissm.kernels.scan2d.spec import GRID_SPEC, make_grid_inputs
from omnissm.kernels.testing import check_op, relative_error


def inputs_of(**size):
    sizes = {"b": 2, "i": 4, "j": 5, "d": 3, "n": 2} | size
    return make_grid_inputs(**sizes, dtype=torch.float64, device="cpu", generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rule", ["mean", "separable"])
@pytest.mark.parametrize("flip", [(), ("i",), ("j",), ("i", "j")])
@pytest.mark.parametrize(("i", "j"), [(17, 3), (2, 33)])
def test_matches_reference(i, j, flip, rule, device):
    size = {"b": 2, "i": i, "j": j, "d": 3, "n": 4, "rule": rule, "flip": flip}
    check_op(GRID_SPEC, size, "chunked", torch.float32, device)


@pytest.mark.parametrize("rule", ["mean", "separable"])
def test_one_row_is_the_selective_scan(rule):
    inputs = inputs_of(i=1, rule=rule)
    x, dt, B, C = (inputs[name][:, 0] for name in ("x", "dt1", "B1", "C"))
    y, _ = selective_scan(x, dt, inputs["A1"], B, C, inputs["D"])
    assert relative_error(grid_scan(**inputs)[:, 0], y) < 1e-12


def test_mean_is_the_scan_of_the_grid_as_a_dag():
    rows, columns = 3, 4
    inputs = inputs_of(b=1, i=rows, j=columns, d=1, n=1, skip=False)
    cell = torch.arange(rows * columns).view(rows, columns)
    along = torch.stack([cell[:, :-1].flatten(), cell[:, 1:].flatten()])
    down = torch.stack([cell[:-1].flatten(), cell[1:].flatten()])
    edge_index = torch.cat([along, down], dim=1)
    left, above = torch.full((2, rows, columns), 0.5, dtype=torch.float64)
    left[0], above[0] = 1, 0
    left[1:, 0], above[1:, 0] = 0, 1
    x, dt1, dt2, B1, B2 = (inputs[name].flatten() for name in ("x", "dt1", "dt2", "B1", "B2"))
    source = (left.flatten() * dt1 * B1 + above.flatten() * dt2 * B2) * x
    weights = [
        (left[:, 1:] * torch.exp(dt1.view(rows, columns)[:, 1:] * inputs["A1"])).flatten(),
        (above[1:] * torch.exp(dt2.view(rows, columns)[1:] * inputs["A2"])).flatten(),
    ]
    y = dag_scan(
        source[:, None, None],
        torch.cat(weights)[:, None],
        torch.ones(rows * columns, 1, 1, dtype=torch.float64),
        inputs["C"].view(-1, 1, 1),
        edge_index,
        dag_order(edge_index, rows * columns),
        signed=True,
    )
    assert relative_error(grid_scan(**inputs).flatten(), y.flatten()) < 1e-12


def test_separable_with_constant_steps_is_a_product_of_two_scans():
    inputs = inputs_of(b=1, d=1, n=1, rule="separable", skip=False)
    for name in ("dt1", "B1", "C"):
        inputs[name] = torch.full_like(inputs[name], 0.7)
    decay = torch.exp(0.7 * inputs["A1"]).item()

    def powers(size):
        step = torch.arange(size, dtype=torch.float64)
        return torch.where(step[:, None] >= step, decay ** (step[:, None] - step).clamp(min=0), 0)

    expected = 0.7**3 * powers(4) @ inputs["x"][0, ..., 0] @ powers(5).T
    assert relative_error(grid_scan(**inputs)[0, ..., 0], expected) < 1e-12


def test_flip_is_the_scan_of_the_flipped_grid():
    inputs = inputs_of()
    turned = {name: t.flip(1) if torch.is_tensor(t) and t.dim() == 4 else t for name, t in inputs.items()}
    torch.testing.assert_close(grid_scan(**turned | {"flip": ("i",)}).flip(1), grid_scan(**inputs))


def test_triton_cuts_the_grid_as_it_likes(device, monkeypatch):
    if reason := available_backends(device)["triton"]:
        pytest.skip(reason)
    from importlib import import_module

    triton_impl = import_module("omnissm.kernels.scan2d.triton_impl")
    replay = import_module("omnissm.kernels.replay")
    size = {"b": 2, "i": 3, "j": 5, "d": 3, "n": 2}
    tile = triton_impl.Tile
    cuts = ((tile(1, 2, 2, 2, 2, 2, 2), 1), (tile(2, 1, 1, 4, 2, 1, 1), 1), (tile(2, 1, 1, 2, 1, 2, 3), 2))
    for cut, passes in cuts:
        monkeypatch.setattr(triton_impl, "tile_of", lambda *_, cut=cut: cut)
        monkeypatch.setattr(triton_impl, "_passes", lambda *_, passes=passes: passes)
        replay.forget()
        check_op(GRID_SPEC, size, "triton", torch.float32, device)
    replay.forget()


def test_wrong_arguments():
    inputs = inputs_of()
    with pytest.raises(ValueError, match=r"`rule` must be one of 'mean', 'separable'"):
        grid_scan(**inputs | {"rule": "max"})
    with pytest.raises(ValueError, match="takes no `dt2`"):
        grid_scan(**inputs | {"rule": "separable"})
    with pytest.raises(ValueError, match="needs `A2`"):
        grid_scan(**inputs | {"A2": None})
    with pytest.raises(ValueError, match="`flip` must be"):
        grid_scan(**inputs | {"flip": ("k",)})
    with pytest.raises(ValueError, match="at least one row"):
        grid_scan(**inputs_of(i=0))
