"""Data modules of labelled series: UEA/UCR `.ts` files, and a synthetic set."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from torch.utils.data import DataLoader

from ...ssmcore.training import SSMData
from ..labelled import LabelledSeries, SeriesBatch, labels_of, series_scaling
from ..schema import SCHEMA_VERSION
from ..ts_files import read_ts

__all__ = ["UEA", "ClassificationData", "SyntheticClasses", "create_waves"]


class ClassificationData(SSMData):
    """Whole series with labels, scaled by the training series; a subclass says in `read` where they come from.

    Args:
        batch_size: Series in a training batch.
        eval_batch_size: Series in a validation or test batch.
        val: Share of the training series held out for validation, drawn from each class; 0 holds out none, and the
            last weights are kept: no epoch is ever chosen by the test series.
        seed: Of that draw, and of the order.
        num_workers: Loader processes.
    """

    def __init__(
        self,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        val: float = 0.2,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= val < 1:
            raise ValueError(f"val is a share in [0, 1), got {val}")
        self.batch_size, self.eval_batch_size, self.val = batch_size, eval_batch_size, val
        self.seed, self.num_workers = seed, num_workers

    @abstractmethod
    def read(self, part: Literal["train", "test"]) -> xr.Dataset:
        """Series of a part with `label`."""

    @cached_property
    def parts(self) -> dict[str, xr.Dataset]:
        """The parts "train", "val" (if any is held out) and "test"; read at first use."""
        train, test = self.read("train"), self.read("test")
        if not self.val:
            return {"train": train, "test": test}
        kept, held = _stratified(train["label"].to_numpy(), self.val, np.random.default_rng(self.seed))
        return {"train": train.isel(series=kept), "val": train.isel(series=held), "test": test}

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes."""
        train = self.parts["train"]
        if "class" in train.dims:
            return [str(name) for name in train["class"].to_numpy()]
        named = train.attrs.get("classes", [])
        named = [named] if isinstance(named, str) else list(named)
        return named or sorted({str(name) for name in train["label"].to_numpy()})

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def n_variates(self) -> int:
        """Number of variates."""
        return self.parts["train"].sizes["variate"]

    @cached_property
    def scaling(self) -> np.ndarray:
        """Mean and scale of each variate of the training series."""
        return series_scaling(self.parts["train"])

    def series(self, part: str) -> LabelledSeries:
        """The series of a part, in scaled units.

        Raises:
            ValueError: if there is no such part.
        """
        if part not in self.parts:
            raise ValueError(f"there is no part {part!r}, only {', '.join(self.parts)}; give `val` a share above 0")
        ds = self.parts[part]
        return LabelledSeries(ds, self.scaling, labels_of(ds, self.classes))

    def _loader(self, part: str, batch_size: int, *, shuffle: bool = False) -> DataLoader[SeriesBatch]:
        return self.create_loader(
            self.series(part), batch_size, shuffle=shuffle, num_workers=self.num_workers, collate_fn=_as_is
        )

    def train_dataloader(self) -> DataLoader[SeriesBatch]:
        """Training series in a seeded random order."""
        return self._loader("train", self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[SeriesBatch] | list[DataLoader[SeriesBatch]]:
        """Validation series in order; nothing in a fit that holds out none."""
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        return [] if fitting and "val" not in self.parts else self._loader("val", self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[SeriesBatch]:
        """Test series in order."""
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[SeriesBatch]:
        """The test series."""
        return self.test_dataloader()

    def state(self) -> dict[str, Any]:
        """What a saved classifier must know of its data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "classes": self.classes,
            "variates": [str(name) for name in self.parts["train"]["variate"].to_numpy()],
            "mean": self.scaling[0].tolist(),
            "scale": self.scaling[1].tolist(),
        }


class UEA(ClassificationData):
    """A set of the UEA or UCR archive: NAME_TRAIN.ts and NAME_TEST.ts.

    Args:
        root: Folder with the two files, or with a folder NAME that holds them.
        name: Name of the set, e.g. BasicMotions.
        options: Arguments of `ClassificationData`.
    """

    def __init__(self, root: str, name: str, **options: Any) -> None:
        super().__init__(**options)
        self.root, self.set = root, name

    def read(self, part: Literal["train", "test"]) -> xr.Dataset:
        """One of the two files.

        Raises:
            FileNotFoundError: naming the folder layout and where the archive is.
        """
        file = f"{self.set}_{part.upper()}.ts"
        for folder in (Path(self.root), Path(self.root) / self.set):
            if (folder / file).is_file():
                return read_ts(folder / file)
        raise FileNotFoundError(
            f"no {file} in {self.root!r} or {self.set} below it; the archive is at "
            "https://www.timeseriesclassification.com, and the packages aeon and sktime hold two of its sets"
        )


class SyntheticClasses(ClassificationData):
    """Waves of unequal length whose class is the variate that leads, see `create_waves`.

    Args:
        train_series: Number of series to train on.
        test_series: Number of series to test on.
        variate_count: Number of variates, and of classes.
        length: Longest series.
        noise: Standard deviation of white noise.
        data_seed: Seed of the series.
        options: Arguments of `ClassificationData`.
    """

    def __init__(
        self,
        train_series: int = 96,
        test_series: int = 96,
        variate_count: int = 3,
        length: int = 40,
        noise: float = 0.3,
        data_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.sizes = {"train": train_series, "test": test_series}
        self.variate_count, self.length, self.noise, self.data_seed = variate_count, length, noise, data_seed

    def read(self, part: Literal["train", "test"]) -> xr.Dataset:
        """The generated series."""
        seed = 2 * self.data_seed + (part == "test")
        return create_waves(self.sizes[part], self.variate_count, self.length, self.noise, seed)


def create_waves(series: int, variates: int, length: int, noise: float = 0.3, seed: int = 0) -> xr.Dataset:
    """Noisy sines of unequal length; the variate of class k runs a quarter period ahead of all others.

    No variate alone tells the class, since phases are random: only their comparison does. One value in 20 is missing.

    Args:
        series: Number of series.
        variates: Number of variates, and of classes.
        length: Longest series; the shortest has half of it.
        noise: Standard deviation of white noise.
        seed: Seed.

    Raises:
        ValueError: if a number is below 1.
    """
    if min(series, variates, length) < 1:
        raise ValueError(f"expected at least 1 series, variate and step, got {series}, {variates} and {length}")
    rng = np.random.default_rng(seed)
    label = np.arange(series) % variates
    lengths = rng.integers(length // 2, length + 1, series)
    shift = np.where(np.arange(variates) == label[:, None], np.pi / 2, 0.0)[:, None]
    steps, phase = np.arange(length)[:, None], rng.uniform(0, 2 * np.pi, (series, 1, 1))
    values = np.sin(2 * np.pi * steps / 16 + phase + shift) + noise * rng.standard_normal((series, length, variates))
    missing = (rng.random(values.shape) < 0.05) | (steps >= lengths[:, None, None])
    target = np.where(missing, np.nan, values).astype(np.float32)
    names = [f"x{k}" for k in range(variates)]
    coords = {
        "series": [str(k) for k in range(series)],
        "time": np.arange(length),
        "variate": names,
        "length": ("series", lengths),
    }
    variables = {"target": (("series", "time", "variate"), target), "label": ("series", np.array(names)[label])}
    return xr.Dataset(variables, coords, {"freq": 1, "name": "waves", "classes": names})


def _stratified(label: np.ndarray, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Places to keep and to hold out, of each label the same share and at least one series where it has two."""
    if label.ndim > 1:
        order = rng.permutation(len(label))
        count = max(1, round(share * len(label)))
        return np.sort(order[count:]), np.sort(order[:count])
    held = []
    for name in np.unique(label):
        places = rng.permutation(np.flatnonzero(label == name))
        held.append(places[: min(len(places) - 1, max(1, round(share * len(places))))])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(label)), out), out


def _as_is(batch: SeriesBatch) -> SeriesBatch:
    return batch
