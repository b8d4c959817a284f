"""Generation: equal to whole forward passes, to single prompts, to its own seed."""

import pytest
import torch

from omnissm.ssmcore import SequenceModel
from omnissm.ssmcore.generate import generate, sample, stream

LAYERS = [
    {"mixer": "mamba2", "d_state": 8, "headdim": 4},
    {"mixer": "attention", "nheads": 2, "rotary_dim": 4},
    {"mixer": "s4d", "d_state": 4},
    {"mixer": "attention", "nheads": 2, "window": 3},
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = SequenceModel(8, LAYERS, vocab_size=29, tie_embeddings=False, dtype=torch.float64)
    with torch.no_grad():
        model.embedding.weight.mul_(50)
        model.head.weight.mul_(5)  # logits far apart
    return model


def by_forward(model, ids, count):
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return ids[:, -count:]


def test_greedy_is_whole_forward_passes(model):
    ids = torch.randint(29, (3, 7))
    expected = by_forward(model, ids, 12)
    assert torch.equal(generate(model, ids, 12), expected)
    assert torch.equal(generate(model, ids, 12, chunk_size=2), expected)
    assert torch.equal(torch.stack(list(stream(model, ids, 12)), 1), expected)
    assert len(expected.unique()) > 5
    _, state = model.prefill(ids[:, :4])
    assert torch.equal(generate(model, ids[:, 4:], 12, state=state), expected)
    assert generate(model, ids, 0).shape == (3, 0)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_padded_prompts_go_on_as_single_ones(model, chunk_size):
    ids = torch.randint(29, (4, 7))
    spans = [(0, 7), (3, 7), (0, 2), (2, 6)]
    mask = torch.zeros(4, 7, dtype=torch.bool)
    for row, (start, end) in enumerate(spans):
        mask[row, start:end] = True
    got = generate(model, ids, 8, mask=mask, chunk_size=chunk_size)
    for row, (start, end) in enumerate(spans):
        assert torch.equal(got[row : row + 1], by_forward(model, ids[row : row + 1, start:end], 8))


def test_a_seed_repeats_itself(model):
    ids = torch.randint(29, (2, 4))

    def draw(seed, **options):
        return generate(model, ids, 20, temperature=3.0, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, top_k=1), by_forward(model, ids, 20))
    assert torch.equal(draw(1, top_p=1e-9), by_forward(model, ids, 20))


def test_sampling_has_the_right_frequencies():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20000, -1)
    generator = torch.Generator().manual_seed(0)

    def frequency(**options):
        return torch.bincount(sample(logits, temperature=1.0, generator=generator, **options), minlength=4) / 20000

    torch.testing.assert_close(frequency(), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.015, rtol=0)
    torch.testing.assert_close(frequency(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.015, rtol=0)
    # The first two reach 0.8 exactly; a little more needs the third.
    torch.testing.assert_close(frequency(top_p=0.79), torch.tensor([0.625, 0.375, 0, 0]), atol=0.015, rtol=0)
    expected = torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95
    torch.testing.assert_close(frequency(top_p=0.81), expected, atol=0.015, rtol=0)
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    drawn = torch.bincount(sample(logits, temperature=0.5, generator=generator), minlength=4) / 20000
    torch.testing.assert_close(drawn, squared / squared.sum(), atol=0.015, rtol=0)


def test_stop_symbols_end_rows(model):
    ids = torch.randint(29, (3, 7))
    whole = by_forward(model, ids, 12)
    stop = whole[0, 4].item()
    got = generate(model, ids, 12, stop=[stop], pad=28)
    for row in range(3):
        places = (whole[row] == stop).nonzero()
        end = int(places[0]) + 1 if len(places) else 12
        assert torch.equal(got[row, :end], whole[row, :end])
        assert (got[row, end:] == 28).all()
    assert generate(model, ids, 12, stop=range(29)).shape == (3, 1)


def test_repetition_penalty(model):
    ids = torch.randint(29, (2, 5))
    got = generate(model, ids, 20, repetition_penalty=1e6)
    for row in torch.cat(
        [ids[:, -1:] * 0 - 1, got], 1
    ):  # what has come before is never the choice while others are left
        assert len(set(row.tolist())) >= 15
    logits = model(ids)[0, -1]
    seen = torch.zeros(29, dtype=torch.bool).scatter(0, ids[0], True)
    punished = torch.where(seen, torch.where(logits > 0, logits / 1.5, logits * 1.5), logits)
    assert generate(model, ids, 1, repetition_penalty=1.5)[0, 0] == punished.argmax()


@pytest.mark.gpu
def test_recorded_steps_are_the_same(device):
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    model = SequenceModel(64, "m2T2", vocab_size=64, mixer_options={"headdim": 32}, device=device).requires_grad_(False)
    model.embedding.weight.mul_(50)
    ids = torch.randint(64, (4, 9), device=device)
    mask = torch.ones(4, 9, dtype=torch.bool, device=device)
    mask[1, :5] = mask[2, 6:] = False
    plain = generate(model, ids, 40, mask=mask, cuda_graph=False)
    assert torch.equal(generate(model, ids, 40, mask=mask), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": torch.zeros(3)}, r"must be \(b, l\) integers"),
        ({"ids": torch.zeros(1, 0, dtype=torch.int64)}, "with l >= 1"),
        ({"mask": torch.zeros(1, 3, dtype=torch.bool)}, "leaves a row without any symbol"),
        ({"max_new": -1}, "`max_new` must be at least 0"),
        ({"temperature": -1.0}, "`temperature` must be at least 0"),
        ({"temperature": float("nan")}, "`temperature` must be at least 0"),
        ({"top_k": 0}, "`top_k` must be at least 1"),
        ({"top_p": 0.0}, r"`top_p` must lie in \(0, 1\]"),
        ({"repetition_penalty": 0.0}, "must be positive"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1"),
        ({"cuda_graph": True}, "needs a CUDA device, the prompt is on 'cpu'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_requests(model, options, message):
    arguments = {"ids": torch.zeros(1, 3, dtype=torch.int64), "max_new": 2, **options}
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)
