"""Speculative decoding: the symbols of plain decoding, or draws from the same distribution, in fewer passes."""

import copy
import itertools

import pytest
import torch

from omnissm.ssmcore import SequenceModel
from omnissm.ssmcore.generate import generate, probabilities, sample
from omnissm.ssmcore.speculative import speculate

OPTIONS = {"mamba2": {"headdim": 8, "d_state": 4}, "attention": {"nheads": 2}, "discrete_mamba2": {"nheads": 2}}


def build(layers, seed: int, vocab: int = 7, spread: float = 1.0) -> SequenceModel:
    torch.manual_seed(seed)
    model = SequenceModel(16, layers, vocab_size=vocab, mixer_options=OPTIONS, dtype=torch.float64, init="normal")
    with torch.no_grad():
        model.embedding.weight.normal_(std=spread)
    return model.eval().requires_grad_(False)


MODEL = build(["mamba2", "attention", "discrete_mamba2"], 0)
DRAFT = build("m1", 1)
PROMPT = torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("widths", [(1,), (3, 2, 1), (2, 2, 2, 2), (7, 1)])
@pytest.mark.parametrize("draft", ["other", "attention", "itself"])
def test_greedy_symbols_are_those_of_plain_decoding(widths, draft, device):
    model, prompt = copy.deepcopy(MODEL).to(device), PROMPT.to(device)
    small = {"other": DRAFT, "attention": build("t1", 2), "itself": MODEL}[draft]
    small = copy.deepcopy(small).to(device)
    mask = torch.ones_like(prompt, dtype=torch.bool)
    mask[1, :3], mask[2, 4:] = False, False
    for length in (0, 1, 11):
        found = speculate(model, small, prompt, length, widths=widths, mask=mask)
        assert torch.equal(found.ids, generate(model, prompt, length, mask=mask))
    if draft == "itself":  # the best guess is always right
        assert found.accepted == len(widths)
        assert found.passes == -(-10 // (len(widths) + 1))
    else:
        assert 10 / (len(widths) + 1) <= found.passes <= 10


def test_stop_symbols_end_rows():
    plain = generate(MODEL, PROMPT, 12)
    for symbol in plain.unique().tolist():
        expected = generate(MODEL, PROMPT, 12, stop=[symbol], pad=5)
        found = speculate(MODEL, DRAFT, PROMPT, 12, stop=[symbol], pad=5)
        assert torch.equal(found.ids, expected)


@pytest.mark.parametrize("choice", [{}, {"top_k": 2}, {"top_p": 0.6, "temperature": 1.5}], ids=str)
def test_draws_have_the_distribution_of_the_model(choice):
    """All strings of three symbols, their probabilities by the chain rule, and how often they were drawn."""
    choice = {"temperature": 1.0} | choice
    model, draft = build(["mamba2", "attention"], 3, 3, 0.08), build("m1", 4, 3, 0.08)
    strings = torch.tensor(list(itertools.product(range(3), repeat=3)))
    prompt = torch.tensor([[0, 2]])
    logits = model(torch.cat([prompt.expand(27, -1), strings], dim=1))[:, 1:4]
    chances = probabilities(logits.flatten(0, 1), **choice).unflatten(0, (27, 3))
    expected = chances.gather(2, strings[..., None])[..., 0].prod(1)
    torch.testing.assert_close(expected.sum(), torch.tensor(1.0))
    count = 8000
    found = speculate(
        model, draft, prompt.expand(count, -1), 3, widths=(2, 2), generator=torch.Generator().manual_seed(0), **choice
    )
    seen = torch.bincount((found.ids * torch.tensor([9, 3, 1])).sum(1), minlength=27)
    assert not seen[expected == 0].any()
    possible = expected > 0
    assert expected.max() < 0.9
    chi2 = ((seen - count * expected)[possible].square() / (count * expected)[possible]).sum()
    freedom = int(possible.sum()) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations
    assert 0 < found.accepted < 2


def test_probabilities_are_what_sample_draws_from():
    logits = torch.randn(1, 5, generator=torch.Generator().manual_seed(0)).expand(20000, -1)
    for choice in ({"temperature": 0.7}, {"temperature": 2.0, "top_k": 3}, {"temperature": 1.0, "top_p": 0.5}):
        drawn = sample(logits, **choice, generator=torch.Generator().manual_seed(1))
        share = torch.bincount(drawn, minlength=5) / 20000
        expected = probabilities(logits[:1], **choice)[0]
        assert expected.sum().item() == pytest.approx(1)
        assert torch.equal(share > 0, expected > 0)
        torch.testing.assert_close(share, expected, rtol=0, atol=0.015)


def test_bad_input():
    with pytest.raises(ValueError, match="as many symbols, got 7 and 3"):
        speculate(MODEL, build("m1", 0, vocab=3), PROMPT.clamp(max=2), 2)
    with pytest.raises(ValueError, match="`widths` must be numbers of candidates"):
        speculate(MODEL, DRAFT, PROMPT, 2, widths=(2, 0))
    with pytest.raises(ValueError, match="`widths` must be at most the 7 symbols"):
        speculate(MODEL, DRAFT, PROMPT, 2, widths=(8,))
    with pytest.raises(ValueError, match="`temperature` must be at least 0"):
        speculate(MODEL, DRAFT, PROMPT, 2, temperature=-1)
    other = SequenceModel(16, "x1", vocab_size=7, mixer_options={"headdim": 8, "d_state": 4}, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"layer 0 \(Mamba3\) takes no trees"):
        speculate(other, DRAFT, PROMPT, 2)
