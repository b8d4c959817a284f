"""The forecasting task: a model by name, a masked loss in scaled units, and exact errors over all windows."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ..ssmcore.training import SSMTask
from ..ssmcore.training.optim import LRSchedulerCallable, OptimizerCallable
from .classification import SeriesClassification as SeriesClassification
from .conformal import conformal_radius
from .distributions import DEFAULT_LEVELS, Distribution, find_distribution
from .imputation import Imputation as Imputation
from .metrics import ErrorSums
from .models import MODELS, create_model, model_options
from .models.layers import check_quantiles, middle_quantile
from .windows import WindowBatch

log = logging.getLogger(__name__)

Loss = Literal["mse", "mae", "huber", "pinball", "nll"]

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda y, target: (y - target).square(),
    "mae": lambda y, target: (y - target).abs(),
    "huber": lambda y, target: F.huber_loss(y, target, reduction="none"),
}


def check_loss(loss: str, quantiles: Sequence[float] | None, distribution: str | None = None) -> str:
    """The loss to use: "nll" with a distribution, "pinball" with quantiles, where nothing else was asked for.

    Raises:
        ValueError: for an unknown loss, and where it does not go with quantiles or the distribution.
    """
    if loss not in (*LOSSES, "pinball", "nll"):
        raise ValueError(f"unknown loss {loss!r}; expected mse, mae, huber, pinball or nll")
    if distribution or loss == "nll":
        if not distribution or loss not in ("mse", "nll"):
            raise ValueError(
                f"expected a distribution with the loss 'nll' and only there, got loss {loss!r} and distribution "
                f"{distribution!r}; e.g. loss: nll, distribution: student_t"
            )
        return "nll"
    if quantiles and loss == "mse":
        return "pinball"
    if (loss == "pinball") != bool(quantiles):
        raise ValueError(
            f"expected quantiles with the loss 'pinball' and only there, got loss {loss!r} and quantiles {quantiles}; "
            "e.g. loss: pinball, quantiles: [0.1, 0.5, 0.9]"
        )
    return loss


def point_forecast(y: Tensor, quantiles: Sequence[float], distribution: Distribution | None = None) -> Tensor:
    """(b, i, horizon) of a point model as it is; of (b, i, horizon, q) the mean, or the quantile next to the median."""
    if distribution is not None:
        return y[..., 0]
    return y[..., middle_quantile(quantiles)] if quantiles else y


def check_counts_of(data: Any, distribution: Distribution) -> None:
    """A distribution of counts needs targets that are counts, as they are.

    Args:
        data: Data module.
        distribution: The family.

    Raises:
        ValueError: if targets are scaled, negative or no whole numbers.
    """
    if data.scaler.kind != "none":
        raise ValueError(
            f"{distribution.name} is a distribution of counts, which are not scaled; got scaler {data.scaler.kind!r}, "
            "pass scaler='none'"
        )
    target = data.dataset["target"].to_numpy()
    wrong = np.isfinite(target) & ((target < 0) | (target != np.floor(target)))
    if wrong.any():
        raise ValueError(
            f"{distribution.name} is a distribution of counts 0, 1, 2, ..., the data hold {target[wrong][0]:g}; "
            "take normal or student_t"
        )


MAX_RESIDUALS = 20_000_000  # validation residuals kept for the intervals, 80 MB; of more, a random share


class Forecasting(SSMTask):
    """Train and test a forecaster on windows; everything in scaled units.

    Logs `train/loss`, and for validation and test `loss`, `mse` and `mae` (e.g. `val/mse`), each one sum over all
    windows, steps and variates divided by one count of observed targets. A model with `fit_windows` is solved in closed
    form when the fit starts and then not trained. Each validation of a point model also sets the split-conformal
    intervals that a saved model carries.

    Args:
        model: Name of a model, see `omnissm.timeseries.list_models`.
        model_args: Its own options.
        lookback: Steps seen; taken from the data module on the command line.
        horizon: Steps forecast; taken from the data module.
        n_variates: Number of variates; taken from the data module.
        covariates: Numbers of "past", "future" and "static" covariates; taken from the data module. A model that has
            no `n_past`, `n_future` or `n_static` does without them.
        loss: "mse", "mae", "huber", "pinball" (implied by quantiles) or "nll", the negative log-likelihood (implied by
            a distribution).
        quantiles: Ascending levels in (0, 1) of a probabilistic forecast; with a distribution those of its quantiles
            that files get.
        distribution: "normal", "student_t", or "negative_binomial" for counts, which need `scaler: none`.
        optimizer: Called with the parameter groups.
        lr_scheduler: Called with the optimiser.
        coverages: Coverages of the intervals of a point model; [] makes none.
        compile: Compile the model.
        check_finite: Stop at a loss or gradient that is not finite.
    """

    def __init__(
        self,
        model: str = "chimera_tiny",
        model_args: dict[str, Any] | None = None,
        lookback: int = 96,
        horizon: int = 96,
        n_variates: int = 1,
        covariates: dict[str, int] | None = None,
        loss: Loss = "mse",
        quantiles: list[float] | None = None,
        distribution: str | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        coverages: Sequence[float] = (0.5, 0.8, 0.95),
        compile: bool = False,
        check_finite: bool = True,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, compile, check_finite)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.model = model
        self.distribution = find_distribution(distribution)
        self.levels = check_quantiles(quantiles) or (DEFAULT_LEVELS if self.distribution else ())
        self.quantiles = () if self.distribution else self.levels  # those that the network itself forecasts
        self.loss = check_loss(loss, self.quantiles, distribution)
        self.args: dict[str, Any] = {"lookback": lookback, "horizon": horizon, "n_variates": n_variates}
        known = model_options(model) if model in MODELS else []
        counts = {f"n_{kind}": count for kind, count in (covariates or {}).items()}
        self.args |= {name: count for name, count in counts.items() if count and name in known}
        self.args |= model_args or {}
        if self.quantiles:
            self.args["quantiles"] = list(self.quantiles)
        if self.distribution:
            if model in MODELS and "distribution" not in known:
                able = [name for name in MODELS if "distribution" in model_options(name)]
                raise ValueError(f"{model} forecasts points only; for a distribution take one of {', '.join(able)}")
            self.args["distribution"] = self.distribution.name
        self.net = create_model(model, **self.args)
        self.errors = {"val": ErrorSums(), "test": ErrorSums()}
        self.losses = {"val": [0.0, 0.0], "test": [0.0, 0.0]}  # sum and count
        self.coverages = [] if self.levels else list(coverages)
        self.intervals: dict[str, Any] | None = None
        self._residuals: list[npt.NDArray[Any]] = []
        self._kept, self._rng = 1.0, np.random.default_rng(0)  # share of the windows whose residuals are kept

    def forward(self, batch: WindowBatch) -> Tensor:
        """(b, i, horizon), or (b, i, horizon, q) with quantiles or a distribution."""
        return self.net(batch)

    def model_config(self) -> dict[str, Any]:
        """Name and arguments that rebuild the network."""
        task = {"loss": self.loss, "quantiles": list(self.levels)}
        return {"model": f"timeseries/{self.model}", "args": dict(self.args), "task": task}

    def export_files(self) -> dict[str, str]:
        """`data.json` of the data module with the intervals of the last validation."""
        files = super().export_files()
        if "data.json" in files and self.intervals:
            state = json.loads(files["data.json"]) | {"intervals": self.intervals}
            files["data.json"] = json.dumps(state, indent=1) + "\n"
        return files

    def loss_sum(self, y: Tensor, batch: WindowBatch) -> tuple[Tensor, Tensor]:
        """Sum of the loss over observed targets, and their count."""
        if self.distribution:
            each = -self.distribution.log_prob(y, batch.y)
        elif self.quantiles:
            levels = torch.tensor(self.quantiles, device=y.device, dtype=y.dtype)
            error = batch.y[..., None] - y
            each = torch.maximum(levels * error, (levels - 1) * error).mean(dim=-1)
        else:
            each = LOSSES[self.loss](y, batch.y)
        return torch.where(batch.y_mask, each, 0.0).sum(), batch.y_mask.sum()

    def on_fit_start(self) -> None:
        """Solve a closed-form model on the training windows; see that counts are counts."""
        if self.distribution and self.distribution.counts:
            check_counts_of(self.trainer.datamodule, self.distribution)  # type: ignore[attr-defined]
        solve = getattr(self.net, "fit_windows", None)
        if callable(solve):
            solve(self.trainer.datamodule.windows("train"))  # type: ignore[attr-defined]

    @functools.cached_property
    def trainable(self) -> bool:
        """Whether there is anything to train by gradients."""
        return any(p.requires_grad for p in self.net.parameters())

    def training_step(self, batch: WindowBatch, batch_idx: int) -> Tensor | None:
        """Masked mean of the loss over the batch and losses of the model's own; None for a model without parameters."""
        if not self.trainable:
            self.trainer.should_stop = True
            return None
        both = getattr(self.net, "forward_train", None)  # a model with losses of its own beside the forecast's
        y, extra = both(batch) if callable(both) else (self.net(batch), 0.0)
        total, count = self.loss_sum(y, batch)
        loss = total / count.clamp(min=1) + extra
        self.log_loss(loss, max(1, int(count)))
        return loss

    def validation_step(self, batch: WindowBatch, batch_idx: int) -> None:
        """Add one batch to the sums."""
        self._add("val", batch)

    def test_step(self, batch: WindowBatch, batch_idx: int) -> None:
        """Add one batch to the sums."""
        self._add("test", batch)

    def predict_step(self, batch: WindowBatch, batch_idx: int) -> Tensor:
        """Forecast in scaled units."""
        return self.net(batch)

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew, also after a validation that was broken off."""
        self._reset("val")
        self._residuals, self._kept, self._rng = [], 1.0, np.random.default_rng(0)

    def on_test_epoch_start(self) -> None:
        """Start the sums anew."""
        self._reset("test")

    def on_validation_epoch_end(self) -> None:
        """Log the errors of all validation windows."""
        self._report("val")
        self._calibrate()

    def on_test_epoch_end(self) -> None:
        """Log the errors of all test windows."""
        self._report("test")

    def _reset(self, part: str) -> None:
        self.errors[part], self.losses[part] = ErrorSums(), [0.0, 0.0]

    def _add(self, part: str, batch: WindowBatch) -> None:
        y = self.net(batch)
        total, count = self.loss_sum(y, batch)
        self.losses[part][0] += float(total)
        self.losses[part][1] += float(count)
        self.errors[part].update(batch.y, point_forecast(y, self.quantiles, self.distribution), batch.y_mask)
        if part == "val" and self.coverages:
            self._keep(torch.where(batch.y_mask, batch.y - y, torch.nan).float().cpu().numpy())

    def _keep(self, residuals: npt.NDArray[Any]) -> None:
        """Keep residuals of a batch; beyond the limit, those of every second window at random, whatever its series."""
        self._residuals.append(residuals[self._rng.random(len(residuals)) < self._kept])
        while sum(part.size for part in self._residuals) > MAX_RESIDUALS:
            self._kept /= 2
            self._residuals = [part[self._rng.random(len(part)) < 0.5] for part in self._residuals]

    def _calibrate(self) -> None:
        """Intervals from the residuals of this validation, for the coverages that have enough of them."""
        residuals, self._residuals = self._residuals, []
        found: dict[str, Any] = {"coverages": [], "radius": []}
        for coverage in self.coverages if residuals else ():
            try:
                radius = conformal_radius(np.concatenate(residuals), coverage)
            except ValueError as error:
                log.info("no interval: %s", error)
                continue
            found["coverages"].append(float(coverage))
            found["radius"].append(radius.tolist())
        self.intervals = found if found["coverages"] else None

    def _report(self, part: str) -> None:
        sums = self.errors[part]
        sums.values = self.trainer.strategy.reduce(sums.values.to(self.device), reduce_op="sum")
        loss = torch.tensor(self.losses[part], dtype=torch.float64, device=self.device)
        total, count = self.trainer.strategy.reduce(loss, reduce_op="sum").tolist()
        values = {"loss": total / count if count else float("nan"), **sums.compute()}
        # one value on all processes already
        self.log_dict({f"{part}/{name}": value for name, value in values.items()}, prog_bar=part == "val")
