"""One process of a group: cases of context parallelism on its segments, everything saved for the test to compare.

python tiny_distributed.py RANK WORLD FOLDER
"""

import sys

import torch
import torch.distributed as dist
from torch import nn

from omnissm.ssmcore import SequenceModel, Stack
from omnissm.ssmcore.distributed import SequenceRanks, prefill_in_turn, set_context_parallel
from omnissm.ssmcore.mixers import DiscreteMamba2, Mamba, Mamba2

LENGTH = 17  # no multiple of 2 or 3
WIDTH = 8
OPTIONS = {
    "mamba2": {"d_state": 4, "headdim": 4, "ngroups": 2, "chunk_size": 4},
    "mamba": {"d_state": 3},
    "attention": {"headdim": 4},
    "mamba3": {"d_state": 4, "headdim": 4},
}


def drawn(module: nn.Module, seed: int = 1) -> nn.Module:
    """The module in float64 with every parameter moved, so that none is zero or the same for all."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def at_once() -> dict[str, nn.Module]:
    """Modules whose segments are scanned at once."""
    torch.manual_seed(0)
    mamba2 = OPTIONS["mamba2"]
    pair = {"mixer": ["mamba2", "mamba"], "merge": "norm_mean"}
    modules = {
        "mamba2": Mamba2(WIDTH, **mamba2),
        "learned start": Mamba2(WIDTH, **mamba2, learnable_init_states=True, D_has_hdim=True, d_conv=2),
        "no convolution": Mamba2(WIDTH, **mamba2, d_conv=1),
        "discrete": DiscreteMamba2(WIDTH, d_state=4, nheads=2),
        "mamba": Mamba(WIDTH, d_state=3),
        "stack": Stack(WIDTH, ["mamba2", "mamba", pair, {"mixer": "gmu", "reads": 0}], mixer_options=OPTIONS),
    }
    return {name: drawn(module) for name, module in modules.items()}


def in_turn() -> dict[str, nn.Module]:
    """Modules whose states are handed over."""
    torch.manual_seed(0)
    stack = Stack(WIDTH, ["mamba2", "attention", "mamba3"], mixer_options=OPTIONS)
    model = SequenceModel(WIDTH, ["attention", "mamba2"], d_input=WIDTH, mixer_options=OPTIONS)
    return {"hybrid": drawn(stack), "model": drawn(model)}


def sequences() -> torch.Tensor:
    return torch.randn(4, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def start(module: nn.Module) -> object:
    """A state other than the first, where the module makes one."""
    with torch.no_grad():
        return module.prefill(sequences()[:, :5].flip(2).to(next(module.parameters()).device))[1]


def loss(y: torch.Tensor, ranks: SequenceRanks | None = None) -> torch.Tensor:
    """A sum over positions whose weights tell them apart."""
    weights = torch.randn(y.shape[0], LENGTH, y.shape[2], dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    return (y.sin() * (weights if ranks is None else ranks.split(weights)).to(y.device)).sum()


def gradients(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the input and all parameters, zeros where there is none."""
    found = {"x": x, **dict(module.named_parameters())}
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in found.items()}


def main(rank: int, world: int, folder: str, backend: str) -> None:
    device = torch.device("cpu" if backend == "gloo" else f"cuda:{rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{folder}/init", rank=rank, world_size=world)
    ranks = SequenceRanks()
    saved = {}

    def run(name, module, call):
        x = ranks.split(sequences().to(device)).clone().requires_grad_()
        y, state = call(module, x)
        loss(y, ranks).backward()
        grads = gradients(module, x)
        own = grads.pop("x")
        for grad in grads.values():
            dist.all_reduce(grad)
        saved[name] = {
            "y": ranks.join(y).detach(),
            "grads": {"x": ranks.join(own), **grads},
            "state": torch.utils._pytree.tree_leaves(state.detach()),
        }

    for name, module in at_once().items():
        before = start(module.to(device))
        set_context_parallel(module, ranks)
        run(name, module, lambda module, x: module.prefill(x))
        module.zero_grad()
        given = None if rank else before
        run(f"{name} from a state", module, lambda module, x, given=given: module.prefill(x, given))
    for name, module in in_turn().items():
        module.to(device)
        before = None if rank else start(module)
        run(name, module, lambda module, x: prefill_in_turn(module, x, ranks))
        module.zero_grad()
        run(f"{name} from a state", module, lambda module, x, s=before: prefill_in_turn(module, x, ranks, s, pieces=3))

    stack = at_once()["stack"].to(device)
    set_context_parallel(stack, ranks)
    averaged = nn.parallel.DistributedDataParallel(stack)
    x = ranks.split(sequences().to(device))
    stack.set_grad_checkpointing(2)
    (averaged(x).square().sum() * world).backward()
    saved["averaged"] = {name: parameter.grad for name, parameter in stack.named_parameters()}

    whole = torch.arange(LENGTH, dtype=torch.float64, device=device, requires_grad=True)
    joined = ranks.join(ranks.split(whole, 0), 0)
    (joined * (rank + 1) * whole.detach()).sum().backward()
    saved["join"] = {"y": joined.detach(), "grad": whole.grad}
    torch.save(torch.utils._pytree.tree_map(lambda tensor: tensor.cpu(), saved), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
