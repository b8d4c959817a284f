"""Training: base task and data module, optimiser groups, schedules, checkpoints and the Lightning command line.

Names are imported on first use: reading a model folder or building parameter groups loads no Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import EpochSampler as EpochSampler
    from .data import SSMData as SSMData
    from .optim import EpochDecay as EpochDecay
    from .optim import LRSchedulerCallable as LRSchedulerCallable
    from .optim import OptimizerCallable as OptimizerCallable
    from .optim import WarmupCosine as WarmupCosine
    from .optim import create_optimizer as create_optimizer
    from .optim import param_groups as param_groups
    from .task import NonFiniteError as NonFiniteError
    from .task import SSMTask as SSMTask

_HOME = {
    "EpochDecay": "optim",
    "EpochSampler": "data",
    "LRSchedulerCallable": "optim",
    "NonFiniteError": "task",
    "OptimizerCallable": "optim",
    "SSMData": "data",
    "SSMTask": "task",
    "WarmupCosine": "optim",
    "create_optimizer": "optim",
    "param_groups": "optim",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
