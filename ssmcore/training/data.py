"""Base of all data modules: facts for the task, loaders, and an order that depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler


def data_class(class_path: str) -> type[SSMData]:
    """The data module of a name such as `omnissm.timeseries.data.ETT`, whose module is imported; it is not built.

    Raises:
        ValueError: if there is no such class, or it is no data module.
    """
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise ValueError(
            f"class_path {class_path!r}, which there is not; expected one such as omnissm.timeseries.data.ETT"
        ) from None
    if not (isinstance(found, type) and issubclass(found, SSMData)):
        raise ValueError(f"class_path {class_path!r}, which is no data module; expected a subclass of SSMData")
    return found


class SSMData(pl.LightningDataModule):
    """Data module whose facts are attributes after construction, for the command line to hand to the task.

    A task's constructor argument of one of these names is filled from the data module: `n_variates`, `lookback`,
    `horizon`, `num_classes`, `vocab_size`, `vocabulary`, `schema`, `image_size`. A data module without
    the attribute is refused by name.

    Attributes:
        seed: The data's own seed.
        run_seed: The run's; the command line sets it to --seed_everything. Both decide the order of training samples.
    """

    seed: int = 0
    run_seed: int = 0

    def state(self) -> dict[str, Any]:
        """What a saved model needs to read new data (scaler, names, frequency), JSON-able; after `setup`."""
        return {}

    def create_loader(
        self, dataset: Dataset, batch_size: int, *, shuffle: bool = False, num_workers: int = 0, **options: Any
    ) -> DataLoader:
        """Loader whose shuffled order is a function of seeds and epoch, whatever the number of workers.

        Args:
            dataset: Map-style data set; where it has `__getitems__`, a batch is one call of it.
            batch_size: Samples per batch and process.
            shuffle: New order each epoch. Only then are ranks padded to equal length; in evaluation each sample is
                seen once.
            num_workers: Worker processes.
            **options: Further `DataLoader` options, such as `collate_fn`.
        """
        sampler = EpochSampler(dataset, shuffle=shuffle, seed=self.seed + 7_919 * self.run_seed)
        if self.trainer is not None:
            sampler.set_epoch(self.trainer.current_epoch)  # the trainer tells later epochs, too late for workers
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            generator=sampler.generator,  # else each new iterator draws from the global state, which seeds dropout
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            **options,
        )


class EpochSampler(DistributedSampler):
    """Order of samples fixed by (seed, epoch), dealt out to the ranks in turn.

    A subclass of torch's sampler so that the trainer leaves it in place and sets its epoch; unlike it, an unshuffled
    order is never padded: no sample is evaluated twice.

    Args:
        dataset: Anything with a length.
        shuffle: Permute, and pad by repetition so that all ranks take equally many steps.
        seed: Base of the order.
        rank: Process number; None asks torch.distributed.
        world_size: Number of processes; None asks torch.distributed.
    """

    def __init__(
        self, dataset: Dataset, shuffle: bool, seed: int = 0, rank: int | None = None, world_size: int | None = None
    ) -> None:
        active = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = rank if rank is not None else torch.distributed.get_rank() if active else 0
        world_size = world_size if world_size is not None else torch.distributed.get_world_size() if active else 1
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)

        self.generator = torch.Generator()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order, and the seeds of worker processes, of an epoch."""
        super().set_epoch(epoch)
        self.generator.manual_seed(self._mixed_seed())

    def _mixed_seed(self) -> int:
        return 1_000_003 * self.seed + self.epoch

    def __iter__(self) -> Iterator[int]:
        total = len(self.dataset)  # type: ignore[arg-type]
        if not self.shuffle:
            return iter(range(self.rank, total, self.num_replicas))
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self._mixed_seed()))
        missing = -total % self.num_replicas
        more = order.repeat(-(-missing // max(1, total)))[:missing]  # there may be more processes than samples
        order = torch.cat([order, more])[self.rank :: self.num_replicas]
        return (k for part in order.split(4096) for k in part.tolist())  # a list of 1e7 ints takes 400 MB

    def batch(self, number: int, size: int) -> list[int]:
        """Samples of a batch of this epoch, by its number, of `size` samples each."""
        return list(islice(self, number * size, (number + 1) * size))

    def __len__(self) -> int:
        total = len(self.dataset)  # type: ignore[arg-type]
        if self.shuffle:
            return -(-total // self.num_replicas)
        return len(range(self.rank, total, self.num_replicas))


def batch_samples(loader: Any, number: int, most: int = 8) -> str:
    """Which samples the batch of that number in the running epoch holds, for messages.

    A data set with a method `sample_name(index)` names its samples; else they are called by their index.

    Args:
        loader: What the trainer trains from.
        number: The batch, from 0 on.
        most: Names to show.

    Returns:
        Such as "17, 3, 25 and 29 more"; empty if the loader's order is not that of an `EpochSampler` by batches.
    """
    sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    if not isinstance(sampler, EpochSampler) or not size:
        return ""
    indices = sampler.batch(number, size)
    named = getattr(loader.dataset, "sample_name", str)
    more = f" and {len(indices) - most} more" if len(indices) > most else ""
    return ", ".join(named(index) for index in indices[:most]) + more
