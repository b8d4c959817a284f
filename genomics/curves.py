"""How good a language model is after how much computation: a table while it trains, and a picture of several."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from .files import atomic_path
from .losses import IGNORE, bits

__all__ = ["TrainingCurve", "plot_curves", "read_curve"]


class TrainingCurve(Callback):
    """Bits per base against bases seen, operations and seconds, written after each validation.

    A row holds step, bases (positions read in training, start ids and padding left out), flops (forward and backward,
    as the model counts them, at the rates of boundaries measured last), seconds (of training, validation included),
    val_bits and, with `test`, test_bits; then the rates of boundaries, stage0_rate and so on.

    Args:
        path: CSV file, written whole after each row.
        test: Also evaluate the test part, for the picture; nothing is chosen by it.
    """

    def __init__(self, path: str, test: bool = False) -> None:
        self.path, self.test = Path(path), test
        self.rows: list[dict[str, float]] = []
        self.flops = 0.0
        self._bases: Tensor | None = None  # on the device: counting must not wait for it
        self._counted = 0
        self._rates: list[float] | None = None
        self._length = 0
        self._began = 0.0
        self._before = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Rows so far, operations, bases and seconds."""
        bases = self._counted if self._bases is None else int(self._bases)
        return {
            "rows": self.rows, "flops": self.flops, "bases": bases, "counted": self._counted, "rates": self._rates,
            "seconds": self._before + time.monotonic() - self._began if self._began else self._before,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on."""
        self.rows, self.flops = list(state_dict["rows"]), state_dict["flops"]
        self._bases, self._counted = torch.tensor(state_dict["bases"]), state_dict["counted"]
        self._rates, self._before = state_dict["rates"], state_dict["seconds"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the bases of a batch."""
        found = batch.mask.sum()
        self._bases = found if self._bases is None else self._bases.to(found.device) + found
        self._length = batch.tokens.shape[1]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write a row."""
        if self._bases is None or trainer.sanity_checking:
            return
        task: Any = pl_module
        metrics = trainer.callback_metrics
        row = {
            "step": trainer.global_step,
            "bases": int(self._bases),
            "seconds": round(self._before + time.monotonic() - self._began, 2),
        }
        if "val/bits_per_base" in metrics:
            row["val_bits"] = float(metrics["val/bits_per_base"])
        stages = len(task.targets)
        measured = [metrics.get(f"val/stage{s}/rate") for s in range(stages)]
        if all(rate is not None for rate in measured):
            self._rates = [float(rate) for rate in measured]  # type: ignore[arg-type]
        per_base = task.net.flops(self._length, rates=self._rates, mode="train") / self._length
        self.flops += per_base * (row["bases"] - self._counted)
        self._counted = int(row["bases"])
        row["flops"] = self.flops
        if self.test:
            row["test_bits"] = self._evaluate(trainer, task)
        for s, rate in enumerate(self._rates or ()):
            row[f"stage{s}_rate"] = rate
        self.rows.append(row)
        if trainer.is_global_zero:
            self._write()

    def _evaluate(self, trainer: pl.Trainer, task: Any) -> float:
        """Bits per base of the whole test part on this process."""
        loader = trainer.datamodule.test_dataloader()  # type: ignore[attr-defined]
        training = task.training
        task.eval()
        nats, count = torch.zeros((), dtype=torch.float64), 0
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            for batch in loader:
                here = trainer.strategy.batch_to_device(batch)
                found, targets, _ = task.losses(here)
                asked = targets != IGNORE
                nats += found[asked].double().sum().cpu()
                count += int(asked.sum())
        task.train(training)
        return bits(float(nats) / count) if count else math.nan

    def _write(self) -> None:
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path) as scratch, open(scratch, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def read_curve(path: str | Path) -> list[dict[str, float]]:
    """Rows of a file that `TrainingCurve` has written.

    Raises:
        ValueError: if it is another table.
    """
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"flops", "bases"} <= set(rows[0]):
        raise ValueError(f"{str(path)!r} is no curve: expected columns such as flops, bases and val_bits.")
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def plot_curves(
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    out: str | Path,
    *,
    metric: str = "test_bits",
    lines: Mapping[str, float] | None = None,
) -> None:
    """Draw bits per base against training operations.

    Args:
        curves: Rows of each model by the name in the legend.
        out: .png, .pdf or .svg.
        metric: Column of the vertical axis.
        lines: Horizontal lines by name, such as those of Markov models.

    Raises:
        ValueError: if no curve has the column.
    """
    from .figures import figure, save

    if not any(metric in row for rows in curves.values() for row in rows):
        raise ValueError(f"no curve has the column {metric!r}.")
    with figure(1, 1, width=6.4, height=4.0) as (drawing, axes):
        ax = axes[0][0]
        for name, rows in curves.items():
            kept = [row for row in rows if metric in row]
            ax.plot([row["flops"] for row in kept], [row[metric] for row in kept], marker="o", markersize=3, label=name)
        for k, (name, value) in enumerate((lines or {}).items()):
            ax.axhline(value, color="0.4", linestyle=(0, (4, 2 + k)), linewidth=1, label=name)
        ax.set_xscale("log")
        ax.set_xlabel("training FLOPs")
        ax.set_ylabel("bits per base, held out")
        ax.legend()
        save(drawing, out)
