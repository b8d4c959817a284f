"""Weights in 8 bits: error bounds, sizes, files; observers, reordering and fake quantisation."""

import pytest
import torch
from torch import nn

from omnissm.ssmcore import SequenceModel, Stack, create_mixer
from omnissm.ssmcore.generate import generate
from omnissm.ssmcore.quantize import (
    QuantizedLinear,
    fake_quantize,
    load_quantized,
    model_bytes,
    observe,
    quantize,
    quantized_activations,
    reorder_,
    save_quantized,
)

OPTIONS = {"mamba2": {"headdim": 8, "d_state": 8}, "attention": {"nheads": 4}}


def build(seed: int = 0, tied: bool = True) -> SequenceModel:
    torch.manual_seed(seed)
    return SequenceModel(32, "m1T1", vocab_size=20, mixer_options=OPTIONS, tie_embeddings=tied).requires_grad_(False)


def test_a_layer_keeps_its_bounds():
    torch.manual_seed(0)
    linear = nn.Linear(50, 30).requires_grad_(False)
    linear.weight[3] = 0
    small, x = QuantizedLinear(linear), torch.randn(7, 50)
    assert small.q.dtype == torch.int8
    half = small.scale / 2
    assert (small.weight - linear.weight).abs().le(half[:, None] * (1 + 1e-5)).all()
    bound = half * x.abs().sum(1, keepdim=True)
    assert (small(x) - linear(x)).abs().le(bound + 1e-5).all()
    torch.testing.assert_close(small(x), nn.functional.linear(x, small.weight, linear.bias))
    assert small.weight[3].abs().max() == 0
    wide = nn.Linear(4096, 2).requires_grad_(False).half()  # q itself sums up to more than float16 has
    wide.weight.fill_(0.02)
    ones = torch.ones(1, 4096, dtype=torch.float16)
    torch.testing.assert_close(QuantizedLinear(wide)(ones), wide(ones), rtol=2e-3, atol=0)
    exact = nn.Linear(5, 4, bias=False).requires_grad_(False)
    exact.weight.copy_(torch.randint(-127, 128, (4, 5)) / 32)
    exact.weight[:, 0] = 127 / 32
    torch.testing.assert_close(QuantizedLinear(exact).weight, exact.weight, rtol=1e-6, atol=0)


def test_models_shrink_and_stay_close():
    model, ids = build(), torch.randint(20, (2, 30))
    small = quantize(model)
    names = [name for name, part in small.named_modules() if isinstance(part, QuantizedLinear)]
    assert names == [
        *(f"stack.blocks.{layer}.mixer.{kind}_proj" for layer in (0, 1) for kind in ("in", "out")),
        "stack.blocks.1.mlp.fc1",
        "stack.blocks.1.mlp.fc2",
    ]
    assert small.head.weight is small.embedding.weight
    weights = sum(model.get_submodule(name).weight.numel() for name in names)
    scales = sum(4 * small.get_submodule(name).out_features for name in names)
    assert model_bytes(small) == model_bytes(model) - 3 * weights + scales
    gap = (small(ids) - model(ids)).square().mean().sqrt() / model(ids).square().mean().sqrt()
    assert 0 < gap < 0.02
    logits, state = small.prefill(ids[:, :20])
    for place in range(20, 30):
        logits, state = small.step(ids[:, place], state)
    torch.testing.assert_close(logits, small(ids)[:, -1], rtol=1e-3, atol=1e-4)
    assert generate(small, ids[:, :4], 5).shape == (2, 5)
    assert all(isinstance(part, nn.Linear) for name, part in model.named_modules() if name in names)
    part = quantize(build(tied=False), skip=["*.mixer.*"])
    assert isinstance(part.stack.blocks[0].mixer.in_proj, nn.Linear)
    assert isinstance(part.head, QuantizedLinear)
    assert part(ids).isfinite().all()


@pytest.mark.parametrize("name", ["mamba", "mamba3", "hydra", "s5", "bidirectional", "lbmamba"])
def test_every_kind_of_mixer(name):
    torch.manual_seed(0)
    options = {"headdim": 8} if name in ("mamba3", "hydra") else {}
    if name == "bidirectional":
        options = {"tie": "projections", "mixer_options": {"headdim": 8}}
    stack = Stack(16, [{"mixer": name, **options}]).requires_grad_(False)
    small, x = quantize(stack), torch.randn(1, 9, 16)
    gap = (small(x) - stack(x)).square().mean().sqrt() / stack(x).square().mean().sqrt()
    assert 0 < gap < 0.02
    if name == "bidirectional":
        assert small.blocks[0].mixer.back.in_proj is small.blocks[0].mixer.ahead.in_proj


