"""The smallest H-Net learns more of coding sequence than any Markov order, and its boundaries find the codons."""

import math

import pytest
import torch

from omnissm.genomics.data.batch import SequenceBatch
from omnissm.genomics.data.synthetic import CODONS, codon_usage
from omnissm.genomics.models.markov import MarkovModel
from omnissm.genomics.tasks import CausalLM
from omnissm.ssmcore.chunking import ratio_loss
from omnissm.ssmcore.training import create_optimizer


def coding(bases, generator):
    """Sense codons drawn with unequal use, one after the other."""
    use = torch.from_numpy(codon_usage(0, 0.2)).float()
    codons = torch.tensor([list(codon.encode()) for codon in CODONS])
    return codons[torch.multinomial(use, bases // 3 + 1, replacement=True, generator=generator)].flatten()[:bases]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tiny_model_beats_markov_models_and_finds_codons():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    genome, held_out = coding(60_000, generator), coding(24_000, generator).view(-1, 240)
    markov = min(
        -MarkovModel(k, vocabulary="byte").fit([bytes(genome.tolist())], both_strands=False)
        .log_prob(held_out)[:, 1:].mean().item()
        for k in range(10)
    )  # fmt: skip
    task = CausalLM("hnet_tiny")
    steps = 240
    optimizer = create_optimizer(
        task, lambda groups: torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.05), task.lr_scales()
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, (k + 1) / 20) * (1 - 0.95 * k / steps))
    for _ in range(steps):
        starts = torch.randint(len(genome) - 240, (8,), generator=generator)
        tokens = torch.stack([genome[start : start + 240] for start in starts])
        nats, _, found = task.losses(SequenceBatch(tokens, torch.ones_like(tokens, dtype=torch.bool)))
        loss = nats.sum() / (8 * 239) + task.net.ratio_weight * ratio_loss(found[0], 3)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        nats = task.losses(SequenceBatch(held_out, torch.ones_like(held_out, dtype=torch.bool)))[0]
        chosen = task.net.boundaries(held_out)[0].mask[:, 60:].unflatten(1, (-1, 3)).flatten(0, 1).double()
    assert nats[:, :-1].mean().item() < markov
    rate = chosen.mean(0)
    assert rate.mean().item() == pytest.approx(1 / 3, abs=0.08)
    # Chi-square with 2 degrees of freedom against equal rates: its tail is exp(-x / 2).
    share = chosen.mean()
    chi_square = (len(chosen) * (rate - share) ** 2 / (share * (1 - share))).sum().item()
    assert math.exp(-chi_square / 2) < 1e-6
