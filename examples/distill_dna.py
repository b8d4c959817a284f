"""Distil a causal Transformer of DNA into `discrete_mamba2`, and into a hybrid that keeps its top heads.

The sequences are tandem repeats with mutations, so the Transformer learns to copy from a unit back. Three minutes on a
core; `python examples/distill_dna.py 10` runs a tenth of the steps.
"""

import sys

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from omnissm.ssmcore import SequenceModel
from omnissm.ssmcore.distill import head_scores, top_heads
from omnissm.ssmcore.training import Distillation, WarmupCosine
from omnissm.ssmcore.training.cli import quiet

PERCENT = int(sys.argv[1]) if len(sys.argv) > 1 else 100
LENGTH, BATCH, KEPT = 128, 16, 2


def tandem_repeats(rows: int, seed: int) -> torch.Tensor:
    """Bases 0 to 3, (rows, LENGTH): a random unit of 5 to 12 bases again and again, one base in 25 drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    period = torch.randint(5, 13, (rows, 1), generator=generator)
    bases = torch.randint(4, (rows, 12), generator=generator).gather(1, torch.arange(LENGTH) % period)
    mutated = torch.rand(rows, LENGTH, generator=generator) < 0.04
    return torch.where(mutated, torch.randint(4, bases.shape, generator=generator), bases)


def nats(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


torch.set_num_threads(1)
quiet()
pl.seed_everything(0, verbose=False)
held_out, train, chosen_on = (tandem_repeats(*of) for of in ((256, 1), (BATCH * 6 * PERCENT, 2), (64, 3)))
loader = DataLoader(TensorDataset(train), BATCH, shuffle=True)
teacher = SequenceModel(64, "T2", vocab_size=4, mixer_options={"nheads": 4, "rotary_dim": 16}, mlp_hidden=128)
optimizer = torch.optim.AdamW(teacher.parameters(), 3e-3)
schedule = WarmupCosine(optimizer, warmup=0.1, total_steps=len(loader))
for (ids,) in loader:
    nats(teacher, ids).backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
kept = top_heads(head_scores(teacher.eval(), lambda model: nats(model, chosen_on)), KEPT)
models = {"Transformer": teacher}
for name, keep in {"discrete_mamba2": {}, f"hybrid, {KEPT} heads": kept}.items():
    task = Distillation(teacher, keep=keep, optimizer=lambda groups: torch.optim.AdamW(groups, 3e-3))
    task.lr_scheduler = WarmupCosine
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    pl.Trainer(max_epochs=1, gradient_clip_val=1.0, accelerator="cpu", **off).fit(task, loader)
    models[name] = task.net.eval().requires_grad_(False)
for name, model in models.items():
    perplexity, best = (nats(one, held_out).exp().item() for one in (model, teacher))
    sizes = [model.prefill(torch.zeros(1, length, dtype=torch.long))[1].nbytes for length in (LENGTH, 4096)]
    print(f"{name}: perplexity {perplexity:.3f}, gap {perplexity - best:.3f}, state {sizes[0]:,} to {sizes[1]:,} bytes")
