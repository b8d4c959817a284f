"""`hydra_blocks`: a stack of Hydra blocks in one call against the blocks one by one, and what it leaves to these."""

import copy
import importlib

import pytest
import torch
from torch import nn

from omnissm.kernels import BackendError, HydraWeights, available_backends, hydra_blocks, use_backend
from omnissm.kernels.testing import relative_error
from omnissm.ssmcore import Hydra

EPS = 1e-6


@pytest.fixture(autouse=True)
def _triton(device):
    if reason := available_backends(device)["triton"]:
        pytest.skip(reason)
    with use_backend("triton"):
        yield


def build(device, depth=3, d=16, **options):
    """Blocks (norm, mixer) whose vectors are not what they start with."""
    torch.manual_seed(0)
    options = {"headdim": 8, "d_state": 8} | options
    blocks = [nn.ModuleList([nn.LayerNorm(d, EPS), Hydra(d, **options)]).to(device) for _ in range(depth)]
    for block in blocks:
        for parameter in block.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    return blocks


def weights_of(blocks):
    return [
        HydraWeights(
            norm.weight,
            norm.bias,
            mixer.in_proj.weight,
            mixer.conv1d.weight,
            mixer.conv1d.bias,
            mixer.dt_bias,
            mixer.A_log,
            mixer.fc_D.weight,
            mixer.D,
            mixer.norm.weight,
            mixer.out_proj.weight,
        )
        for norm, mixer in blocks
    ]


def stream(device, b, l, d):  # noqa: E741
    return torch.randn(b, l, d, device=device, generator=torch.Generator(device).manual_seed(1))


def run(x, weights, dtype=torch.bfloat16, headdim=8, d_state=8):
    with torch.no_grad(), torch.autocast(x.device.type, dtype):
        return hydra_blocks(x, weights, headdim=headdim, d_state=d_state, eps=EPS, gate_eps=1e-5)


@pytest.mark.parametrize(
    ("b", "l", "depth", "d", "dtype", "options"),
    [
        (2, 20, 3, 16, torch.bfloat16, {}),
        (1, 1, 2, 16, torch.float16, {}),
        (1, 70, 1, 16, torch.float16, {"headdim": 4, "d_state": 5, "ngroups": 2, "d_conv": 3}),
        (1, 257, 1, 8, torch.float16, {"headdim": 16, "d_state": 4}),
        (1, 290, 1, 8, torch.bfloat16, {"headdim": 4}),
        (1, 320, 1, 8, torch.bfloat16, {"headdim": 16}),  # whole tiles of rows
        (1, 384, 1, 8, torch.bfloat16, {"headdim": 16}),  # whole pieces
        pytest.param(
            *(1, 300, 1, 8, torch.float16, {"d_state": 16, "expand": 3, "ngroups": 3}), marks=pytest.mark.slow
        ),
    ],
)
def test_blocks_one_by_one(device, b, l, depth, d, dtype, options):  # noqa: E741
    blocks = build(device, depth, d, **options)
    x = stream(device, b, l, d)
    given = x.clone()
    y = run(x, weights_of(blocks), dtype, blocks[0][1].headdim, blocks[0][1].d_state)
    assert torch.equal(x, given)
    expected = x.double()
    with torch.no_grad(), use_backend("chunked"):
        for norm, mixer in copy.deepcopy(blocks):
            expected = expected + mixer.double()(norm.double()(expected))
    assert y.dtype == torch.float32
    assert relative_error(y - x, expected - x.double()) < (2e-2 if dtype == torch.bfloat16 else 3e-3)


@pytest.mark.parametrize("walkers", ["enough", "few"])
def test_states_of_long_rows_both_ways(device, walkers, monkeypatch):
    """Carried along a row by one program, or collected by piece and then summed, they are those of the recurrence."""
    pieces = importlib.import_module("omnissm.kernels.quasiseparable.triton_pieces")
    monkeypatch.setattr(pieces, "multiprocessors", lambda _: 1 if walkers == "enough" else 1000)
    test_blocks_one_by_one(device, 2, 390, 1, 8, torch.float16, {"d_state": 20, "headdim": 16})


