"""A learning rate that is up, level and down, with an end that comes by steps, by the clock, or by a plateau."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["AnnealOnPlateau", "WarmupStableDecay"]

log = logging.getLogger(__name__)


class WarmupStableDecay(LRScheduler):
    """Linear warm-up, the full rate, then down over the last share of the plan; stepped after every batch.

        f = max(k / total, elapsed / seconds)                          how much of the plan is over, at step k
        rate_k = lr * (k + 1) / warmup                                 k < warmup
        rate_k = lr * (final + (1 - final) (1 - sqrt((f - (1 - decay)) / decay)))     f > 1 - decay
        rate_k = lr                                                    between

    With `seconds` a run that is stopped by the clock (`trainer.max_time`) still ends at a low rate, whatever the
    machine's speed; the rates then depend on it. Time that a stopped run has used counts when it goes on.

    Args:
        optimizer: Whose groups are scheduled, each from its own rate.
        warmup: Steps of the warm-up.
        decay: Share of the plan over which the rate falls, in (0, 1].
        final: Rate at the end, as a share of the full one.
        total_steps: Steps of the plan; None takes the trainer's.
        seconds: Length of the plan on the clock, from the start of training; None: no limit.

    Raises:
        ValueError: if a number is out of range.

    Source: Hägele et al. (2024), "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", section
    3, for the shape of the end.
    """

    interval = "step"

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: int = 100,
        decay: float = 0.3,
        final: float = 0.0,
        total_steps: int | None = None,
        seconds: float | None = None,
    ) -> None:
        if warmup < 0:
            raise ValueError(f"warmup counts steps, expected 0 or more, got {warmup}.")
        if not 0 < decay <= 1:
            raise ValueError(f"decay is a share of the plan in (0, 1], got {decay}.")
        if not 0 <= final <= 1:
            raise ValueError(f"final is a share of the full rate in [0, 1], got {final}.")
        if seconds is not None and seconds <= 0:
            raise ValueError(f"seconds must be positive, got {seconds}.")
        self.warmup, self.decay, self.final = warmup, decay, final
        self.total_steps, self.seconds = total_steps, seconds
        self.began = time.monotonic()
        self.early: tuple[int, int] | None = None  # first and last step of a descent that was asked for
        super().__init__(optimizer)

    def set_total_steps(self, total_steps: int) -> None:
        """Fix the number of steps where the constructor has left it open."""
        if self.total_steps is None:
            self.total_steps = total_steps

    def descend(self, steps: int) -> None:
        """Begin the descent now and be down after so many steps, unless the plan is faster."""
        if self.early is None:
            self.early = (self.last_epoch, self.last_epoch + max(1, steps))

    @property
    def over(self) -> float:
        """Share of the plan that is over, or of the descent if that was asked for, in [0, 1]."""
        share = self.last_epoch / self.total_steps if self.total_steps else 0.0
        if self.seconds is not None:
            share = max(share, self.elapsed() / self.seconds)
        if self.early is not None:
            first, last = self.early
            share = max(share, 1 - self.decay * (1 - (self.last_epoch - first) / (last - first)))
        return min(share, 1.0)

    def elapsed(self) -> float:
        """Seconds of the plan that are over."""
        return time.monotonic() - self.began

    def state_dict(self) -> dict[str, Any]:
        """All but the optimiser, with the time used instead of the clock's reading."""
        state = super().state_dict()
        state.pop("began")
        return state | {"elapsed": self.elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved step and time used, by this run's own plan."""
        own = {name: getattr(self, name) for name in ("total_steps", "seconds")}
        state = dict(state_dict)
        self.began = time.monotonic() - state.pop("elapsed")
        super().load_state_dict(state | own)

    def get_lr(self) -> list[Any]:
        """Rates of the present step, one per group."""
        share = min(1.0, (self.last_epoch + 1) / self.warmup) if self.warmup else 1.0
        late = (self.over - (1 - self.decay)) / self.decay
        if late > 0:
            share = min(share, self.final + (1 - self.final) * (1 - math.sqrt(late)))
        return [rate * share for rate in self.base_lrs]


class AnnealOnPlateau(Callback):
    """Begin the descent of a `WarmupStableDecay` when a validation metric has stopped falling, and stop at its end.

    A small genome is learned by heart sooner or later; how soon is not known before. The best checkpoint is taken as
    ever.

    Args:
        monitor: Metric that should fall.
        patience: Validations without a new best before the descent.
        min_delta: What counts as a new best.
        share: Steps of the descent, as a share of the steps so far.
    """

    def __init__(
        self, monitor: str = "val/loss", patience: int = 4, min_delta: float = 2e-4, share: float = 0.4
    ) -> None:
        self.monitor, self.patience, self.min_delta, self.share = monitor, patience, min_delta, share
        self.best, self.waited = math.inf, 0

    def state_dict(self) -> dict[str, Any]:
        """Best value so far, and validations since."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on."""
        self.best, self.waited = state_dict["best"], state_dict["waited"]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the metric.

        Raises:
            TypeError: if the schedule is another one.
        """
        value = trainer.callback_metrics.get(self.monitor)
        if trainer.sanity_checking or value is None:
            return
        self.waited = 0 if float(value) < self.best - self.min_delta else self.waited + 1
        self.best = min(self.best, float(value))
        schedule = _schedule(trainer)
        if self.waited >= self.patience and schedule.early is None:
            schedule.descend(round(self.share * trainer.global_step))
            log.info("%s has not fallen for %d validations: the rate now falls.", self.monitor, self.waited)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Stop when a descent that was asked for is over."""
        schedule = _schedule(trainer)
        if schedule.early is not None and schedule.over >= 1:
            trainer.should_stop = True


def _schedule(trainer: pl.Trainer) -> WarmupStableDecay:
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, WarmupStableDecay):
            return config.scheduler
    raise TypeError("AnnealOnPlateau needs the schedule omnissm.genomics.schedules.WarmupStableDecay.")
