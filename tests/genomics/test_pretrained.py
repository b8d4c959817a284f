"""Models that come with the package."""

import numpy as np
import pytest

from omnissm.genomics import Reference, from_pretrained, pretrained_models
from omnissm.genomics.data import synthetic_genome
from omnissm.genomics.evaluation import evaluate_model
from omnissm.genomics.intervals import Interval
from omnissm.genomics.loading import load_model, load_scorer
from omnissm.genomics.models import PACKAGED


def test_names_and_sizes():
    assert pretrained_models() == ["dnahnet_debug_ecoli", "markov5_ecoli"]
    for name in pretrained_models():
        files = {path.name: path.stat().st_size for path in (PACKAGED / name).iterdir()}
        assert set(files) == {"README.md", "config.json", "model.safetensors", "vocabulary.json"}
        assert max(files.values()) < 6_000_000
        assert f'from_pretrained("{name}")' in (PACKAGED / name / "README.md").read_text()


def test_a_name_is_found_without_network(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = from_pretrained("dnahnet_debug_ecoli")
    assert sum(p.numel() for p in model.parameters()) == 1_436_848
    assert not model.training
    other = load_model("dnahnet_debug_ecoli")
    assert all((a == b).all() for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(FileNotFoundError, match="dnahnet_debug_ecoli"):
        load_model("dnahnet_debug_coli")


def test_random_bases_cost_two_bits_and_more():
    """No model can do better on random bases: one that did would see what it predicts."""
    text = "".join(np.random.default_rng(0).choice(list("ACGT"), 4000))
    genome = Reference.from_sequences({"r": text})
    found = evaluate_model(load_scorer("dnahnet_debug_ecoli"), genome, [Interval("r", 0, 4000)], window=1024)
    assert 2.0 < found.bits_per_base < 2.3


def test_bases_to_come_change_nothing():
    sequence, _ = synthetic_genome(1200)
    changed = sequence[:700] + sequence[:499:-1][:500]
    first, second = load_scorer("dnahnet_debug_ecoli").log_probs([sequence, changed])
    np.testing.assert_allclose(first[:700], second[:700], atol=1e-5)
    assert np.abs(first[700:] - second[700:]).max() > 0.1


def test_held_out_part_of_the_genome(shared_data):
    genome = Reference(shared_data / "genomics" / "ecoli_k12_mg1655" / "ecoli_k12_mg1655.fna.gz")
    places = [Interval("U00096.2", start, start + 2048) for start in range(4_200_000, 4_600_000, 100_000)]
    found = evaluate_model(load_scorer("dnahnet_debug_ecoli"), genome, places, window=2048)
    assert found.bits_per_base < 1.9
