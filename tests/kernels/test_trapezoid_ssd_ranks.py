"""Several ranks in the Triton path of `trapezoid_ssd`: the kernels for one position's ranks alone, and the whole op."""

import pytest
import torch

from omnissm.kernels import available_backends
from omnissm.kernels.testing import check_op, relative_error, run_with_gradients
from omnissm.kernels.trapezoid_ssd.spec import SPEC, make_inputs
from omnissm.kernels.trapezoid_ssd.spec import trapezoid_ssd as flat


@pytest.fixture(autouse=True)
def _where_triton_runs(device) -> None:
    if reason := available_backends(device)["triton"]:
        pytest.skip(reason)


def inputs_of(device, b=1, l=20, h=2, p=3, n=4, r=2, dtype=torch.float32, **options):  # noqa: E741
    generator = torch.Generator(device).manual_seed(0)
    options = {"x_rank": True} | options
    return make_inputs(b, l, h, p, n, r, dtype=dtype, device=device, generator=generator, **options)


def weights_of_ranks(gamma, beta, seq_idx, r):
    """a_ij, (b, l, h, r, r): gamma for j > i, else minus the beta of the next position of the sequence."""
    following = torch.cat([beta[:, 1:], torch.zeros_like(beta[:, :1])], 1)
    if seq_idx is not None:
        last = torch.cat([seq_idx[:, 1:] != seq_idx[:, :-1], torch.ones_like(seq_idx[:, :1], dtype=torch.bool)], 1)
        following = following.masked_fill(last[..., None], 0)
    later = torch.ones(r, r, dtype=torch.bool, device=gamma.device).triu(1)
    return torch.where(later, gamma[..., None, None], -following[..., None, None])


@pytest.mark.parametrize(
    ("sizes", "packed"),
    [((2, 3, 1, 1, 2), False), ((2, 2, 1, 3, 2), True), ((1, 70, 3, 5, 4), True), ((1, 9, 2, 40, 8), False)],
    ids=str,
)
def test_what_ranks_of_a_position_add(sizes, packed, device):
    """Products and outputs against the formula in torch, for groups and odd widths."""
    from omnissm.kernels.trapezoid_ssd.triton_ranks import outputs_of_ranks, products_of_ranks

    batch, length, p, n, r = sizes
    like = {"device": device, "dtype": torch.float64}
    B, C = (torch.randn(batch, length * r, 2, n, **like) for _ in range(2))
    B_bias, C_bias = (torch.randn(4, r, n, **like) for _ in range(2))
    products = products_of_ranks(B, C, B_bias, C_bias)
    keys, queries = (
        part.unflatten(1, (length, r)).repeat_interleave(2, dim=3) + bias.transpose(0, 1)
        for part, bias in ((B, B_bias), (C, C_bias))
    )
    expected = torch.einsum("blihn,bljhn->blihj", queries, keys)
    torch.testing.assert_close(products, expected.flatten(1, 2))

    x, partial = torch.randn(batch, length, 4, p, **like), torch.randn(batch, length * r, 4, p, **like)
    x_rank, gamma, beta = torch.randn(4, r, p, **like), *torch.rand(2, batch, length, 4, **like)
    seq_idx = (torch.rand(batch, length, device=device) < 0.3).cumsum(1) if packed else None
    found = torch.full_like(partial, float("nan"))
    outputs_of_ranks(x, x_rank, products, gamma, beta, seq_idx, partial, found)
    weights = weights_of_ranks(gamma, beta, seq_idx, r).movedim(3, 2)  # (b, l, i, h, j)
    added = torch.einsum("blihj,blhp,hjp->blihp", expected * weights, x, x_rank)
    torch.testing.assert_close(found, partial + added.flatten(1, 2))


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ({"l": 9, "r": 8, "h": 1, "s": 1, "packed": True}, torch.float64),
        ({"l": 17, "r": 5, "h": 1, "rotation": "half", "x_rank": False}, torch.float32),
        ({"l": 40, "r": 1, "h": 1, "rotation": "half", "regime": "strong", "state": False}, torch.float32),
        ({"l": 66, "r": 2, "h": 2, "n": 9, "s": 0, "parameters": False}, torch.bfloat16),
    ],
    ids=str,
)
def test_numbers_of_ranks(size, dtype, device):
    """Eight, one with factors of its own, and numbers that tiles are filled up for; over more than one chunk."""
    check_op(SPEC, {"b": 1, "p": 3, "n": 4} | size, "triton", dtype, device)


