"""What variants and reference share is read once: the same scores as from whole sequences, and fewer positions read."""

import weakref

import numpy as np
import pytest
import torch

from omnissm.genomics import create_model, likelihood
from omnissm.genomics.intervals import Variant
from omnissm.genomics.likelihood import Scorer
from omnissm.genomics.reference import Reference
from omnissm.genomics.scoring import score_sequences, score_variants
from omnissm.genomics.sums import RunningSums

RNG = np.random.default_rng(3)
SEQUENCE = "".join(RNG.choice(list("ACGT"), 300))
NAMES = ("llr", "llr_mean", "llr_fwd", "llr_rev", "ll_ref", "ll_alt", "llr_site")
TWO_STAGES = {
    "arch_layout": ["m1", ["T1m1", ["T1"], "m1"], "m1"],
    "d_model": [32, 32, 64],
    "d_intermediate": [None, 128, 128],
    "ssm_cfg": {"d_state": 8},
    "attn_cfg": {"num_heads": [2, 2, 2], "rotary_emb_dim": [8, 8, 8], "window_size": [7, 15, -1]},
    "target_ratios": [3.0, 2.0],
}
MODELS = {"hnet_tiny": {}, "hnet": TWO_STAGES, "hybridna_tiny": {"vocabulary": "acgt"}}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(0)
    return create_model(request.param, **MODELS[request.param]).double()


@pytest.fixture
def genome():
    return Reference.from_sequences(
        {"c": SEQUENCE, "ring": SEQUENCE[:90], "n": SEQUENCE[:70] + "NNN" + SEQUENCE[70:]}, circular=["ring"]
    )


def variants():
    found = []
    for chrom, places in (("c", (0, 100, 299)), ("ring", (0, 89)), ("n", (60,))):
        text = {"c": SEQUENCE, "ring": SEQUENCE[:90], "n": SEQUENCE[:70] + "NNN" + SEQUENCE[70:]}[chrom]
        for at in places:
            found += [Variant(chrom, at, text[at], alt) for alt in "ACGT" if alt != text[at]]
            found.append(Variant(chrom, at, text[at], text[at] + "GATTACA"))
            if at + 4 <= len(text):
                found.append(Variant(chrom, at, text[at : at + 4], text[at]))
    return found


@pytest.mark.parametrize("options", [{}, {"mode": "flank"}, {"share_window": 16, "placement": 0.3}])
def test_scores_are_those_of_whole_sequences(options, model, genome):
    asked = variants()
    read = {"window": 61, "scores": NAMES, "max_n_frac": 0.2, **options}
    whole = score_variants(asked, genome, Scorer(model, share_prefix=False), **read)
    shared = score_variants(asked, genome, Scorer(model, batch_tokens=2000, share_prefix=True), **read)
    alone = score_variants(asked[:6], genome, Scorer(model, batch_tokens=1, share_prefix=True), **read)
    assert set(whole.counts()) == {"ok"}
    for name in NAMES:  # the log-softmax is float32
        np.testing.assert_allclose(shared[name], whole[name], atol=1e-6 if name.startswith("llr") else 1e-4)
        np.testing.assert_allclose(alone[name], shared[name][:6], atol=1e-6 if name.startswith("llr") else 1e-4)
    assert shared["n_scored"].tolist() == whole["n_scored"].tolist()


def test_a_prefix_is_read_once(genome, monkeypatch):
    """Three alleles and the reference: half a window once, then four halves, for each strand."""
    torch.manual_seed(0)
    model = create_model("hnet_tiny")
    shapes = []
    prefill = model.prefill
    monkeypatch.setattr(
        model, "prefill", lambda tokens, *a, **k: shapes.append(tuple(tokens.shape)) or prefill(tokens, *a, **k)
    )
    monkeypatch.setattr(model, "forward", lambda tokens, mask=None: pytest.fail("read whole"))
    at = 150
    score_variants(
        [Variant("c", at, SEQUENCE[at], alt) for alt in "ACGT" if alt != SEQUENCE[at]],
        genome,
        Scorer(model, share_prefix=True),
        window=61,
    )
    assert shapes == [
        (2, 31),
        (8, 30),
    ]  # start id and 30 bases of both strands; 31 bases, the last of them a target alone


def test_a_family_that_fails_is_read_whole(model, genome, monkeypatch):
    def fails(*_):
        raise RuntimeError("no")

    expected = score_variants(variants()[:4], genome, model, window=61)
    scorer = Scorer(model, share_prefix=True)
    monkeypatch.setattr(scorer, "sums_after", fails)
    found = score_variants(variants()[:4], genome, scorer, window=61)
    assert found["status"].tolist() == expected["status"].tolist() == ["ok"] * 4
    np.testing.assert_allclose(found["llr"], expected["llr"], atol=1e-6)


def test_long_sequences_are_read_in_pieces(model, monkeypatch):
    texts = [SEQUENCE, SEQUENCE[:97], SEQUENCE[:33], "NN" + SEQUENCE[:40]]
    whole = score_sequences(texts, model, strands="both")
    for piece in (32, 33, 50):
        monkeypatch.setattr(likelihood, "PIECE", piece)
        np.testing.assert_allclose(score_sequences(texts, model, strands="both"), whole, atol=1e-5)


def test_what_is_not_finite_stays_in_its_ranges():
    values = np.array([[-1.0, -np.inf, -2.0, -3.0, np.nan, -5.0]], np.float32)  # of the last 6 of 8 positions
    scored = np.array([[True, True, True, True, True, True, False, True]])
    known = {(0, 3): -1.0, (3, 4): -np.inf, (4, 6): -5.0, (5, 5): 0.0, (0, 2): 0.0, (4, 8): -10.0, (1, 5): -np.inf}
    for ends, nats in known.items():
        assert RunningSums(values, scored).between(0, *ends) == (nats, scored[0, max(ends[0], 2) : ends[1]].sum())
    scored[0, 6] = True
    assert np.isnan(RunningSums(values, scored).between(0, 4, 8).nats)