def test_few_heads_share_maps(device):
    """Heads of a group are taken in turn: all of them, or as many as divide the group."""
    test_blocks_one_by_one(device, 1, 260, 1, 8, torch.bfloat16, {"headdim": 4, "ngroups": 4, "expand": 4})


def test_weights_anywhere_in_memory(device):
    blocks = build(device, 2)
    x, weights = stream(device, 1, 9, 16), weights_of(blocks)
    expected = run(x, weights)
    moved = []
    for block in weights:
        parts = []
        for one in block:
            flat = torch.empty(one.numel() + 1, device=device)[1:]  # at no multiple of 16 bytes
            parts.append(flat.copy_(one.detach().flatten()).view(one.shape))
        moved.append(HydraWeights(*parts))
    moved[1] = moved[1]._replace(in_proj=weights[1].in_proj.detach().mT.contiguous().mT)
    assert torch.equal(run(x, moved), expected)
    assert torch.equal(run(x.transpose(0, 1).contiguous().transpose(0, 1), weights), expected)


@pytest.mark.parametrize("case", ["transform", "wide", "parameters", "stream", "width", "class", "filter", "none"])
def test_what_goes_block_by_block(device, case):
    blocks = build(device, 1, 12 if case == "width" else 16, d_conv=1 if case == "filter" else 7)
    x, weights = stream(device, 1, 3, 12 if case == "width" else 16), weights_of(blocks)
    options = {"headdim": 8, "d_state": 8, "eps": EPS, "gate_eps": 1e-5}
    if case == "parameters":
        weights[0] = weights[0]._replace(D=weights[0].D.double())
    if case == "class":

        class Other(torch.Tensor):
            pass

        weights[0] = weights[0]._replace(D=weights[0].D.detach().as_subclass(Other))
    if case == "stream":
        x = x.bfloat16()
    found = []

    def call(x):
        found.append(hydra_blocks(x, [] if case == "none" else weights, **options))
        return x

    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, case != "wide"):
        torch.func.vmap(call)(x[None]) if case == "transform" else call(x)
    assert (found[0] is None) == (case != "filter")


def test_shapes_that_disagree(device):
    blocks = build(device, 2)
    x, weights = stream(device, 1, 3, 16), weights_of(blocks)
    wrong = [weights[0], weights[1]._replace(conv_bias=weights[1].conv_bias[1:])]
    with pytest.raises(ValueError, match=r"`conv_bias` of block 1 has shape \(63,\), expected \(64,\)"):
        run(x, wrong)
    with pytest.raises(ValueError, match="4 heads of 4 channels and maps of 8 states do not make up 32"):
        run(x, weights, headdim=4)
    with pytest.raises(ValueError, match="maps of 5 states"):
        run(x, weights, d_state=5)


def test_opcheck_and_compiled(device):
    from omnissm.kernels.quasiseparable.triton_blocks import hydra_blocks_triton

    blocks = build(device, 2)
    x, weights = stream(device, 1, 5, 16), weights_of(blocks)
    flat = [one.detach() for block in weights for one in block]
    torch.library.opcheck(hydra_blocks_triton, (x, flat, 8, 8, EPS, 1e-5, torch.bfloat16))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weights), run(x, weights))


