"""Speculative decoding: a small model drafts bytes, a large one checks them in one pass.

Both learn a multiplication table in words (two minutes on one core; `python examples/speculative.py 20` trains less)
and go on with it. The symbols are those of plain decoding; the time depends on how often the draft is right.
"""

import sys
import time

import torch
import torch.nn.functional as F

from omnissm.ssmcore import SequenceModel
from omnissm.ssmcore.generate import generate
from omnissm.ssmcore.speculative import speculate

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
LENGTH, NEW, WIDTHS = 64, min(STEPS, 200), (1, 1, 1, 1, 1, 1)

torch.set_num_threads(1)
lines = [f"{i:2d} times {j:2d} is {i * j:3d}\n" for i in range(1, 13) for j in range(1, 13)]
text = torch.tensor(list("".join(lines).encode()) * 3)


def train(width: int, layers: int, batch: int) -> SequenceModel:
    torch.manual_seed(0)
    options = {"d_state": 32, "headdim": 32}
    model = SequenceModel(width, layers, mixer="mamba2", mixer_options=options, vocab_size=256)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, STEPS + 1, pct_start=0.2)
    for _ in range(STEPS):
        start = torch.randint(len(text) - LENGTH, (batch, 1))
        ids = text[start + torch.arange(LENGTH + 1)]
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {loss.item():.2f} nats per byte")
    return model.eval()


large, small = train(768, 4, 4), train(128, 1, 16)
prompt = text[None, :100]
seconds = {"plain": [], "speculative": []}
for _ in range(3):
    start = time.perf_counter()
    plain = generate(large, prompt, NEW)
    seconds["plain"].append(time.perf_counter() - start)
    start = time.perf_counter()
    found = speculate(large, small, prompt, NEW, widths=WIDTHS)
    seconds["speculative"].append(time.perf_counter() - start)
print(f"identical: {torch.equal(plain, found.ids)}")
print(f"passes: {found.passes} for {NEW} bytes, {found.accepted:.2f} drafted bytes accepted in each")
plain, fast = (min(times) for times in seconds.values())
print(f"seconds: {plain:.2f} plain, {fast:.2f} speculative, {plain / fast:.2f} times as fast")
