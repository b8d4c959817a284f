"""What variants and reference share is read once: the same scores as from whole sequences, and fewer positions read."""

import numpy as np
import pytest
import torch

from omnissm.genomics import create_model, likelihood
from omnissm.genomics.intervals import Variant
from omnissm.genomics.likelihood import Scorer
from omnissm.genomics.reference import Reference
from omnissm.genomics.scoring import score_sequences, score_variants

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
    shared = score_variants(asked, genome, Scorer(model, batch_tokens=2000), **read)
    alone = score_variants(asked[:6], genome, Scorer(model, batch_tokens=1), **read)
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
        [Variant("c", at, SEQUENCE[at], alt) for alt in "ACGT" if alt != SEQUENCE[at]], genome, model, window=61
    )
    assert shapes == [
        (2, 31),
        (8, 30),
    ]  # start id and 30 bases of both strands; 31 bases, the last of them a target alone


def test_a_family_that_fails_is_read_whole(model, genome, monkeypatch):
    def fails(*_):
        raise RuntimeError("no")

    expected = score_variants(variants()[:4], genome, model, window=61)
    scorer = Scorer(model)
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
