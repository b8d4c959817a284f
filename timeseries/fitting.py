"""Training for `Forecaster.fit`: data in memory, best epoch kept in memory. Imports Lightning."""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
import xarray as xr
from torch.utils.data import DataLoader

from ..ssmcore.training import EpochDecay, SSMTask, WarmupCosine
from ..ssmcore.training.callbacks import EMA
from ..ssmcore.training.trainer_options import check_trainer_options
from .data import ForecastingData
from .data.base import PartName
from .rollout import create_windows, prepare, progress_bar
from .tasks import Forecasting
from .windows import WindowBatch, Windows

__all__ = ["BestEpoch", "MemoryData", "create_task", "train"]

SCHEDULES: dict[str, Callable[..., Any] | None] = {
    "cosine": functools.partial(WarmupCosine, warmup=0.08),
    "halving": EpochDecay,
    "constant": None,
}


class MemoryData(ForecastingData):
    """Series that are already in memory.

    Args:
        source: Dataset in the schema.
        validation: A validation Dataset of its own, instead of the last part of `source`.
        options: Arguments of `ForecastingData`.
    """

    def __init__(self, source: xr.Dataset, validation: xr.Dataset | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.source, self.validation = source, validation

    def read(self) -> xr.Dataset:
        """The Dataset it was given."""
        return self.source

    def val_dataloader(self) -> DataLoader[WindowBatch] | list[DataLoader[WindowBatch]]:
        """As in the base class, with the separate validation Dataset where there is one."""
        return super().val_dataloader() if self.validation is None else self._loader("val", self.eval_batch_size)

    def windows(self, part: PartName) -> Windows:
        """As in the base class, with the separate validation Dataset where there is one."""
        if part != "val" or self.validation is None:
            return super().windows(part)
        if "val" not in self._windows:
            state = self.state()
            ds = prepare(self.validation, state)
            targets = range(self.lookback, ds.sizes["time"])
            self._windows["val"] = create_windows(ds, state, targets, self.horizon)[0]
        return self._windows["val"]


_FIXED = {  # options of the trainer that `train` sets, and what to use instead
    "max_epochs": "pass it to fit(max_epochs=...)",
    "enable_progress_bar": "pass fit(progress=...)",
    "limit_val_batches": "choose the validation part with fit(val=...)",
    **dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_model_summary", "num_sanity_val_steps"),
        "leave it out, or train from the command line",
    ),
}


def check_trainer(options: Mapping[str, Any]) -> None:
    """Refuse what the trainer does not know or `train` decides itself, before anything is computed.

    Raises:
        TypeError: naming the option and close ones.
    """
    known = list(inspect.signature(pl.Trainer.__init__).parameters)[1:]
    for name in options:
        if name in _FIXED:
            raise TypeError(f"the trainer option {name!r} is set by Forecaster.fit; {_FIXED[name]}")
        if name not in known:
            own = [
                "model",
                "lookback",
                "horizon",
                "scaler",
                "loss",
                "quantiles",
                "fill",
                "seed",
                "model_args",
                "distribution",
            ]
            close = difflib.get_close_matches(name, [*own, "calendar", "fourier", "ids", "threads", *known], n=2)
            hint = f"did you mean {' or '.join(close)}?" if close else "see help(Forecaster)"
            raise TypeError(f"neither Forecaster nor the trainer has an option {name!r}; {hint}")
    check_trainer_options(options)


