"""Training: base task and data module, optimiser groups, schedules, checkpoints and the Lightning command line.

Names are imported on first use: reading a model folder or building parameter groups loads no Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callbacks import EMA as EMA
    from .callbacks import ResumePoint as ResumePoint
    from .callbacks import prepare_trainer as prepare_trainer
    from .checkpoints import ModelFolder as ModelFolder
    from .checkpoints import export_checkpoint as export_checkpoint
    from .checkpoints import load_weights as load_weights
    from .checkpoints import read_checkpoint as read_checkpoint
    from .checkpoints import read_model_folder as read_model_folder
    from .checkpoints import read_weights as read_weights
    from .checkpoints import save_model_folder as save_model_folder
    from .checkpoints import write_atomic as write_atomic
    from .cli import run_cli as run_cli
    from .data import EpochSampler as EpochSampler
    from .data import SSMData as SSMData
    from .distillation import Distillation as Distillation
    from .export import best_checkpoint as best_checkpoint
    from .length import InitialStates as InitialStates
    from .optim import EpochDecay as EpochDecay
    from .optim import LRSchedulerCallable as LRSchedulerCallable
    from .optim import OptimizerCallable as OptimizerCallable
    from .optim import WarmupCosine as WarmupCosine
    from .optim import create_optimizer as create_optimizer
    from .optim import param_groups as param_groups
    from .runs import read_metrics as read_metrics
    from .strategies import ShardedStrategy as ShardedStrategy
    from .task import NonFiniteError as NonFiniteError
    from .task import SSMTask as SSMTask

_HOME = {
    "Distillation": "distillation",
    "EMA": "callbacks",
    "EpochDecay": "optim",
    "EpochSampler": "data",
    "InitialStates": "length",
    "LRSchedulerCallable": "optim",
    "ModelFolder": "checkpoints",
    "NonFiniteError": "task",
    "OptimizerCallable": "optim",
    "ResumePoint": "callbacks",
    "SSMData": "data",
    "SSMTask": "task",
    "ShardedStrategy": "strategies",
    "WarmupCosine": "optim",
    "best_checkpoint": "export",
    "create_optimizer": "optim",
    "export_checkpoint": "checkpoints",
    "load_weights": "checkpoints",
    "param_groups": "optim",
    "prepare_trainer": "callbacks",
    "read_checkpoint": "checkpoints",
    "read_metrics": "runs",
    "read_model_folder": "checkpoints",
    "read_weights": "checkpoints",
    "run_cli": "cli",
    "save_model_folder": "checkpoints",
    "write_atomic": "checkpoints",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
