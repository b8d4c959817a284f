"""Draw the matrices that Mamba-2, Hydra and attention multiply a sequence with, to mixing_matrix_NAME.png."""

import torch

from omnissm.ssmcore import Stack
from omnissm.ssmcore.analysis import draw_matrix, mixing_matrices, span_rank

torch.manual_seed(0)
names = ["mamba2", "hydra", "attention"]
options = {
    "mamba2": {"headdim": 32, "d_state": 16},
    "hydra": {"headdim": 32, "d_state": 16},
    "attention": {"nheads": 4, "rotary_dim": 8, "window": 24},
}
stack = Stack(64, names, mixer_options=options)
x = torch.randn(1, 64, 64)

for layer, found in mixing_matrices(stack, x).items():
    matrix = found.matrix[0]  # (h, l, l): weight of input s in output t, on this very input
    draw_matrix(matrix, names[layer]).savefig(f"mixing_matrix_{names[layer]}.png", dpi=120)
    error = (found.apply() - found.outputs).abs().max() / found.outputs.abs().max()
    ahead = matrix.triu(1).abs().sum() / matrix.abs().sum()
    rank = int(span_rank(found.matrix))
    print(f"{names[layer]}: error {error:.0e}, weight on later tokens {ahead:.3f}, {rank} independent heads")