class BestEpoch(pl.Callback):
    """Keep a history and the weights with the least validation loss; stop when it no longer falls.

    Args:
        patience: Stop at a validation so many epochs after the best one, if it is no better; None never does.
        advance: Called after each step, and with a text after each epoch.
    """

    def __init__(self, patience: int | None, advance: Callable[..., None]) -> None:
        self.patience, self.advance = patience, advance
        self.rows: list[dict[str, float]] = []
        self.weights: dict[str, torch.Tensor] = {}
        self._candidate: dict[str, torch.Tensor] | None = None  # of this epoch's validation
        self._least, self._best_epoch, self._begin = float("inf"), -1, 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._begin = time.perf_counter()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.advance(1)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the weights that were validated: later, an average of them has made room for the raw ones again."""
        self._candidate = {key: t.detach().cpu().clone() for key, t in pl_module.state_dict().items()}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the epoch; its validation has run by now, if it has one. Earlier ones stay in the trainer's metrics."""
        candidate, self._candidate = self._candidate, None
        logged = {
            key.replace("/", "_"): float(value)
            for key, value in trainer.callback_metrics.items()
            if candidate is not None or not key.startswith("val/")
        }
        row = {"epoch": trainer.current_epoch, **logged, "seconds": time.perf_counter() - self._begin}
        self.rows.append(row)
        loss = row.get("val_loss")
        if loss is None or candidate is None:
            self.advance(0, f"epoch {trainer.current_epoch + 1}")
            return
        self.advance(0, f"epoch {trainer.current_epoch + 1}: validation loss {loss:.4f}")
        if loss < self._least:
            self._least, self._best_epoch = loss, trainer.current_epoch
            self.weights = candidate
        elif self.patience is not None and trainer.current_epoch - self._best_epoch >= self.patience:
            trainer.should_stop = True


def train(
    data: ForecastingData,
    task: SSMTask,
    *,
    max_epochs: int,
    early_stopping: int | None,
    ema: float | None,
    validate: bool,
    progress: bool,
    trainer: dict[str, Any],
) -> list[dict[str, float]]:
    """Train `task` on `data` and leave it with the weights of the best epoch.

    Returns:
        One row per epoch: epoch, train_loss, val_loss, val_mse, val_mae, seconds.
    """
    steps = max_epochs * -(-len(data.windows("train")) // data.batch_size)
    with _quiet(), progress_bar(steps, "epoch 1", progress) as advance:
        best = BestEpoch(early_stopping, advance)
        defaults: dict[str, Any] = {"devices": 1, "gradient_clip_val": 1.0}
        average = [EMA(ema)] if ema else []
        options = {**defaults, **trainer, "callbacks": [best, *average, *trainer.get("callbacks", [])]}
        runner = pl.Trainer(
            max_epochs=max_epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=None if validate else 0,
            **options,
        )
        handler = signal.getsignal(signal.SIGINT)
        try:
            runner.fit(task, datamodule=data)
        except SystemExit as stop:
            if isinstance(stop.__context__, KeyboardInterrupt):  # the trainer ends the process, and is deaf to a second
                signal.signal(signal.SIGINT, handler)
                raise KeyboardInterrupt from stop
            raise
    if best.weights:
        task.load_state_dict(best.weights)
    return best.rows


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's notices about devices, loaders and the end of training."""
    logger = logging.getLogger("pytorch_lightning")
    others = [logging.getLogger(f"pytorch_lightning.{name}") for name in ("utilities.rank_zero", "trainer")]
    levels = [item.level for item in (logger, *others)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        for item in (logger, *others):
            item.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for item, level in zip((logger, *others), levels):
                item.setLevel(level)


def create_task(
    model: str,
    model_args: dict[str, Any],
    data: MemoryData,
    *,
    loss: str,
    quantiles: tuple[float, ...],
    distribution: str | None,
    lr: float,
    weight_decay: float,
    schedule: str,
) -> Forecasting:
    """The forecasting task for `data`, with AdamW and a schedule by name.

    Raises:
        ValueError: for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; expected one of {', '.join(SCHEDULES)}")
    return Forecasting(
        model,
        model_args,
        data.lookback,
        data.horizon,
        data.n_variates,
        data.covariates,
        loss=loss,  # type: ignore[arg-type]
        quantiles=list(quantiles) or None,
        distribution=distribution,
        optimizer=functools.partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay),
        lr_scheduler=SCHEDULES[schedule],
    )