@pytest.mark.parametrize("tied", [True, False])
def test_files(tmp_path, tied):
    small, ids = quantize(build(tied=tied), skip=["*.fc2"]), torch.randint(20, (1, 9))
    save_quantized(small, tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    again = load_quantized(build(1, tied), tmp_path / "model.safetensors")
    assert torch.equal(again(ids), small(ids))
    assert (again.head.weight is again.embedding.weight) is tied
    size = (tmp_path / "model.safetensors").stat().st_size
    assert model_bytes(small) <= size < model_bytes(small) + 8000  # and a header
    other = SequenceModel(32, "m1", vocab_size=20, mixer_options=OPTIONS, tie_embeddings=tied)
    with pytest.raises(ValueError, match=r"has weights of stack\.blocks\.1"):
        load_quantized(other, tmp_path / "model.safetensors")
    wide = SequenceModel(48, "m1T1", vocab_size=20, mixer_options=OPTIONS, tie_embeddings=tied)
    with pytest.raises(ValueError, match="does not fit SequenceModel") as refused:
        load_quantized(wide, tmp_path / "model.safetensors")
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="has no int8 weights"):
        save_quantized(other, tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_quantized(other, tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent to write model\.safetensors to"):
        save_quantized(small, tmp_path / "absent" / "model.safetensors")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="text is no safetensors file: "):
        load_quantized(other, tmp_path / "text")
    with pytest.raises(ValueError, match="has no linear layer inside that is left to quantise"):
        quantize(nn.Sequential(nn.ReLU()))


MIXERS = {
    "mamba2": ("mamba2", {"headdim": 4, "d_state": 5, "ngroups": 2, "bias": True, "learnable_init_states": True}),
    "channels": ("mamba2", {"headdim": 4, "d_state": 5, "D_has_hdim": True, "d_ssm": 16}),
    "discrete": ("discrete_mamba2", {"nheads": 4, "ngroups": 1, "d_state": 5}),
    "per-head": ("discrete_mamba2", {"nheads": 4, "d_state": 5}),
}


@pytest.mark.parametrize("name", MIXERS)
def test_reordering_changes_nothing_but_the_order(name):
    torch.manual_seed(0)
    kind, options = MIXERS[name]
    mixer = create_mixer(kind, 16, **options, dtype=torch.float64).requires_grad_(False)
    for parameter in mixer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    with observe(mixer) as ranges:
        expected = mixer(x)
    assert "_scan" not in vars(mixer)
    maxima = ranges[".x"].maximum
    order = reorder_(mixer, maxima)
    assert order.sort().values.tolist() == list(range(mixer.d_ssm))
    assert order.tolist() != list(range(mixer.d_ssm))
    with observe(mixer) as after:
        torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after[".x"].maximum, maxima[order], rtol=1e-6, atol=0)
    heads = after[".x"].maximum.unflatten(0, (mixer.ngroups, -1, mixer.headdim))
    assert heads.diff(dim=-1).ge(-1e-6).all()
    assert heads.amax(-1).diff(dim=-1).ge(-1e-6).all()


def test_ranges_are_those_of_all_batches():
    torch.manual_seed(0)
    model, batches = build(), [torch.randint(20, (2, 12)) for _ in range(3)]
    seen = []
    handle = model.stack.blocks[1].mixer.in_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with observe(model, quantile=0.5) as ranges:
        for ids in batches:
            model(ids)
    handle.remove()
    found = ranges["stack.blocks.1.mixer.in_proj"]
    every = torch.cat(seen).flatten(0, 1).abs()
    assert torch.equal(found.maximum, every.amax(0))
    middle = torch.stack([one.flatten(0, 1).abs().median(0).values for one in seen])
    assert torch.equal(found.quantile, middle.amax(0))
    assert {f"stack.blocks.0.mixer.{part}" for part in "xBCy"} <= set(ranges)
    ids = batches[0]
    plain = model(ids)
    gaps = []
    for bits in (4, 8, 12):
        with quantized_activations(model, ranges | dict.fromkeys((), found), bits=bits):
            gaps.append((model(ids) - plain).square().mean().sqrt().item())
    assert torch.equal(model(ids), plain)
    with observe(model) as ranges:
        model(ids)
    with quantized_activations(model, ranges):
        assert 0 < (model(ids) - plain).square().mean().sqrt() < 0.05 * plain.square().mean().sqrt()
    assert torch.equal(model(ids), plain)
    with pytest.raises(ValueError, match=r"`quantile` must lie in \(0, 1\]"), observe(model, quantile=0):
        pass


def test_fake_quantisation():
    x = torch.linspace(-2, 2, 401, dtype=torch.float64, requires_grad=True)
    y = fake_quantize(x, 1.27)
    inside = x.abs() < 1.27
    assert ((y - x)[inside].abs() <= 0.005 + 1e-12).all()
    assert set(y.detach().unique().mul(100).round().tolist()) == set(range(-127, 128))
    y.sum().backward()
    assert torch.equal(x.grad[x.abs() != 1.27], inside.double()[x.abs() != 1.27])
    per_channel = fake_quantize(torch.tensor([[0.3, 0.3, 0.3]]), torch.tensor([3.0, 0.3, 0.0]), bits=2)
    torch.testing.assert_close(per_channel, torch.tensor([[0.0, 0.3, 0.0]]))
    with pytest.raises(ValueError, match="`bits` must be at least 2"):
        fake_quantize(x, 1.0, bits=1)


def test_what_cannot_be_reordered():
    with pytest.raises(TypeError, match="expected a Mamba2 or DiscreteMamba2, got Hydra"):
        reorder_(create_mixer("hydra", 8, headdim=8), torch.zeros(16))
    with pytest.raises(ValueError, match=r"`maxima` must be \(16,\)"):
        reorder_(create_mixer("mamba2", 8, headdim=8), torch.zeros(3))
