"""Sharding of a network's weights over processes (FSDP2), block by block."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from ..blocks import Stack

# What tasks call on a network beside `forward`; without registration these would meet sharded weights.
_FORWARD_METHODS = ("forward_train", "hidden", "logits", "losses", "detect")


def shard(net: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard every block of every `Stack` in a network, then the rest, in place.

    Weights keep their type: recurrence parameters must stay float32, so use autocast for 16-bit products and no policy
    that casts parameters. All weights must have one type.

    Args:
        net: The network.
        mesh: One-dimensional mesh of processes.

    Returns:
        The same network; names of parameters are unchanged.
    """
    for module in net.modules():
        if isinstance(module, Stack):
            for block in module.blocks:
                fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    for name in _FORWARD_METHODS:
        if callable(getattr(net, name, None)):
            register_fsdp_forward_method(net, name)
    return net