@pytest.mark.parametrize(
    ("l", "depth", "dtype", "options", "scaled"),
    [
        (20, 2, torch.bfloat16, {}, False),
        (20, 2, torch.bfloat16, {}, True),
        (5, 1, torch.float16, {"headdim": 16, "d_state": 5, "ngroups": 2, "d_conv": 3}, False),
        (5, 1, torch.float16, {"headdim": 16, "d_state": 5, "ngroups": 2, "d_conv": 3}, True),
        (258, 1, torch.float16, {"headdim": 32, "d_state": 5}, False),
    ],
)
def test_gradients(device, l, depth, dtype, options, scaled):  # noqa: E741
    blocks = build(device, depth, **options)
    factors = [torch.tensor([0.5, 0.0, 2.0], device=device)[:, None, None], None] if scaled else [None, None]
    x, dy = stream(device, 3, l, 16).requires_grad_(), torch.linspace(-1, 1, 16, device=device)
    mixer = blocks[0][1]
    with torch.autocast(x.device.type, dtype):
        y = hydra_blocks(
            x, weights_of(blocks), headdim=mixer.headdim, d_state=mixer.d_state, eps=EPS, gate_eps=1e-5,
            scale=factors.__getitem__,
        )  # fmt: skip
    (y * dy).sum().backward()
    wide, total = copy.deepcopy(blocks), x.detach().double().requires_grad_()
    expected = total
    with use_backend("chunked"):
        for (norm, mixer), factor in zip(wide, factors):
            branch = mixer.double()(norm.double()(expected))
            expected = expected + (branch if factor is None else factor * branch)
    for parameter in (one for block in wide for one in block.parameters()):
        parameter.grad = None
    (expected * dy).sum().backward()
    limit = 4e-2 if dtype == torch.bfloat16 else 6e-3
    assert relative_error(y, expected) < limit
    assert relative_error(x.grad, total.grad) < limit
    for block, other in zip(blocks, wide, strict=True):
        for (name, one), two in zip(block.named_parameters(), other.parameters(), strict=True):
            assert one.grad.dtype == torch.float32
            assert relative_error(one.grad, two.grad) < limit, name


def test_gradients_of_later_steps(device):
    """From the third step on a block and its gradient are what was recorded in the second, with other tensors."""
    replay = importlib.import_module("omnissm.kernels.replay")
    blocks = build(device, 1, 8, headdim=16, d_state=5, d_conv=3)

    def step(seed):
        x = torch.randn(2, 5, 8, device=device, generator=torch.Generator(device).manual_seed(seed)).requires_grad_()
        blocks[0].zero_grad()
        scale = torch.tensor([0.5, 2.0], device=device)[:, None, None]
        with torch.autocast(x.device.type, torch.bfloat16):
            y = hydra_blocks(
                x, weights_of(blocks), headdim=16, d_state=5, eps=EPS, gate_eps=1e-5, scale=lambda _: scale
            )
        y.square().sum().backward()
        return [y.detach(), x.grad, *(one.grad for one in blocks[0].parameters())]

    expected = step(3)
    replay.forget()
    with replay.in_interpreter():
        found = [step(seed) for seed in (1, 2, 3)][-1]
        recorded = [one for one in replay._known.values() if type(one) is replay.Source]
    replay.forget()
    assert len(recorded) == 2
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_rates_learn_from_small_steps(device):
    """Steps near 1e-7, whose sum with one keeps no digit of them."""
    blocks = build(device, 1)
    mixer = blocks[0][1]
    with torch.no_grad():
        mixer.dt_bias.fill_(-16.5)
    x = 64 * stream(device, 2, 9, 16)
    with torch.autocast(x.device.type, torch.float16):
        y = hydra_blocks(x, weights_of(blocks), headdim=8, d_state=8, eps=EPS, gate_eps=1e-5)
    y.square().sum().backward()
    found, wide = mixer.A_log.grad.clone(), copy.deepcopy(blocks)
    with use_backend("chunked"):
        norm, other = wide[0]
        other.A_log.grad = None
        total = x.double() + other.double()(norm.double()(x.double()))
    total.square().sum().backward()
    assert relative_error(found, other.A_log.grad) < 3e-2


def test_gradients_of_gradients(device):
    blocks = build(device, 1)
    x = stream(device, 1, 3, 16).requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        y = hydra_blocks(x, weights_of(blocks), headdim=8, d_state=8, eps=EPS, gate_eps=1e-5)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(BackendError, match="no second derivative"):
        dx.sum().backward()
