"""Sequence models: symbols in, logits out, with a state."""

import dataclasses

import pytest
import torch
from torch import nn

from omnissm.ssmcore import SequenceModel, Stack

OPTIONS = {"mamba2": {"d_state": 8, "headdim": 4}, "attention": {"nheads": 2}}


def tiny(**options):
    torch.manual_seed(0)
    options = {"vocab_size": 11, "mixer_options": OPTIONS, "dtype": torch.float64, **options}
    return SequenceModel(8, "m1T1", **options)


def test_logits_and_state():
    model, ids = tiny(), torch.randint(11, (2, 9))
    whole = model(ids)
    assert whole.shape == (2, 9, 11)
    first, state = model.prefill(ids[:, :5])
    second, state = model.prefill(ids[:, 5:8], state)
    third, state = model.step(ids[:, 8], state)
    torch.testing.assert_close(torch.cat([first, second, third[:, None]], 1), whole)
    assert state.position.tolist() == [9, 9]
    embedded = model.embedding(ids)
    torch.testing.assert_close(model(inputs_embeds=embedded), whole)


def test_last_output_of_padded_rows():
    model, ids = tiny(), torch.randint(11, (3, 6))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1], [1] * 6]).bool()
    last, _ = model.prefill(ids, mask=mask, last_only=True)
    for row, (start, end) in enumerate([(0, 4), (3, 6), (0, 6)]):
        torch.testing.assert_close(last[row], model(ids[row : row + 1, start:end])[0, -1])
    torch.testing.assert_close(model.prefill(ids, last_only=True)[0], model(ids)[:, -1])


def test_vocabulary_is_padded_and_tied():
    model = tiny()
    assert model.embedding.weight.shape == (16, 8)
    assert model.head.weight is model.embedding.weight
    assert sum(1 for name, _ in model.named_parameters() if "head" in name) == 0
    loose = tiny(tie_embeddings=False)
    assert loose.head.weight is not loose.embedding.weight
    assert loose.embedding.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert tiny(pad_vocab_multiple=1).embedding.weight.shape == (11, 8)
    assert tiny(d_output=3)(torch.zeros(1, 2, dtype=torch.int64)).shape == (1, 2, 3)


def test_vectors_in_and_out():
    model = tiny(vocab_size=None, d_input=3, d_output=5)
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    y, state = model.prefill(x[:, :3])
    z, _ = model.step(x[:, 3], state)
    torch.testing.assert_close(torch.cat([y, z[:, None]], 1), model(x))
    assert model(x).shape == (2, 4, 5)


def test_normal_initialisation():
    model = SequenceModel(64, "m2", vocab_size=64, mixer_options={"headdim": 32}, init="normal")
    for part in model.modules():
        if isinstance(part, nn.Linear):
            assert part.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_half_precision_model_keeps_a_wide_stream():
    model = tiny().bfloat16()
    seen = []
    model.stack.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    assert model(torch.zeros(1, 3, dtype=torch.int64)).dtype == torch.bfloat16
    assert seen == [torch.float32]


@pytest.mark.parametrize("layers", ["m2", "m1t1m1", "s1T1"])
def test_stack_exports_with_any_length(layers):
    torch.manual_seed(0)
    stack = Stack(16, layers, mixer_options={"mamba2": {"d_state": 8, "headdim": 8}, "s4d": {"d_state": 8}}).eval()
    length = torch.export.Dim("length", min=2, max=2048)
    exported = torch.export.export(stack, (torch.randn(1, 20, 16),), dynamic_shapes=({1: length},)).module()
    for size in (2, 3, 255, 256, 257, 1000):
        x = torch.randn(1, size, 16)
        torch.testing.assert_close(exported(x), stack(x), rtol=1e-4, atol=1e-5)


class Prefill(nn.Module):
    """`prefill` as forward, which is what torch.export takes."""

    def __init__(self, stack):
        super().__init__()
        self.stack = stack

    def forward(self, x, state):
        return self.stack.prefill(x, state)


def static(part):
    """The tree of a state with nothing dynamic in it."""
    if isinstance(part, torch.Tensor):
        return None
    if isinstance(part, tuple):
        return tuple(static(one) for one in part)
    return [static(getattr(part, field.name)) for field in dataclasses.fields(part)]


def test_prefill_of_a_stack_exports_with_its_state():
    torch.manual_seed(0)
    layers = ["mamba2", {"mixer": "attention", "window": 5}, {"mixer": ["s4d", "attention"]}]
    options = {"mamba2": {"d_state": 8, "headdim": 8}, "s4d": {"d_state": 8}, "attention": {"nheads": 4, "kv_heads": 2}}
    stack = Stack(16, layers, mixer_options=options).eval().requires_grad_(False)
    x = torch.randn(2, 9, 16)
    _, state = stack.prefill(x)
    shapes = ({1: torch.export.Dim("length", min=2, max=2048)}, static(state))
    exported = torch.export.export(Prefill(stack), (x, state), dynamic_shapes=shapes).module()
    for size in (2, 3, 300):
        other = torch.randn(2, size, 16)
        got, after = exported(other, state)
        expected, last = stack.prefill(other, state)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stack.step(other[:, 0], after)[0], stack.step(other[:, 0], last)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tiny(d_input=3), "name one of vocab_size"),
        (lambda: tiny(vocab_size=None), "name one of vocab_size"),
        (lambda: tiny(init="xavier"), "must be 'default' or 'normal'"),
        (lambda: tiny()(), "either `x` or `inputs_embeds`"),
        (lambda: tiny()(torch.tensor([[3, 11]])), "symbols must lie in 0 to 10, got 11"),
        (lambda: tiny()(torch.tensor([[-1]])), "symbols must lie in 0 to 10, got -1"),
    ],
)
def test_wrong_requests(call, message):
    with pytest.raises(ValueError, match=message):
        call()
