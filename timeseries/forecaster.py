"""`Forecaster`: fit, predict, backtest, evaluate, save and load without a configuration file."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import nn

from ..ssmcore.training.checkpoints import load_weights, read_model_folder, save_model_folder
from .conformal import check_counts, conformal_radius
from .distributions import DEFAULT_LEVELS, find_distribution
from .forecaster_checks import (
    check_future,
    check_intervals,
    check_recent,
    check_samples,
    check_settings,
    validation_part,
)
from .inputs import Source, as_dataset, like_source
from .models import create_model
from .models.layers import check_quantiles
from .rollout import (
    backtest_origins,
    forecast_dataset,
    prepare,
    progress_bar,
    run_windows,
    target_end,
    yardstick,
)
from .schema import COVARIATES
from .splits import Cut

if TYPE_CHECKING:
    from .windows import Fill, Windows

__all__ = ["Forecaster"]

P = ParamSpec("P")
R = TypeVar("R")


def _with_threads(method: Callable[P, R]) -> Callable[P, R]:
    """Run a method of `Forecaster` on its number of threads, and restore the number before."""

    @functools.wraps(method)
    def limited(*args: P.args, **kwargs: P.kwargs) -> R:
        before, wanted = torch.get_num_threads(), args[0].threads  # type: ignore[attr-defined]
        if wanted:
            torch.set_num_threads(wanted)
        try:
            return method(*args, **kwargs)
        finally:
            torch.set_num_threads(before)

    return limited


class Forecaster:
    """A model with all it needs to read series and to write forecasts.

    Args:
        model: Name of a model, see `list_models`.
        lookback: Steps seen.
        horizon: Steps forecast at once.
        scaler: "standard", "robust", "minmax", "log1p" or "none", per series and variate.
        loss: "mse", "mae", "huber", "pinball" (implied by quantiles) or "nll", the negative log-likelihood (implied by
            a distribution).
        quantiles: Ascending levels in (0, 1) for a probabilistic model; None gives a point forecast, around which
            `fit` puts split-conformal intervals. With a distribution they are the levels of its quantiles that a
            forecast holds, None: seven from 0.025 to 0.975.
        fill: What stands at missing inputs: "zero" after scaling or "forward" for the last observed value; no matter to
            a model that normalises each window, where they stand at its mean, nor to the naive ones.
        seed: Seed of weights and order; the same seed gives the same forecaster.
        model_args: The model's own options.
        calendar: Give the model calendar features of past and horizon; for models that read covariates (Chimera).
        fourier: Periods in steps, for each of which such a model gets a sine and a cosine.
        ids: What the `unique_id`s of a long frame are: "variates" of one system, or separate "series".
        distribution: "normal", "student_t", or "negative_binomial" for counts, which need scaler="none": the model
            forecasts its parameters.
        threads: Threads of torch on the CPU while this object computes; these models are fastest on one, above all on a
            busy machine. None leaves torch's setting.
        trainer: Options of `pytorch_lightning.Trainer`, e.g. accelerator="gpu".

    Attributes:
        net: The network, after `fit` or `load`.
        history: DataFrame with one row per epoch, after `fit`.
        intervals: {"coverages": [...], "radius": (coverage, variate, horizon)} in scaled units, or None.

    Raises:
        ValueError: for an unknown model or distribution, with close names, for a scaler of counts, and for no threads.
    """

    def __init__(
        self,
        model: str = "chimera_tiny",
        lookback: int = 96,
        horizon: int = 24,
        scaler: str = "standard",
        loss: str = "mse",
        quantiles: Sequence[float] | None = None,
        fill: Fill = "zero",
        seed: int = 0,
        model_args: dict[str, Any] | None = None,
        calendar: bool = False,
        fourier: Sequence[float] = (),
        ids: Literal["variates", "series"] = "variates",
        distribution: str | None = None,
        threads: int | None = 1,
        **trainer: Any,
    ) -> None:
        check_settings(model, scaler, distribution, threads)
        if distribution is not None and quantiles is None:
            quantiles = DEFAULT_LEVELS
        self.model, self.lookback, self.horizon, self.distribution = model, lookback, horizon, distribution
        self.scaler, self.loss, self.quantiles, self.fill = scaler, loss, check_quantiles(quantiles), fill
        self.seed, self.model_args, self.calendar = seed, dict(model_args or {}), calendar
        self.fourier, self.ids, self.threads, self.trainer = tuple(fourier), ids, threads, trainer
        self.net: nn.Module | None = None
        self.state: dict[str, Any] = {}
        self.history = pd.DataFrame()
        self.intervals: dict[str, Any] | None = None
        self._source: Source | None = None
        self._fit_options: dict[str, Any] = {}
        self._args: dict[str, Any] = {}  # all arguments of the network

    @_with_threads
    def fit(
        self,
        data: Any,
        val: Any = 0.2,
        *,
        max_epochs: int = 10,
        early_stopping: int | None = 3,
        batch_size: int = 32,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        schedule: Literal["cosine", "halving", "constant"] = "cosine",
        ema: float | None = None,
        coverages: Sequence[float] | Literal["auto"] | None = "auto",
        progress: bool = True,
    ) -> Forecaster:
        """Train on what lies before the validation part, and keep the epoch with the least validation loss.

        Args:
            data: Dataset in the schema, DataArray, long or wide frame, or path of a file. A missing `past`
                covariate counts as its mean.
            val: Last part of the data kept for validation: a share (float), a number of steps (int) or the date from
                which on; or data of its own, as in `data`. None trains on everything, without early stopping and
                intervals.
            max_epochs: Passes over the training windows at most.
            early_stopping: Stop after so many epochs without improvement; None never does.
            batch_size: Windows per step.
            lr: Learning rate of AdamW.
            weight_decay: Its decay.
            schedule: "cosine" (short warm-up, then down to zero), "halving" (after each epoch) or "constant".
            ema: Decay of an exponential average of the weights, which then replaces them; None uses them as they are.
            coverages: Coverages of the split-conformal intervals of a point model, from the residuals on the validation
                part (by which training has also chosen its epoch; `calibrate` takes data that are quite unseen). "auto"
                makes those of 0.5, 0.8 and 0.95 for which there are enough residuals, None makes none.
            progress: Show a bar on stderr where that is a terminal.

        Returns:
            Itself.

        Raises:
            ValueError: for data that violate the schema or are too short, for options that do not fit together, and,
                before any training, for coverages that need more residuals.
            TypeError: for an option of the constructor that neither this class nor the trainer has, and for `val` of
                another kind.
        """
        from .fitting import MemoryData, check_trainer, create_task, train

        check_trainer(self.trainer)
        if max_epochs < 1:
            raise ValueError(f"expected max_epochs of at least 1, got {max_epochs}")
        source = as_dataset(data, self.ids)
        separate, part, refit_part = validation_part(val, source.dataset, self.ids)
        memory = MemoryData(
            source.dataset,
            separate,
            lookback=self.lookback,
            horizon=self.horizon,
            batch_size=batch_size,
            eval_batch_size=256,
            train=None,
            val=part,
            test=0,
            scaler=self.scaler,
            fill=self.fill,
            calendar=self.calendar,
            fourier=self.fourier,
            seed=self.seed,
        )
        memory.setup()
        validate = separate is not None or "val" in memory.parts
        intervals = validate and coverages and not self.quantiles
        if intervals and coverages != "auto":
            seen = [batch.y_mask.sum(dim=0).numpy() for batch in memory.windows("val").batches(1024)]
            for coverage in coverages or ():
                check_counts(np.sum(seen, axis=0), coverage, memory.variates)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            task = create_task(
                self.model,
                self.model_args,
                memory,
                loss=self.loss,
                quantiles=self.quantiles,
                distribution=self.distribution,
                lr=lr,
                weight_decay=weight_decay,
                schedule=schedule,
            )
            rows: list[dict[str, float]] = []
            solve = getattr(task.net, "fit_windows", None)
            if callable(solve):
                solve(memory.windows("train"))
            elif task.trainable:
                rows = train(
                    memory,
                    task,
                    max_epochs=max_epochs,
                    early_stopping=early_stopping,
                    ema=ema,
                    validate=validate,
                    progress=progress,
                    trainer=self.trainer,
                )
        self.net, self.loss, self.history = task.net.cpu().eval(), task.loss, pd.DataFrame(rows)
        self.state, self._source, self._args = memory.state(), source, dict(task.args)
        self._fit_options = {
            "val": refit_part,
            "max_epochs": max_epochs,
            "early_stopping": early_stopping,
            "batch_size": batch_size,
            "lr": lr,
            "weight_decay": weight_decay,
            "schedule": schedule,
            "ema": ema,
            "coverages": coverages,
        }
        self.intervals = None
        if intervals:
            self._calibrate(memory.windows("val"), coverages or ())
        return self

    @_with_threads
    def calibrate(self, data: Any, coverages: Sequence[float] = (0.5, 0.8, 0.95)) -> Forecaster:
        """Set the split-conformal intervals from the residuals of all windows of `data`, which were not trained on.

        Args:
            data: As in `fit`; at least lookback + horizon steps.
            coverages: Coverages in (0, 1), one at least.

        Returns:
            Itself.

        Raises:
            ValueError: if the model has quantiles of its own, or there are too few residuals for a coverage.
        """
        from .rollout import create_windows

        if self.quantiles:
            raise ValueError("this model forecasts quantiles; conformal intervals are for models without")
        if not coverages:
            raise ValueError("expected at least one coverage, got none; e.g. calibrate(data, (0.8,))")
        self._network()
        ds = self._prepare(as_dataset(data, self.ids).dataset)
        targets = range(self.lookback, target_end(ds))
        self._calibrate(create_windows(ds, self.state, targets, self.horizon)[0], coverages)
        return self

    def _calibrate(self, windows: Windows, coverages: Sequence[float] | Literal["auto"]) -> None:
        forecasts = run_windows(self._network(), windows, self.horizon, self.horizon)
        parts = [np.where(batch.y_mask, batch.y, np.nan) for batch in windows.batches(1024)]
        residuals = np.concatenate(parts) - forecasts
        found: dict[str, Any] = {"coverages": [], "radius": []}
        for coverage in COVERAGES if coverages == "auto" else coverages:
            try:
                radius = conformal_radius(residuals, float(coverage), self.state["variates"])
            except ValueError as error:
                if coverages != "auto":
                    raise
                warnings.warn(f"left out: {error}", stacklevel=4)  # through the decorator, to the caller of fit
                continue
            found["coverages"].append(float(coverage))
            found["radius"].append(radius.tolist())
        self.intervals = found if found["coverages"] else None

    def _prepare(self, data: xr.Dataset) -> xr.Dataset:
        """`prepare` new data, and leave only the covariates that the model reads."""
        ds = prepare(data, self.state)
        if not self.reads("future"):
            ds = ds.isel(time=slice(0, target_end(ds)))
        names: tuple[Literal["past", "future"], ...] = ("past", "future")
        for name in names:
            read = self.reads(name)
            if not read:
                ds = ds.drop_dims(COVARIATES[name], errors="ignore")
            elif name not in ds:
                raise ValueError(
                    f"the model reads the {name} covariates {', '.join(read)}; the data lack the variable {name!r}"
                )
        return ds

    def reads(self, name: Literal["past", "future"]) -> list[str]:
        """Names of the covariates of the data that the network reads; those of the calendar are its own."""
        known = self.state["covariate_scalers"].get(name) if self._args.get(f"n_{name}") else None
        return list(known["variates"]) if known else []

    def needs_future(self) -> list[str]:
        """Names of the covariates known in advance that the network reads.

        Raises:
            ValueError: if it reads none.
        """
        names = self.reads("future")
        if not names:
            raise ValueError(
                f"this {self.model} reads no covariates known in advance; leave out `future`, or train a model that "
                "reads them on data with the variable 'future'"
            )
        return names

    def _network(self) -> nn.Module:
        if self.net is None:
            raise ValueError("this forecaster is not trained; call fit(data) or Forecaster.load(folder) first")
        return self.net

    @_with_threads
    def predict(
        self,
        data: Any = None,
        future: xr.Dataset | xr.DataArray | None = None,
        horizon: int | None = None,
        *,
        intervals: bool | None = None,
        samples: int = 0,
    ) -> Any:
        """Forecast what follows the end of the data.

        Args:
            data: As in `fit`, at least `lookback` steps; None takes the data of `fit`. All series are forecast from
                the last time of their common axis; where covariates known in advance run further, from that of the
                last target.
            future: Future-known covariates of the steps to forecast, where the data do not hold them already.
            horizon: Steps; beyond the trained horizon the model's own forecasts are fed back, without quantiles.
            intervals: True demands the conformal intervals, False leaves them out, None adds them if there are any.
            samples: Number of draws from the distribution, independent between steps and variates, as variable
                `samples`; the same seed draws the same.

        Returns:
            Forecast Dataset (`series, cutoff, horizon, variate[, quantile][, sample]`), or for a long frame a
            long frame with columns unique_id, ds, cutoff, MODEL, MODEL-q10, ... (without samples). With a distribution
            `mean` and its other parameters are variables too, unless the scaler is "log1p", of which only quantiles and
            samples come back, and `mean` is the median.

        Raises:
            ValueError: for data that do not fit the model, and for a series that ended more than a lookback before the
                others; the message says which part.
        """
        source = self._input(data)
        ds = self._prepare(source.dataset)
        if future is not None:
            self.needs_future()
        check_future(future)
        last = target_end(ds) - 1
        check_recent(ds, last, self.lookback)
        return like_source(self._forecast(ds, range(last, last + 1), horizon, future, intervals, samples), source)

    @_with_threads
    def backtest(
        self,
        data: Any = None,
        start: Cut | None = None,
        stride: int = 1,
        refit: bool | int = False,
        horizon: int | None = None,
        *,
        intervals: bool | None = None,
        samples: int = 0,
        progress: bool = True,
    ) -> Any:
        """Forecast from many past cutoffs, in batches, and keep what then came beside it.

        Args:
            data: As in `fit`; None takes the data of `fit` (of which the model has seen the training part).
            start: The first step to forecast: a time, a step number or a share of the data; None takes the first with
                a full lookback.
            stride: Steps from one cutoff to the next.
            refit: False keeps the model; n trains it anew on all data up to the cutoff, every n cutoffs.
            horizon: Steps to forecast; default the trained horizon.
            intervals: As in `predict`.
            samples: As in `predict`.
            progress: Show a bar on stderr where that is a terminal.

        Returns:
            As `predict`, with variables `target` and `observed`; only cutoffs whose horizon ends within the data.

        Raises:
            ValueError: if no cutoff has a full lookback before and a full horizon behind it.
        """
        source = self._input(data)
        ds = self._prepare(source.dataset)
        if refit < 0:
            raise ValueError(f"expected refit as False or a number of cutoffs of at least 1, got {refit}")
        steps = self.horizon if horizon is None else horizon
        origins = backtest_origins(ds.isel(time=slice(0, target_end(ds))), self.lookback, steps, start, stride)
        total = len(origins) * ds.sizes["series"]
        with progress_bar(total, "backtest", progress) as advance:
            if not refit:
                result = self._forecast(ds, origins, horizon, None, intervals, samples, advance)
            else:
                pieces = []
                for begin in range(0, len(origins), int(refit)):
                    group = origins[begin : begin + int(refit)]
                    model = self._refitted(ds.isel(time=slice(0, group[0] + 1)))
                    pieces.append(model._forecast(ds, group, horizon, None, intervals, samples, advance))
                result = self._joined(pieces, ds)
                result.attrs["refit"] = int(refit)
        return like_source(result, source)

    def _joined(self, pieces: list[xr.Dataset], ds: xr.Dataset) -> xr.Dataset:
        """Forecasts of several refits as one, measured by the scaler and the seasonal errors of the first fit."""
        if any("quantiles" not in piece for piece in pieces):  # a short validation part has too few residuals
            pieces = [piece.drop_dims("quantile", errors="ignore").assign_attrs(intervals="none") for piece in pieces]
        result = xr.concat(
            pieces,
            "cutoff",
            data_vars="minimal",
            coords="minimal",
            compat="override",
            join="inner",  # quantile levels that all have
            combine_attrs="override",
        )
        coords, scaler = yardstick(ds, self.state)
        return result.assign_coords(coords).assign_attrs(scaler=scaler)

    def _refitted(self, ds: xr.Dataset) -> Forecaster:
        """A forecaster of the same options, trained on `ds`."""
        if not self._fit_options:
            raise ValueError("a loaded forecaster holds no training options; call fit, or leave refit out")
        settings = {key: getattr(self, key) for key in _SETTINGS}
        return Forecaster(**settings, **self.trainer).fit(ds, **self._fit_options, progress=False)

    def _input(self, data: Any) -> Source:
        self._network()
        if data is not None:
            return as_dataset(data, self.ids)
        if self._source is None:
            raise ValueError("a loaded forecaster holds no data; pass the series to forecast")
        return self._source

    def _forecast(
        self,
        ds: xr.Dataset,
        origins: range,
        horizon: int | None,
        future: xr.Dataset | xr.DataArray | None,
        intervals: bool | None,
        samples: int = 0,
        advance: Any = None,
    ) -> xr.Dataset:
        horizon = self.horizon if horizon is None else horizon
        if samples:
            check_samples(self.distribution, self.horizon, horizon)
        found = bool(self.quantiles) or self.intervals is not None
        if intervals:
            check_intervals(found, self.horizon, horizon)
        usable = found and horizon <= self.horizon
        attrs = {
            "model": self.model,
            "model_args": json.dumps(self.model_args),
            "seed": self.seed,
            "omnissm": version("omnissm"),
        }
        return forecast_dataset(
            self._network(),
            ds,
            self.state,
            origins,
            horizon,
            future=future,
            quantiles=self.quantiles,
            intervals=self.intervals if usable and intervals is not False else None,
            distribution=find_distribution(self.distribution),
            samples=samples,
            seed=self.seed,
            attrs=attrs,
            advance=advance,
        )

    def evaluate(
        self,
        forecast: Any,
        metrics: str | Sequence[str] = ("mse", "mae"),
        by: str | Sequence[str] = ("variate", "horizon"),
    ) -> xr.Dataset:
        """Errors of a forecast Dataset; see `omnissm.timeseries.evaluate`."""
        from .forecast import evaluate

        return evaluate(forecast, metrics, by)

    def save(self, path: str | Path) -> Path:
        """Write a model folder (config.json, model.safetensors, data.json, README.md), whole or not at all.

        Raises:
            ValueError: if `path` holds something else than a model folder.
        """
        net = self._network()
        task = {"loss": self.loss, "quantiles": list(self.quantiles), "seed": self.seed, "ids": self.ids}
        config = {"model": f"timeseries/{self.model}", "args": self._args, "task": task}
        data = json.dumps({**self.state, "intervals": self.intervals}, indent=1) + "\n"
        return save_model_folder(path, net.state_dict(), config, {"data.json": data})

    @classmethod
    def load(cls, path: str | Path) -> Forecaster:
        """Read a model folder written by `save`, by `fit` on the command line or by `export`.

        Raises:
            FileNotFoundError: if it is no model folder.
            ValueError: if a file is damaged, or it holds no forecaster.
        """
        folder = read_model_folder(path)
        domain, _, model = folder.config["model"].partition("/")
        if domain != "timeseries" or "data.json" not in folder.files:
            raise ValueError(
                f"{str(path)!r} holds {folder.config['model']}, expected a timeseries model with data.json"
            )
        try:
            state = json.loads(folder.files["data.json"])
        except ValueError as error:
            raise ValueError(f"{Path(path) / 'data.json'} is damaged: {error}; export the model again") from error
        args, task = dict(folder.config["args"]), folder.config.get("task", {})
        net = create_model(model, **args)
        load_weights(net, folder.state, source=str(path))
        own = {k: v for k, v in args.items() if k not in _FROM_DATA}
        distribution = args.get("distribution")
        forecaster = cls(
            model,
            args["lookback"],
            args["horizon"],
            scaler=state["scaler"]["kind"],
            loss=task.get("loss", "mse"),
            quantiles=task["quantiles"] if distribution else args.get("quantiles"),
            distribution=distribution,
            fill=state["fill"],
            seed=task.get("seed", 0),
            model_args=own,
            calendar=state["time_features"]["calendar"],
            fourier=state["time_features"]["fourier"],
            ids=task.get("ids", "variates"),
        )
        forecaster.net, forecaster.intervals = net.eval(), state.pop("intervals", None)
        forecaster.state, forecaster._args = state, args
        return forecaster


COVERAGES = (0.5, 0.8, 0.95)
_FROM_DATA = ("lookback", "horizon", "n_variates", "quantiles", "distribution", "n_past", "n_future", "n_static")
_SETTINGS = (
    "model", "lookback", "horizon", "scaler", "loss", "quantiles", "fill", "seed", "model_args", "calendar",
    "fourier", "ids", "distribution", "threads",
)  # fmt: skip
