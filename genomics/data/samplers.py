"""Order of training samples: a function of seed, epoch and index, for any number of workers, also inside an epoch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch.utils.data import DataLoader, Dataset

from ...ssmcore.training import EpochSampler, ResumePoint, SSMData

__all__ = ["LengthSampler", "ResumableData", "SaveInside", "WindowSampler"]


class WindowSampler(EpochSampler):
    """Numbers that differ in every epoch, `epoch * n + i`, so that a window is a function of its number alone."""

    skipped = (-1, 0)  # epoch, and how many of its samples a stopped run has used

    def set_epoch(self, epoch: int, start: int | None = None) -> None:
        """Choose the epoch; `start` of its samples are left out because a run stopped after them."""
        super().set_epoch(epoch)
        if start is not None:
            self.skipped = (epoch, start)

    def __iter__(self) -> Iterator[Any]:
        epoch, start = self.skipped
        total = len(self.dataset)  # type: ignore[arg-type]
        for number, index in enumerate(super().__iter__()):
            if number >= start or epoch != self.epoch:
                yield self.epoch * total + index

    def batch(self, number: int, size: int) -> list[int]:
        """As in the base class, where batches count from the epoch's begin also after a stop inside it."""
        epoch, start = self.skipped
        return super().batch(number - start // size if epoch == self.epoch else number, size)


class LengthSampler(WindowSampler):
    """Batches whose windows grow with the steps, as many positions in each: (length, numbers of windows).

    Args:
        dataset: Windows of `length` bases.
        schedule: Pairs (step, bases), from step 0 on.
        rows: Windows of `length` in a batch; batches of other lengths have as many positions.
        length: Bases of a window outside the schedule.
        extra: Positions of a row besides its bases.
        seed: Base of the order of worker processes; windows are drawn by their numbers.
        rank: Process number; None asks torch.distributed.
        world_size: Number of processes; None asks torch.distributed.
    """

    def __init__(
        self,
        dataset: Dataset,
        schedule: Sequence[Sequence[int]],
        rows: int,
        length: int,
        extra: int,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(dataset, shuffle=True, seed=seed, rank=rank, world_size=world_size)
        self.schedule = [(int(step), int(length)) for step, length in schedule]
        self.rows, self.positions, self.extra = rows, rows * (length + extra), extra
        self.most = max(self._rows(length) for _, length in self.schedule)

    def _rows(self, length: int) -> int:
        return max(1, self.positions // (length + self.extra))

    def length_at(self, step: int) -> int:
        """Bases of a window at a step."""
        return [length for first, length in self.schedule if first <= step][-1]

    def __len__(self) -> int:
        windows = len(self.dataset)  # type: ignore[arg-type]
        return -(-windows // (self.rows * self.num_replicas))

    def __iter__(self) -> Iterator[Any]:
        epoch, start = self.skipped
        for index in range(start if epoch == self.epoch else 0, len(self)):
            step = self.epoch * len(self) + index
            length = self.length_at(step)
            first = (step * self.num_replicas + self.rank) * self.most
            yield length, list(range(first, first + self._rows(length)))


def check_schedule(schedule: Sequence[Sequence[int]] | None) -> list[tuple[int, int]]:
    """Pairs (step, bases) in order; none for None.

    Raises:
        ValueError: if they do not start at step 0, do not ascend, or a length is below 2.
    """
    pairs = [tuple(int(value) for value in pair) for pair in schedule or ()]
    steps = [pair[0] for pair in pairs if pair]
    ascending = all(a < b for a, b in pairwise(steps))
    if any(len(pair) != 2 or pair[1] < 2 for pair in pairs) or (pairs and steps[0] != 0) or not ascending:
        raise ValueError(
            "length_schedule needs pairs [step, bases] from step 0 on, such as [[0, 1024], [2000, 4096]], got"
            f" {schedule}"
        )
    return pairs  # type: ignore[return-value]


class ResumableData(SSMData):
    """Data module that a checkpoint taken inside an epoch resumes with the samples that were left."""

    position = (-1, 0)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, and batches of it that training has used."""
        if self.trainer is None:
            return {}
        loop = self.trainer.fit_loop
        epochs: Any = loop.epoch_progress.current
        progress: Any = loop.epoch_loop.batch_progress.current
        inside = epochs.started == epochs.ready and epochs.processed < epochs.ready
        batches = progress.processed if inside else 0
        return {"epoch": self.trainer.current_epoch, "batches": batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Leave out, in that epoch, the batches that were used."""
        if state_dict:
            self.position = (int(state_dict["epoch"]), int(state_dict["batches"]))

    def ordered_loader(self, sampler: WindowSampler, batch_size: int | None, num_workers: int) -> DataLoader[Any]:
        """Loader of a sampler that starts where training stands; `batch_size` None: the sampler makes batches."""
        # The trainer looks for loaders that keep states themselves; here the data module does.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")
        epoch, batches = self.position
        training = self.trainer is not None and sampler.shuffle
        now = self.trainer.current_epoch if self.trainer is not None else 0
        used = batches * (batch_size or 1) if training and epoch == now else None
        sampler.set_epoch(now, start=used)
        return DataLoader(
            sampler.dataset,
            batch_size=batch_size,
            sampler=sampler,
            generator=sampler.generator,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            collate_fn=as_is,
        )


def as_is(batch: Any) -> Any:
    """The batch as the data set made it."""
    return batch


class SaveInside(Callback):
    """Keep `last.ckpt` up to date inside long epochs, so that `--resume` repeats at most a few steps.

    The run's last.ckpt is otherwise the state at the start of an epoch. Needs a data module that resumes inside epochs,
    as those of `omnissm.genomics.data` do. What dropout draws after resuming differs from an uninterrupted run; the
    order of samples does not.

    Args:
        every_n_steps: Optimiser steps between checkpoints.

    Raises:
        ValueError: if that is below 1.
    """

    def __init__(self, every_n_steps: int = 1000) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self.saved = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save, unless the epoch ends here: the start of the next one is saved anyway."""
        step, last = trainer.global_step, batch_idx + 1 >= trainer.num_training_batches
        if step % self.every_n_steps or step == self.saved or last:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ResumePoint):
                self.saved = step
                trainer.save_checkpoint(callback.folder / "last.ckpt")
