"""Parity of a bit string: Mamba-3 learns it, Mamba-2 does not, since only a state that can change its sign can count.

Trains both on strings of up to 16 bits (a minute on one core) and draws accuracy over training to parity.png.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from omnissm.ssmcore import create_mixer

STEPS, LENGTH, BATCH = 800, 16, 64


class Counter(nn.Module):
    """Two mixers on a stream of width 32, which reads bits and predicts the parity so far at each position."""

    def __init__(self, name: str, **options: float) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(2, 32), nn.Linear(32, 2)
        self.mixers = nn.ModuleList(create_mixer(name, 32, d_state=16, headdim=16, **options) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(32) for _ in range(3))

    def forward(self, bits: torch.Tensor) -> torch.Tensor:
        x = self.embed(bits)
        for norm, mixer in zip(self.norms, self.mixers):
            x = x + mixer(norm(x))
        return self.head(self.norms[-1](x))


def train(name: str, **options: float) -> list[float]:
    torch.manual_seed(0)
    model = Counter(name, **options)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, STEPS, pct_start=0.125)
    test, accuracy = torch.randint(2, (512, LENGTH)), []
    for step in range(STEPS):
        length = max(2, min(LENGTH, 2 * LENGTH * step // STEPS))  # longer strings over the first half
        bits = torch.randint(2, (BATCH, length))
        loss = F.cross_entropy(model(bits).flatten(0, 1), (bits.cumsum(1) % 2).flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 49:
            with torch.no_grad():
                accuracy.append((model(test)[:, -1].argmax(-1) == test.sum(1) % 2).float().mean().item())
    return accuracy


torch.set_num_threads(1)
for name, options in (("mamba3", {"rope_fraction": 1.0}), ("mamba2", {})):
    plt.plot(range(50, STEPS + 1, 50), accuracy := train(name, **options), label=name)
    print(f"{name} last-token accuracy {accuracy[-1]:.3f}")
plt.gca().set(xlabel="training step", ylabel=f"accuracy at {LENGTH} bits", ylim=(0, 1.05))
plt.legend()
plt.savefig("parity.png", dpi=150)