def test_rows_in_groups_and_twice_the_same_bits(device, monkeypatch):
    """Rows taken one by one give what all at once give; two runs are equal to the bit."""
    from omnissm.kernels.trapezoid_ssd import triton_impl

    inputs = inputs_of(device, b=2, l=5, h=1, packed=True)
    cotangents = {"y": torch.randn(2, 5, 2, 1, 3, device=device), "final_ssm": torch.randn_like(inputs["ssm"])}

    def run():
        return run_with_gradients(lambda **kw: flat(**kw, backend="triton"), inputs, SPEC.outputs, cotangents)

    expected, again = run(), run()
    monkeypatch.setattr(triton_impl, "_TURNED_BYTES", 1)
    monkeypatch.setattr(triton_impl, "_GRADIENT_BYTES", 1)
    monkeypatch.setattr(triton_impl, "_FILLING_BYTES", 0)
    alone = run()
    for name, value in expected.items():
        assert torch.equal(again[name], value), name
        assert relative_error(alone[name], value) < 1e-6, name


def test_ranks_of_a_position_see_each_other_and_nothing_later(device):
    """An input of any rank reaches every rank of its own position, and none before it."""
    inputs = inputs_of(device, l=3, h=1, dtype=torch.float64, state=False)
    x_rank, x = inputs["x_rank"].clone(), inputs["x"].clone().requires_grad_()
    for j in range(2):
        inputs["x_rank"] = torch.zeros_like(x_rank)
        inputs["x_rank"][:, j] = x_rank[:, j]
        y = flat(**inputs | {"x": x}, backend="triton")[0]
        for i in range(2):
            (reach,) = torch.autograd.grad(y[0, 1, i].sum(), x, retain_graph=True)
            assert (reach[0, :2].abs().amax((1, 2)) > 0).all()
            assert not reach[0, 2:].any()


def test_opcheck(device):
    """Schema, fake tensors and dynamic shapes of the custom ops with ranks."""
    from omnissm.kernels.trapezoid_ssd.triton_impl import _backward, _forward

    inputs = inputs_of(device, l=3, h=1)
    names = ("x", "log_decay", "gamma", "beta", "theta", "B", "C", "ssm", "phi", "B_bias", "C_bias", "D", "x_rank")
    tensors = [inputs[name].flatten(1, 2) if name in "BC" else inputs[name] for name in names]
    arguments = (*tensors, None, False)
    torch.library.opcheck(_forward, (*arguments, 0, 0))
    y, final, _ = _forward(*arguments, 0, 0)
    torch.library.opcheck(_backward, (*arguments, torch.randn_like(y), torch.randn_like(final), None, None, 0, 0, 0))


def test_vmap_of_gradients(device):
    """Per-sample gradients, of what rows share too, are those of each sample alone."""
    rows = [inputs_of(device, l=3, h=1, p=2, state=False) for _ in range(2)]
    rows[1] = {name: 0.5 * value if torch.is_tensor(value) else value for name, value in rows[1].items()}
    names = [name for name in rows[0] if torch.is_tensor(rows[0][name])]

    def loss(*tensors):
        return flat(**dict(zip(names, tensors)), backend="triton")[0].square().sum()

    gradient = torch.func.grad(loss, argnums=tuple(range(len(names))))
    each = torch.func.vmap(gradient)(*(torch.stack([row[name] for row in rows]) for name in names))
    alone = zip(*(gradient(*(row[name] for name in names)) for row in rows))
    for name, found, expected in zip(names, each, alone):
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5, msg=name)
