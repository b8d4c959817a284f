"""Handwritten digits read pixel by pixel: four mixers compared on sequences of 64 to 1,024 positions.

Prints a table (seconds are those of one core) and writes it to digits_LENGTH.csv. The images of 8 x 8 pixels come with
scikit-learn; longer sequences are the same images drawn larger. A fifth of the images is kept for the test.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import nn

from omnissm.ssmcore import Stack
from omnissm.ssmcore.training import param_groups

MODELS = {
    "s4d": ("s4d", {"d_state": 32}),
    "s4 (ptd)": ("s4", {"d_state": 32, "init": "ptd"}),
    "s5": ("s5", {"d_state": 64}),
    "mamba2": ("mamba2", {"d_state": 32, "headdim": 16}),
}
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--length", type=int, choices=(64, 256, 576, 1024), default=64)
parser.add_argument("--epochs", type=int, default=15)
args = parser.parse_args()
try:
    from sklearn.datasets import load_digits
except ImportError:
    parser.error('scikit-learn is missing: pip install "omnissm[demo]"')

torch.set_num_threads(1)
pixels, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
scale = round((args.length / 64) ** 0.5)
images = (pixels.float() / 8 - 1).unflatten(1, (8, 8)).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
train, test = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).split([1437, 360])
table = ["mixer,accuracy,seconds,parameters,state"]
for name, (mixer, options) in MODELS.items():
    torch.manual_seed(0)
    stack = Stack(64, 2, mixer=mixer, mixer_options=options)
    model = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (-1, 1)), nn.Linear(1, 64), stack, nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.01), lr=4e-3)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, args.epochs * 29)
    start = time.process_time()
    for batch in (part for _ in range(args.epochs) for part in train[torch.randperm(len(train))].split(50)):
        loss = nn.functional.cross_entropy(model(images[batch]).mean(1), labels[batch])  # of the mean over positions
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - start
    with torch.no_grad():
        guess = torch.cat([model(images[part]).mean(1).argmax(-1) for part in test.split(50)])
    accuracy = (guess == labels[test]).float().mean().item()
    size = sum(p.numel() for p in model.parameters())
    table.append(f"{name},{accuracy:.3f},{seconds:.1f},{size},{stack.state_numel()}")
    print("".join(f"{cell:<12}" for cell in table[-1].split(",")), flush=True)
Path(f"digits_{args.length}.csv").write_text("\n".join(table) + "\n")
