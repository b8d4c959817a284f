"""How a run spreads over processes where Lightning's own strategies do not say it."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.optim import Optimizer

__all__ = ["ShardedStrategy"]


class ShardedStrategy(ModelParallelStrategy):
    """Weights, gradients and optimiser states sharded over all processes of all nodes (FSDP2), on GPUs or CPUs.

    Lightning's strategy counts nodes where it is asked for its automatic size, and so needs the number of devices in
    the configuration.

    Args:
        save_distributed_checkpoint: Each process writes its part of a checkpoint into a folder, instead of the first
            one all of it into a file. Only a file becomes a model folder.
        process_group_backend: "nccl" or "gloo"; None goes by the device.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        """Start the processes' connection, all of them in one line."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """What a checkpoint holds of an optimiser, whole on the first process.

        Before the first step torch makes a state by a step without gradients; Adam would count it.
        """
        own = getattr(optimizer, "optimizer", optimizer)  # Lightning's wrapper has it
        is_new = not own.state
        saved = super().optimizer_state(optimizer)
        if is_new:
            own.state.clear()
            for part in saved.get("state", {}).values():
                if "step" in part:
                    part["step"] = torch.zeros_like(part["step"])
        return saved
