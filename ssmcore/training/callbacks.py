"""What a run needs to survive: whole checkpoint files, a state to resume from, seeds per epoch, averaged weights."""

from __future__ import annotations

import io
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, WeightAveraging
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .checkpoints import write_atomic
from .runs import FIRST, LAST, STOPPED
from .task import NonFiniteError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are whole or absent: written beside their place, synchronised, then renamed.

    The trainer's own way goes through the system's temporary folder, and a move between file systems is a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write one checkpoint."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomic(path, buffer.getvalue())


class ResumePoint(Callback):
    """Keeps `last.ckpt`, the state at the start of an epoch, and seeds each epoch by (seed, epoch).

    A run that is killed and resumed from this file repeats what came after it with the same order and dropout, and
    ends at the same weights. Epochs that begin within `seconds` of the last state are not saved, as writing a large
    model can take longer than a short epoch. Saved at the start of an epoch, and not at the end of the one before,
    because the schedule and the other callbacks have moved by then. It must be the first callback: then the others'
    hooks of the epoch's start run anew after resuming.

    A run takes its folder over once its first batch has been learned from: until then its state is in `.first.ckpt`,
    and what an earlier run has left is not touched.

    Args:
        folder: Where checkpoints go.
        seed: Base of the seeds of epochs.
        begin: Called once, after the first batch; must move `.first.ckpt` to `last.ckpt`. None: the folder is ours.
        seconds: Least time from the end of one save to the next; the state after the last epoch is always saved.

    Attributes:
        epoch: The epoch whose state is kept, counted from 0.
    """

    def __init__(
        self, folder: str | Path, seed: int = 0, begin: Callable[[], None] | None = None, seconds: float = 5.0
    ) -> None:
        if not seconds >= 0:
            raise ValueError(f"seconds between states must be at least 0, got {seconds}.")
        self.folder = Path(folder)
        self.seed = seed
        self.seconds = seconds
        self.epoch = 0
        self._begin = begin
        self._saved = -math.inf

    @property
    def has_begun(self) -> bool:
        """Whether the folder is this run's."""
        return self._begin is None

    def begin(self) -> None:
        """Take the folder over, once."""
        begin, self._begin = self._begin, None
        if begin is not None:
            begin()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the epoch from its first batch: the trainer takes the counts of the one before for a finished epoch.

        A checkpoint that was taken inside an epoch goes on there.
        """
        trainer.fit_loop.restarting = trainer.fit_loop.restarted_mid_epoch
        self.epoch = trainer.current_epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save unless that was done a moment ago, then seed."""
        due = time.monotonic() - self._saved >= self.seconds
        if not is_dry(trainer) and trainer.strategy.broadcast(due):  # all processes take part in a save
            trainer.save_checkpoint(self.folder / (LAST if self.has_begun else FIRST))
            self.epoch, self._saved = trainer.current_epoch, time.monotonic()
        mixed = 1_000_003 * self.seed + 1_009 * trainer.current_epoch + trainer.global_rank
        pl.seed_everything(mixed % 2**32, verbose=False)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """The first batch shows that data, model and optimiser work."""
        self.begin()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end, from which more epochs can be trained."""
        if not is_dry(trainer):
            self.begin()
            trainer.save_checkpoint(self.folder / LAST)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Keep the weights before a loss that is not finite; before the first step they are no news."""
        if isinstance(exception, NonFiniteError) and self.has_begun and not is_dry(trainer):
            trainer.save_checkpoint(self.folder / STOPPED, weights_only=True)


class BestCheckpoint(ModelCheckpoint):
    """The trainer's choice of the best checkpoint, which a run keeps when its folder is moved or renamed."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scores, with the paths of files that now lie in this callback's folder."""
        old, new = state_dict.get("dirpath"), self.dirpath

        def moved(path: Any) -> Any:
            return str(Path(new) / Path(path).name) if new and path and Path(path).parent == Path(old or "") else path

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        state = {**state_dict, "dirpath": new, **{key: moved(state_dict.get(key, "")) for key in paths}}
        state["best_k_models"] = {moved(path): score for path, score in state_dict.get("best_k_models", {}).items()}
        super().load_state_dict(state)


class EMA(WeightAveraging):
    """Exponential moving average of the weights, used for validation, the best checkpoint and the saved model.

        average_t = d average_{t-1} + (1 - d) weights_t,      d = decay, or min(decay, (1 + t) / (10 + t)) with `warmup`

    Buffers, such as the statistics of batch normalisation, are averaged too. Without the warm-up the first weights hold
    a share of decay^t of the average after t updates, which spoils it for some 3 / (1 - decay) steps.

    Args:
        decay: Share of the old average kept at each update.
        every_n_steps: Optimiser steps between updates.
        start_step: First step that is averaged; until then the average is a copy of the first weights.
        warmup: Average over about a ninth of the updates so far where that is less than the decay says; for short runs.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, decay: float = 0.999, every_n_steps: int = 1, start_step: int = 0, warmup: bool = False) -> None:
        if not 0 <= decay <= 1 or every_n_steps < 1 or start_step < 0:
            raise ValueError(
                "decay must lie in [0, 1], every_n_steps be at least 1 and start_step not negative, got"
                f" {decay}, {every_n_steps} and {start_step}."
            )
        super().__init__(multi_avg_fn=self._mix)
        self.decay, self.warmup = decay, warmup
        self.every_n_steps, self.start_step = every_n_steps, start_step

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to average after this optimiser step, counted from 0."""
        return step_idx is not None and step_idx >= self.start_step and step_idx % self.every_n_steps == 0

    def _mix(self, averaged: Any, current: Any, number: torch.Tensor | int) -> None:
        decay = min(self.decay, (1 + int(number)) / (10 + int(number))) if self.warmup else self.decay
        get_ema_multi_avg_fn(decay)(averaged, current, number)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the weights when a fit begins, to the device of the training.

        Raises:
            ValueError: if the weights are sharded.
        """
        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
            raise ValueError("EMA keeps a whole copy of the weights, which sharding avoids; use one or the other.")
        self._device = trainer.strategy.root_device  # the weights move there later; a copy elsewhere is slow to update
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*overrides the configure_model")  # ours shards or does nothing
            super().setup(trainer, pl_module, stage)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore both sets of weights when training goes on; a test needs the average alone, which is loaded."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


def is_dry(trainer: pl.Trainer) -> bool:
    """Whether the trainer only tries a few batches and must leave no files."""
    return bool(getattr(trainer, "fast_dev_run", False))


def prepare_trainer(
    trainer: pl.Trainer,
    folder: str | Path,
    seed: int = 0,
    begin: Callable[[], None] | None = None,
    seconds: float = 5.0,
) -> pl.Trainer:
    """Give a trainer whole checkpoint files and a `ResumePoint` in `folder`, first among its callbacks.

    Args:
        trainer: The trainer.
        folder: Where checkpoints go.
        seed: Base of the seeds of epochs.
        begin: Called after the first batch, see `ResumePoint`.
        seconds: Least time between states to resume from.

    Returns:
        The same trainer.
    """
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.insert(0, ResumePoint(folder, seed, begin, seconds))
    return trainer
