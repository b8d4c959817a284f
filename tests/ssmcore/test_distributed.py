"""Segments of sequences on two and three processes (gloo): outputs, gradients and states are those of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
import tiny_distributed as tiny

from omnissm.ssmcore import Stack, create_mixer
from omnissm.ssmcore.distributed import SequenceRanks, set_context_parallel

WORLDS = [
    ("gloo", 2),
    pytest.param(("gloo", 3), marks=pytest.mark.slow),
    pytest.param(("nccl", 2), marks=[pytest.mark.slow, pytest.mark.gpu]),
]


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world[0]}-{world[1]}")
def ranks(request, tmp_path_factory):
    """What every process saved."""
    backend, size = request.param
    if backend == "nccl" and torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    if backend == "nccl":  # what is exchanged does not depend on kernels, and those of float64 take minutes to compile
        environment["SSM_BACKEND"] = "chunked"
    command = [sys.executable, tiny.__file__]
    runs = [
        subprocess.Popen([*command, str(rank), str(size), str(folder), backend], env=environment)
        for rank in range(size)
    ]
    try:
        codes = [run.wait(timeout=110) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert codes == [0] * size
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(size)]


def alone(module, state=None):
    """The same on one process: outputs, gradients, leaves of the last state."""
    x = tiny.sequences().requires_grad_()
    y, state = module.prefill(x, state)
    tiny.loss(y).backward()
    return y.detach(), tiny.gradients(module, x), torch.utils._pytree.tree_leaves(state.detach())


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", [tiny.at_once, tiny.in_turn])
def test_segments_equal_the_whole(ranks, way):
    for name, module in way().items():
        for case, state in ((name, None), (f"{name} from a state", tiny.start(module))):
            y, grads, last = alone(module, state)
            module.zero_grad()
            for saved in ranks:
                close(saved[case]["y"], y)
                close(saved[case]["grads"], grads)
            end = ranks[-1][case]["state"]
            if (way, name) == (tiny.at_once, "stack"):  # `position` counts the own segment
                assert end.pop().tolist() == [tiny.LENGTH // len(ranks)] * 4
                last.pop()
            close(end, last)


def test_mean_of_gradients_is_that_of_ddp(ranks):
    """With recomputed activations, whose exchanges are repeated in the backward pass."""
    stack = tiny.at_once()["stack"]
    stack(tiny.sequences()).square().sum().backward()
    for saved in ranks:
        close(saved["averaged"], {name: parameter.grad for name, parameter in stack.named_parameters()})


def test_joined_segments_have_the_gradient_of_all_uses(ranks):
    """Rank r uses the whole (r + 1) times; the gradient of its own segment is the sum of all uses."""
    uses = sum(rank + 1 for rank in range(len(ranks)))
    place = torch.arange(tiny.LENGTH, dtype=torch.float64)
    owner = torch.cat([torch.full((len(p),), k) for k, p in enumerate(place.tensor_split(len(ranks)))])
    for rank, saved in enumerate(ranks):
        close(saved["join"]["y"], place)
        close(saved["join"]["grad"], torch.where(owner == rank, uses * place, 0))


def test_what_cannot_be_shared_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no group of processes: start with torchrun"):
        SequenceRanks()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        ranks = SequenceRanks()
        for layers, name in ((["mamba2", "attention"], "Attention"), (["mamba2", "hydra"], "Hydra")):
            stack = Stack(64, layers)
            with pytest.raises(TypeError, match=rf"layer 1 \({name}\) cannot scan segments at once.*prefill_in_turn"):
                set_context_parallel(stack, ranks)
            assert stack.blocks[0].mixer.ranks is None
        for name in ("mamba2", "mamba"):
            mixer = create_mixer(name, 64)
            x = torch.randn(2, 6, 64)
            whole = mixer(x)
            set_context_parallel(mixer, ranks)
            torch.testing.assert_close(mixer(x), whole)
            with pytest.raises(ValueError, match="`mask` is not possible where segments"):
                mixer(x, mask=torch.ones(2, 6, dtype=torch.bool))
            with pytest.raises(ValueError, match="2 positions, and the next one's convolution sees 3"):
                mixer(x[:, :2])
            set_context_parallel(mixer, None)
            assert mixer(x[:, :2]).shape == (2, 2, 64)
    finally:
        torch.distributed.destroy_process_group()
