"""Sharded weights on two processes (gloo): the same loss and the same step as on one."""

import os
import subprocess
import sys

import pytest
import torch

CODE = """
import sys, torch, torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from omnissm.ssmcore import Stack
from omnissm.ssmcore.training import create_optimizer, param_groups
from omnissm.ssmcore.training.shard import shard

torch.manual_seed(0)
stack = Stack(8, ["chimera2d"] * 2, mixer_options={"d_state": 2})
x = torch.randn(4, 2, 5, 8)
sizes = [len(group["params"]) for group in param_groups(stack)]
rank, world = int(sys.argv[1]), int(sys.argv[2])
if world > 1:
    dist.init_process_group("gloo", init_method="file://" + sys.argv[3] + ".init", rank=rank, world_size=world)
    shard(stack, init_device_mesh("cpu", (world,)))
    assert sizes == [len(group["params"]) for group in param_groups(stack)]
optimizer = create_optimizer(stack, lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.5))
for step in range(5):
    optimizer.zero_grad()
    stack(x.chunk(world)[rank]).square().mean().backward()
    optimizer.step()
state = stack.state_dict()
if world > 1:
    state = get_model_state_dict(stack, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    dist.destroy_process_group()
if rank == 0:
    torch.save(state, sys.argv[3])
"""


@pytest.mark.slow
def test_two_shards_equal_one_process(tmp_path):
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}

    def launch(rank, world):
        file = str(tmp_path / f"state{world}.pt")
        return subprocess.Popen([sys.executable, "-c", CODE, str(rank), str(world), file], env=environment)

    processes = [launch(0, 1), launch(0, 2), launch(1, 2)]
    assert [process.wait(timeout=110) for process in processes] == [0, 0, 0]
    one, two = (torch.load(tmp_path / f"state{world}.pt", weights_only=True) for world in (1, 2))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