@pytest.mark.parametrize("restrict", [None, "acgt"])
def test_sequences_of_no_and_of_one_base(restrict):
    scorer = Scorer(create_model("markov", order=2), restrict=restrict)
    texts = [b"ACGT", b"", b"A"]
    assert [len(values) for values in scorer.log_probs(texts)] == [4, 0, 1]
    sums = scorer.sums(texts, [[(0, 4)], [(0, 0)], [(0, 1)]])()
    assert [one.scored for (one,) in sums] == ([4, 0, 1] if restrict is None else [3, 0, 0])
    for values, (one,) in zip(scorer.log_probs(texts), sums):
        np.testing.assert_allclose(one.nats, np.nansum(values), atol=1e-6)


@pytest.mark.parametrize("name", ["hnet_tiny", "hybridna_tiny"])
def test_sums_are_those_of_the_log_probabilities(name, device):
    torch.manual_seed(0)
    scorer = Scorer(create_model(name, **MODELS[name]), device=device, share_prefix=True)
    texts = [SEQUENCE[:40].encode(), SEQUENCE[:25].encode(), b"NN" + SEQUENCE[:30].encode() + b"RN"]
    ranges = [[(0, 40), (20, 40), (7, 7)], [(3, 24)], [(0, 34), (1, 3)]]
    expected = [
        [(np.nansum(values[a:b]), (~np.isnan(values[a:b])).sum()) for a, b in spans]
        for values, spans in zip(scorer.log_probs(texts), ranges)
    ]
    prefixes = [texts[0][:20], b"", texts[2][:3]]
    rests = [(0, texts[0][20:]), (1, texts[1]), (2, texts[2][3:])]
    for found in (scorer.sums(texts, ranges)(), scorer.sums_after(prefixes, rests, ranges)()):
        for one, known in zip(found, expected):
            np.testing.assert_allclose([s.nats for s in one], [nats for nats, _ in known], atol=2e-4)
            assert [s.scored for s in one] == [count for _, count in known]


def test_the_next_batch_begins_before_the_last_is_read(genome, monkeypatch):
    torch.manual_seed(0)
    scorer = Scorer(create_model("hnet_tiny"), batch_tokens=130, share_prefix=False)
    order, begin = [], scorer.sums

    def told(sequences, ranges):
        order.append("begin")
        finish = begin(sequences, ranges)
        return lambda: order.append("end") or finish()

    monkeypatch.setattr(scorer, "sums", told)
    score_variants(variants()[:6], genome, scorer, window=61)
    assert order.count("begin") == order.count("end") > 3
    assert order[:3] == ["begin", "begin", "end"]
    assert order[-2:] == ["end", "end"]


def test_a_batch_that_does_not_fit_is_halved(genome, monkeypatch, caplog):
    torch.manual_seed(0)
    scorer = Scorer(create_model("hnet_tiny"), share_prefix=False)
    expected = score_variants(variants()[:6], genome, scorer, window=61)
    sizes, begin = [], scorer.sums

    def small(sequences, ranges):
        sizes.append(len(sequences))
        if len(sequences) > 3:
            raise torch.OutOfMemoryError("no room")
        return begin(sequences, ranges)

    held = []

    class Room:
        """What a failed batch had made."""

    def told(sequences, ranges):
        room = Room()
        assert all(reference() is None for reference in held)
        held.append(weakref.ref(room))
        return small(sequences, ranges)

    monkeypatch.setattr(scorer, "sums", told)
    found = score_variants(variants()[:6], genome, scorer, window=61)
    np.testing.assert_allclose(found["llr"], expected["llr"], atol=1e-4)
    assert max(size for size in sizes if size <= 3) > 1
    assert "halves are tried, which is slower: OutOfMemoryError: no room" in caplog.text


def test_whole_sequences_that_do_not_fit_are_read_in_halves(monkeypatch, caplog):
    """Other verbs than `score` take batches as large, and have no other way out."""
    torch.manual_seed(0)
    scorer = Scorer(create_model("hnet_tiny"), share_prefix=True)
    texts = [SEQUENCE[:length].encode() for length in (40, 31, 25, 40, 7)]
    known, vectors = scorer.log_probs(texts), scorer.embeddings(texts)
    sizes, encode = [], scorer._encode

    def small(sequences, **options):
        sizes.append(len(sequences))
        if len(sequences) > 2:
            raise torch.OutOfMemoryError("no room")
        return encode(sequences, **options)

    monkeypatch.setattr(scorer, "_encode", small)
    for found, expected in ((scorer.log_probs(texts), known), (scorer.embeddings(texts), vectors)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            np.testing.assert_allclose(one, other, atol=1e-4)
    assert sizes == 2 * [5, 2, 3, 1, 2]
    assert "a batch of 5 has no room, its halves are read, which is slower: no room" in caplog.text
    monkeypatch.setattr(scorer, "_encode", lambda *_, **__: small([b""] * 3))
    with pytest.raises(torch.OutOfMemoryError):
        scorer.log_probs(texts[:1])


def test_batches_are_larger_on_a_gpu(device):
    scorer = Scorer(create_model("hnet_tiny"), device=device)
    assert scorer.batch_tokens == (65_536 if device.type == "cpu" else 1_048_576)
    assert Scorer(scorer.model, batch_tokens=7).batch_tokens == 7
