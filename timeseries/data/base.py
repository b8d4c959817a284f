"""The data module that all forecasting sets share: read, split by time, scale by the training part, cut windows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import xarray as xr
from torch.utils.data import DataLoader

from ...ssmcore.training import SSMData
from ..freq import base_step, infer_freq, normalize_freq, season_length
from ..metrics import seasonal_errors
from ..scaling import Scaler, create_scaler
from ..schema import COVARIATES, SCHEMA_VERSION, canonical, validate
from ..splits import Cut, Part, split
from ..time_features import PREFIX, add_time_features
from ..windows import Fill, WindowBatch, Windows, as_is

PartName = Literal["train", "val", "test"]


class ForecastingData(SSMData):
    """Windows of one data set in scaled units; a subclass says in `read` where the series come from.

    Args:
        lookback: Input steps of a window.
        horizon: Target steps of a window.
        batch_size: Windows in a training batch.
        eval_batch_size: Windows in a validation or test batch; `batch_size` when None.
        train: Size of the training part, see `splits.split`; all three None take the customary borders of the set.
        val: Size of the validation part.
        test: Size of the test part.
        scaler: "standard", "robust", "minmax", "log1p" or "none", fitted on the training part.
        scaler_shared: One scale for all series instead of one for each, so that new series can be forecast.
        fill: What stands at missing inputs: "zero" after scaling, or "forward" for the last observed value.
        stride: Steps between training windows; validation and test always use every window.
        min_observed: Share of observed targets that a training window needs.
        drop_incomplete: Leave out training windows with any missing value.
        calendar: Add calendar features as future-known covariates.
        fourier: Periods in steps, each of which adds a sine and a cosine to these covariates.
        time_zone: Zone whose local time the calendar follows, for times in UTC.
        seed: Order of the training windows.
        num_workers: Loader processes; 0 is usually fastest since a batch is one indexing step.

    Raises:
        ValueError: if lookback, horizon or a batch size is below 1.
    """

    lazy: bool = False  # a subclass sets it where windows are read from the file one by one

    def __init__(
        self,
        lookback: int = 96,
        horizon: int = 96,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        train: int | float | str | None = None,
        val: int | float | str | None = None,
        test: int | float | str | None = None,
        scaler: str = "standard",
        scaler_shared: bool = False,
        fill: Fill = "zero",
        stride: int = 1,
        min_observed: float = 0.0,
        drop_incomplete: bool = False,
        calendar: bool = False,
        fourier: Sequence[float] = (),
        time_zone: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"lookback": lookback, "horizon": horizon, "batch_size": batch_size, "eval_batch_size": eval_batch_size}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        self.lookback, self.horizon = lookback, horizon
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        given = train is not None or val is not None or test is not None
        self.cuts: dict[str, Cut | None] = {"train": train, "val": val, "test": test} if given else self.borders()
        self.scaler_shared = scaler_shared
        self.fill, self.stride = fill, stride
        self.min_observed, self.drop_incomplete = min_observed, drop_incomplete
        self.calendar, self.fourier, self.time_zone = calendar, tuple(fourier), time_zone
        self.seed, self.num_workers = seed, num_workers
        self.scaler: Scaler = create_scaler(scaler, shared=scaler_shared)
        self.covariate_scalers: dict[str, Scaler] = {}
        self.parts: dict[str, Part] = {}
        self._windows: dict[str, Windows] = {}

    def borders(self) -> dict[str, Cut | None]:
        """Sizes of the parts where none are given: 70 %, the rest, 20 %."""
        return {"train": 0.7, "val": None, "test": 0.2}

    @abstractmethod
    def read(self) -> xr.Dataset:
        """The whole data set in the schema; without attribute `freq` it has the one that its times follow exactly."""

    @cached_property
    def dataset(self) -> xr.Dataset:
        """The whole data set in canonical form, with the time features asked for; read at first use."""
        ds = self.read()
        validate(ds)
        if ds.attrs.get("freq") is None and (freq := infer_freq(ds["time"].to_numpy())) is not None:
            ds = ds.assign_attrs(freq=freq)
        if self.lazy:
            return ds
        ds = canonical(ds)
        if self.calendar or self.fourier:
            ds = add_time_features(
                ds, calendar=self.calendar, fourier=self.fourier, zone=self.time_zone, base_step=_base_step(ds)
            )
        return ds

    @property
    def variates(self) -> list[str]:
        """Names of the variates, in the order of dimension i of a batch."""
        return [str(name) for name in self.dataset["variate"].to_numpy()]

    @property
    def n_variates(self) -> int:
        """Number of variates."""
        return len(self.variates)

    @property
    def covariates(self) -> dict[str, int]:
        """Numbers of "past", "future" and "static" covariates in a batch."""
        sizes = self.dataset.sizes
        return {kind: sizes.get(f"{kind}_feature", 0) for kind in ("past", "future", "static")}

    @property
    def freq(self) -> str | int | None:
        """Frequency of the series; None when irregular."""
        freq = self.dataset.attrs.get("freq")
        return None if freq is None else normalize_freq(freq)

    @property
    def base_step(self) -> float | None:
        """Median step of irregular times, nanoseconds or integers, that gaps and Fourier periods are counted in."""
        return _base_step(self.dataset)

    @property
    def season(self) -> int:
        """Usual season length in steps, see `schema.season_length`."""
        return season_length(self.freq)

    def setup(self, stage: str | None = None) -> None:
        """Split, and fit the scalers on the observed values of the training part."""
        if self.parts:
            return
        self.parts = split(self._with_targets(), **self.cuts, lookback=self.lookback)
        fitted = self._fitted()
        self.scaler.fit(fitted)
        self.covariate_scalers = {
            name: create_scaler("standard", shared=self.scaler_shared).fit(fitted, name)
            for name in COVARIATES
            if name in fitted and not (name == "future" and self._only_time_features())
        }

    def _with_targets(self) -> xr.Dataset:
        """The data set without the steps behind the last target, which only known-in-advance covariates reach."""
        if "future" not in self.dataset or self.lazy:
            return self.dataset
        seen = self.dataset["observed"].any(("series", "variate")).to_numpy()
        return self.dataset.isel(time=slice(0, len(seen) - int(seen[::-1].argmax())))

    def _fitted(self) -> xr.Dataset:
        """The training part, or the first one where there is none."""
        return self.parts["train" if "train" in self.parts else next(iter(self.parts))].dataset

    def _only_time_features(self) -> bool:
        return all(str(name).startswith(PREFIX) for name in self.dataset["future_feature"].to_numpy())

    def windows(self, part: PartName) -> Windows:
        """The windows of a part, in scaled units."""
        self.setup()
        if part not in self.parts:
            raise ValueError(
                f"This data set has no part {part!r}, only {', '.join(self.parts)}; give it a size with `{part}`."
            )
        if part not in self._windows:
            training = part == "train"
            dataset, targets = self.parts[part]
            self._windows[part] = Windows(
                dataset,
                self.lookback,
                self.horizon,
                targets=targets,
                stride=self.stride if training else 1,
                fill=self.fill,
                lazy=self.lazy,
                base_step=self.base_step,
                scaler=self.scaler,
                covariate_scalers=self.covariate_scalers,
                min_observed=self.min_observed if training else 0.0,
                drop_incomplete=training and self.drop_incomplete,
            )
        return self._windows[part]

    def train_dataloader(self) -> DataLoader[WindowBatch]:
        """Training windows in a seeded random order."""
        return self._loader("train", self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[WindowBatch] | list[DataLoader[WindowBatch]]:
        """Every validation window in order; nothing in a fit on data without that part."""
        self.setup()
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        return [] if fitting and "val" not in self.parts else self._loader("val", self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[WindowBatch]:
        """Every test window in order."""
        return self._loader("test", self.eval_batch_size)

    def _loader(self, part: PartName, batch_size: int, *, shuffle: bool = False) -> DataLoader[WindowBatch]:
        return self.create_loader(
            self.windows(part), batch_size, shuffle=shuffle, num_workers=self.num_workers, collate_fn=as_is
        )

    def predict_dataloader(self) -> DataLoader[WindowBatch]:
        """The test windows."""
        return self.test_dataloader()

    def state(self) -> dict[str, Any]:
        """What a saved model must know of its data, as plain JSON values."""
        self.setup()
        return {
            "schema_version": SCHEMA_VERSION,
            "lookback": self.lookback,
            "horizon": self.horizon,
            "variates": self.variates,
            "series": self.scaler.series,
            "freq": self.freq,
            "base_step": self.base_step,
            "season": self.season,
            "fill": self.fill,
            "seasonal_errors": seasonal_errors(self._fitted(), self.season),
            "scaler": self.scaler.to_dict(),
            "covariate_scalers": {name: scaler.to_dict() for name, scaler in self.covariate_scalers.items()},
            "time_features": {"calendar": self.calendar, "fourier": list(self.fourier), "zone": self.time_zone},
        }


def _base_step(ds: xr.Dataset) -> float | None:
    return base_step(ds["time"].to_numpy()) if ds.attrs.get("freq") is None else None
