"""Load a published checkpoint, keep a prompt's state as a file, and go on from it.

With the path of a folder (config.json and model.safetensors, such as a download of state-spaces/mamba-130m-hf) that
model is loaded; else a small one with random weights is written and read.
"""

import sys

import torch

from omnissm.ssmcore import SequenceModel
from omnissm.ssmcore.cache import load_state, save_state
from omnissm.ssmcore.checkpoints import load_checkpoint, save_checkpoint
from omnissm.ssmcore.generate import generate

torch.manual_seed(0)
if len(sys.argv) > 1:
    folder = sys.argv[1]
else:
    folder = "random-mamba2"
    options = {"d_state": 16, "headdim": 16}
    save_checkpoint(SequenceModel(64, "m4", vocab_size=256, mixer_options=options), folder, "hf_mamba2")

model = load_checkpoint(folder).eval()
print(f"{sum(p.numel() for p in model.parameters())} parameters in {len(model.stack.blocks)} layers")

prompt = torch.tensor([list(b"In the beginning was ")]) % model.vocab_size
with torch.no_grad():
    _, state = model.prefill(prompt[:, :-1])
save_state(state, "prompt.safetensors")
print(f"state after {int(state.position)} symbols: {state.nbytes} bytes")

# From the file, and once more from the prompt itself: the same symbols.
resumed = generate(model, prompt[:, -1:], 20, state=load_state("prompt.safetensors"))
whole = generate(model, prompt, 20)
print("resumed equals whole:", torch.equal(resumed, whole))

# Two prompts of different lengths in one batch, padded on the left.
both = torch.cat([prompt, torch.cat([torch.zeros_like(prompt[:, :10]), prompt[:, :-10]], dim=1)])
mask = torch.ones_like(both, dtype=torch.bool)
mask[1, :10] = False
rows = generate(model, both, 20, mask=mask)
print("padded equals alone:", torch.equal(rows[1:], generate(model, prompt[:, :-10], 20)))
