"""Every model by name: shapes, gradients, weights and configuration around, 16 bits, what the verbs ask."""

import inspect

import pytest
import torch

from omnissm.genomics.models import MODELS, create_model, from_pretrained, is_supervised, save_pretrained
from omnissm.genomics.sequence import vocabulary

# What a class that is no preset needs.
NEEDED = {
    "hnet": {"arch_layout": ["m1", ["m1"], "m1"], "d_model": [32, 32], "ssm_cfg": {"d_state": 8}},
    "masked_dna": {"d_model": 32, "n_layer": 2, "strands": "equivariant", "mixer_options": {"d_state": 8}},
    "predictor": {"model": "hnet_tiny", "n_outputs": 3},
}
NEURAL = [name for name in MODELS if name != "markov"]
LARGEST = 3_000_000


def size(name):
    entry = MODELS[name]
    meta = create_model(name, device="meta", **NEEDED.get(name, {}))
    assert inspect.isclass(entry) or entry.__doc__
    return sum(p.numel() for p in meta.parameters())


SMALL = [name for name in NEURAL if size(name) < LARGEST]


def build(name):
    torch.manual_seed(0)
    return create_model(name, **NEEDED.get(name, {}))


def bases(model, *shape):
    ids = torch.from_numpy(vocabulary(model.vocabulary).bases)
    return ids[torch.randint(4, shape, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("name", SMALL)
def test_shapes_and_gradients(name):
    model = build(name)
    tokens = bases(model, 2, 40)
    y = model(tokens)
    width = model.config.get("n_outputs")
    assert y.shape == ((2, width) if is_supervised(name) else (2, 40, model.vocab_size))
    (y * torch.randn_like(y)).sum().backward()
    for label, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, label
            assert parameter.grad.isfinite().all(), label


@pytest.mark.parametrize("name", SMALL)
def test_folder_holds_everything(name, tmp_path):
    model = build(name).eval()
    tokens = bases(model, 1, 20)
    save_pretrained(model, tmp_path / "m")
    again = from_pretrained(tmp_path / "m")
    assert again.name == name
    torch.testing.assert_close(again(tokens), model(tokens))


@pytest.mark.parametrize("name", SMALL)
def test_sixteen_bits_stay_near(name):
    model = build(name).eval()
    tokens = bases(model, 1, 30)
    with torch.no_grad():
        expected = model(tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(tokens)
    assert got.isfinite().all()
    if not hasattr(model, "boundaries"):  # a boundary may move
        assert (got.float() - expected).square().mean().sqrt() < 0.1 * expected.square().mean().sqrt()


@pytest.mark.parametrize("name", NEURAL)
def test_attributes(name):
    model = create_model(name, device="meta", **NEEDED.get(name, {}))
    assert isinstance(model.is_causal, bool)
    assert model.strands in ("one", "equivariant")
    assert model.max_length is None or model.max_length > 0
    assert vocabulary(model.vocabulary).size <= model.vocab_size
    assert model.is_causal == (hasattr(model, "step") and not is_supervised(name))
