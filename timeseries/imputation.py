"""Filling gaps: a task that learns from observed values it hides, an `Imputer` without YAML, and simple methods.

Training hides blocks of observed steps, the model sees the rest, and the loss counts hidden steps only. A filled
series keeps what was observed; values in gaps are averages over overlapping windows, weighted towards their middles.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import xarray as xr
from torch import Tensor, nn

from ..ssmcore.training import SSMTask, load_weights, save_model_folder
from ..ssmcore.training.optim import LRSchedulerCallable, OptimizerCallable
from .inputs import as_dataset
from .kalman import Missing, kalman_impute
from .loading import read_run
from .models import create_model
from .scaling import Scaler
from .schema import canonical, validate
from .windows import WindowBatch

Array = npt.NDArray[Any]

__all__ = ["METHODS", "Imputation", "Imputer", "compare_imputations", "hide", "hide_blocks"]


def hide(mask: Tensor, share: float, longest: int, generator: torch.Generator | None = None) -> Tensor:
    """Choose blocks of observed steps to hide.

    Args:
        mask: (b, i, l), True where observed.
        share: Share of the blocks of each variate that are hidden.
        longest: Blocks have one length in a batch, drawn from 1 to this.
        generator: Random numbers.

    Returns:
        (b, i, l) bool, True only where `mask` is.
    """
    draw = functools.partial(torch.randint, generator=generator, size=(1,))
    size = int(draw(1, longest + 1))
    blocks = torch.rand(*mask.shape[:2], mask.shape[2] // size + 2, generator=generator) < share
    start = int(draw(0, size))
    hidden = blocks.repeat_interleave(size, dim=-1)[..., start : start + mask.shape[2]]
    return hidden.to(mask.device) & mask


class Imputation(SSMTask):
    """Train an imputer on the inputs of windows; their targets are not read, so a horizon of 1 is best.

    Logs `train/loss`, and for validation and test `loss` and `rmse`, of hidden steps in scaled units; of their windows
    only steps count that belong to the part, not those before it, which training may have seen.

    Args:
        model: Name of an imputer, see `list_models(task="imputation")`.
        model_args: Its own options.
        lookback: Steps of a window; taken from the data module on the command line.
        n_variates: Number of variates; taken from the data module.
        share: Share of the observed steps that are hidden.
        longest: Longest block that is hidden, in steps.
        optimizer: Called with the parameter groups.
        lr_scheduler: Called with the optimiser.
        compile: Compile the model.
        check_finite: Stop at a loss or gradient that is not finite.

    Raises:
        ValueError: if an option is out of range or the model unknown.
    """

    def __init__(
        self,
        model: str = "sequence_imputer",
        model_args: dict[str, Any] | None = None,
        lookback: int = 96,
        n_variates: int = 1,
        share: float = 0.25,
        longest: int = 12,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        compile: bool = False,
        check_finite: bool = True,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, compile, check_finite)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        if not 0 < share < 1:
            raise ValueError(f"share is that of hidden steps, inside (0, 1), got {share}")
        if not 1 <= longest < lookback:
            raise ValueError(f"longest must lie in 1 to {lookback - 1} (below the lookback), got {longest}")
        self.model, self.share, self.longest = model, share, longest
        self.args: dict[str, Any] = {"n_variates": n_variates, "lookback": lookback, **(model_args or {})}
        self.net = create_model(model, task="imputation", **self.args)
        self.sums = {"val": torch.zeros(2, dtype=torch.float64), "test": torch.zeros(2, dtype=torch.float64)}

    def forward(self, batch: WindowBatch) -> Tensor:
        """(b, i, lookback)."""
        return self.net(batch)

    def model_config(self) -> dict[str, Any]:
        """Name and arguments that rebuild the network."""
        return {
            "model": f"timeseries/{self.model}",
            "args": dict(self.args),
            "task": {"kind": "imputation", "share": self.share, "longest": self.longest},
        }

    def errors(
        self, batch: WindowBatch, generator: torch.Generator | None = None, begin: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Sum of squared errors at newly hidden steps from step `begin` of the time axis on, and their number."""
        hidden = hide(batch.x_mask, self.share, self.longest, generator)
        kept = batch.x_mask & ~hidden
        y = self.net(batch._replace(x=torch.where(kept, batch.x, 0.0), x_mask=kept))
        length = batch.x.shape[-1]
        steps = batch.origin[:, None] + torch.arange(1 - length, 1, device=batch.x.device)  # (b, l)
        counted = hidden & (steps >= begin)[:, None]
        return torch.where(counted, y - batch.x, 0.0).square().sum(), counted.sum()

    def training_step(self, batch: WindowBatch, batch_idx: int) -> Tensor:
        """Mean squared error at the hidden steps of the batch."""
        total, count = self.errors(batch)
        loss = total / count.clamp(min=1)
        self.log_loss(loss, max(1, int(count)))
        return loss

    def validation_step(self, batch: WindowBatch, batch_idx: int) -> None:
        """Add one batch; the same steps are hidden in every epoch."""
        self._add("val", batch, batch_idx)

    def test_step(self, batch: WindowBatch, batch_idx: int) -> None:
        """Add one batch; the same steps are hidden in every run."""
        self._add("test", batch, batch_idx)

    def predict_step(self, batch: WindowBatch, batch_idx: int) -> Tensor:
        """Values of whole windows in scaled units."""
        return self.net(batch)

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        self.sums["val"].zero_()

    def on_test_epoch_start(self) -> None:
        """Start the sums anew."""
        self.sums["test"].zero_()

    def on_validation_epoch_end(self) -> None:
        """Log the error of all validation windows."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log the error of all test windows."""
        self._report("test")

    def _add(self, part: str, batch: WindowBatch, batch_idx: int) -> None:
        found = self.errors(batch, torch.Generator().manual_seed(batch_idx), self._begin(part))
        self.sums[part] += torch.stack([value.double().cpu() for value in found])

    def _begin(self, part: str) -> int:
        """First step of a part: its windows reach back into the one before, if there is one."""
        parts = getattr(self.trainer.datamodule, "parts", {})  # type: ignore[attr-defined]
        return parts[part].targets.start if part in list(parts)[1:] else 0

    def _report(self, part: str) -> None:
        total, count = self.trainer.strategy.reduce(self.sums[part].to(self.device), reduce_op="sum").tolist()
        loss = total / count if count else float("nan")
        self.log_dict({f"{part}/loss": loss, f"{part}/rmse": loss**0.5}, prog_bar=part == "val")


class Imputer:
    """Train an imputer and fill gaps with it.

    Args:
        model: Name of an imputer, see `list_models(task="imputation")`.
        window: Steps of a window.
        scaler: "standard", "robust", "minmax", "log1p" or "none", per series and variate.
        share: Share of the observed steps hidden in training.
        longest: Longest block hidden in training; near the length of the gaps to be filled is best.
        seed: Seed of weights, order and hiding.
        model_args: The model's own options.
        trainer: Options of `pytorch_lightning.Trainer`.
    """

    def __init__(
        self,
        model: str = "sequence_imputer",
        window: int = 96,
        scaler: str = "standard",
        share: float = 0.25,
        longest: int = 12,
        seed: int = 0,
        model_args: dict[str, Any] | None = None,
        **trainer: Any,
    ) -> None:
        self.model, self.window, self.scaler = model, window, scaler
        self.share, self.longest, self.seed = share, longest, seed
        self.model_args, self.trainer = dict(model_args or {}), trainer
        self.net: nn.Module | None = None
        self.state: dict[str, Any] = {}
        self.history = pd.DataFrame()
        self._config: dict[str, Any] = {}

    def fit(
        self,
        data: Any,
        val: float | int | None = 0.2,
        *,
        max_epochs: int = 20,
        early_stopping: int | None = 5,
        batch_size: int = 32,
        stride: int = 1,
        lr: float = 3e-3,
        weight_decay: float = 0.01,
        progress: bool = True,
    ) -> Imputer:
        """Train on what lies before the validation part, and keep the epoch with the least validation loss.

        Args:
            data: Dataset in the schema, DataArray, frame or path.
            val: Last part kept for validation, a share or a number of steps; None trains on everything.
            max_epochs: Passes over the windows at most.
            early_stopping: Stop after so many epochs without improvement; None never does.
            batch_size: Windows per step.
            stride: Steps between training windows.
            lr: Learning rate of AdamW.
            weight_decay: Its decay.
            progress: Show a bar on stderr where that is a terminal.

        Returns:
            Itself.
        """
        from ..ssmcore.training import WarmupCosine
        from .fitting import MemoryData, check_trainer, train

        check_trainer(self.trainer)
        memory = MemoryData(
            as_dataset(data).dataset,
            lookback=self.window,
            horizon=1,
            batch_size=batch_size,
            eval_batch_size=256,
            val=0 if val is None else val,
            test=0,
            scaler=self.scaler,
            stride=stride,
            seed=self.seed,
        )
        memory.setup()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            task = Imputation(
                self.model,
                self.model_args,
                self.window,
                memory.n_variates,
                self.share,
                self.longest,
                optimizer=functools.partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay),
                lr_scheduler=functools.partial(WarmupCosine, warmup=0.08),
            )
            rows = train(
                memory,
                task,
                max_epochs=max_epochs,
                early_stopping=early_stopping,
                ema=None,
                validate="val" in memory.parts,
                progress=progress,
                trainer=self.trainer,
            )
        self.net, self.history = task.net.cpu().eval(), pd.DataFrame(rows)
        self.state, self._config = memory.state(), task.model_config()
        return self

    @torch.no_grad()
    def impute(self, data: Any) -> xr.Dataset:
        """Fill the gaps of series.

        Args:
            data: As in `fit`.

        Returns:
            The data with a finite `target` where there was a gap, and `imputed` (bool), True there; without variates
            that the model does not know.

        Raises:
            ValueError: if this imputer is not trained, the data violate the schema, or a variate is missing.
        """
        if self.net is None:
            raise ValueError("this imputer is not trained; call fit(data) or Imputer.load(folder) first")
        ds = canonical(as_dataset(data).dataset)
        names = [str(name) for name in ds["variate"].to_numpy()]
        missing = [name for name in self.state["variates"] if name not in names]
        if missing:
            raise ValueError(f"the model was trained on the variate {missing[0]!r}, the data have {', '.join(names)}")
        ds = canonical(ds.sel(variate=self.state["variates"]))
        scaler = Scaler.from_dict(self.state["scaler"])
        rows = scaler.rows(ds)
        values = ds["target"].transpose("series", "variate", "time").to_numpy()
        scaled = scaler.transform(values, rows, axis=1)
        filled = np.stack([self._reconstruct(each) for each in scaled])
        target = np.where(np.isnan(values), scaler.inverse(filled, rows, axis=1), values)
        return _filled(ds, np.moveaxis(target, 1, 2), self.model)

    def _reconstruct(self, values: Array) -> Array:
        """One series (variate, time) in scaled units, NaN in gaps, as the model sees it at every step."""
        assert self.net is not None
        length, window = values.shape[1], self.window
        padded = np.pad(values, ((0, 0), (0, max(0, window - length))), constant_values=np.nan)
        starts = np.unique([*range(0, padded.shape[1] - window, max(1, window // 4)), padded.shape[1] - window])
        weight = np.minimum(np.arange(1, window + 1), np.arange(window, 0, -1)).astype(np.float64)
        total, weights = np.zeros(padded.shape), np.zeros(padded.shape[1])
        for first in range(0, len(starts), 128):
            some = starts[first : first + 128]
            x = np.stack([padded[:, start : start + window] for start in some]).astype(np.float32)
            y = self.net(_window_batch(x)).double().numpy()
            for start, each in zip(some, y):
                total[:, start : start + window] += each * weight
                weights[start : start + window] += weight
        return (total / weights)[:, :length]

    def save(self, path: str | Path) -> Path:
        """Write a model folder, whole or not at all.

        Raises:
            ValueError: if this imputer is not trained, or `path` holds something else.
        """
        if self.net is None:
            raise ValueError("this imputer is not trained; call fit(data) first")
        return save_model_folder(
            path, self.net.state_dict(), self._config, {"data.json": json.dumps(self.state, indent=1) + "\n"}
        )

    @classmethod
    def load(cls, path: str | Path) -> Imputer:
        """Read a model folder, the folder of a run, or a checkpoint.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it holds no imputer.
        """
        folder = read_run(path, "imputation")
        args, task = dict(folder.config["args"]), folder.config["task"]
        name, state = folder.config["model"].partition("/")[2], json.loads(folder.files["data.json"])
        own = {key: value for key, value in args.items() if key not in ("n_variates", "lookback")}
        imputer = cls(name, args["lookback"], state["scaler"]["kind"], task["share"], task["longest"], model_args=own)
        imputer.net = create_model(name, task="imputation", **args)
        load_weights(imputer.net, folder.state, source=str(path))
        imputer.net.eval()
        imputer.state, imputer._config = state, {key: folder.config[key] for key in ("model", "args", "task")}
        return imputer


def _window_batch(x: Array) -> WindowBatch:
    """Windows (b, i, l) with NaN in gaps as a batch without targets."""
    mask = ~np.isnan(x)
    values, observed = torch.from_numpy(np.where(mask, x, np.float32(0))), torch.from_numpy(mask)
    number = torch.zeros(len(x), dtype=torch.long)
    nothing = values[..., :0]
    return WindowBatch(values, observed, nothing, nothing.bool(), None, None, None, None, number, number)


def _filled(ds: xr.Dataset, target: Array, model: str) -> xr.Dataset:
    dims = ("series", "time", "variate")
    gaps = ~ds["observed"].transpose(*dims).to_numpy()
    return (
        ds.drop_vars("observed")
        .assign(target=(dims, target.astype(np.float32)), imputed=(dims, gaps & np.isfinite(target)))
        .assign_attrs(imputation=model)
    )


def _fill_last(values: Array) -> Array:
    return pd.DataFrame(values).ffill().bfill().to_numpy()


def _fill_linear(values: Array) -> Array:
    return pd.DataFrame(values).interpolate(limit_direction="both").to_numpy()


def _simple(name: str, fill: Callable[[Array], Array]) -> Callable[[xr.Dataset], xr.Dataset]:
    def apply(ds: xr.Dataset) -> xr.Dataset:
        validate(ds)
        ds = canonical(ds)
        values = ds["target"].transpose("series", "time", "variate").to_numpy().astype(np.float64)
        return _filled(ds, np.stack([fill(each) for each in values]), name)

    return apply


def _kalman(name: str, missing: Missing) -> Callable[[xr.Dataset], xr.Dataset]:
    def apply(ds: xr.Dataset) -> xr.Dataset:
        validate(ds)
        return _filled(canonical(ds), kalman_impute(ds, missing), name)

    return apply


# They need no training. A series without any value of a variate keeps this gap.
METHODS: dict[str, Callable[[xr.Dataset], xr.Dataset]] = {
    "last_value": _simple("last_value", _fill_last),
    "linear": _simple("linear", _fill_linear),
    "kalman": _kalman("kalman", "mar"),
    "kalman_mnar": _kalman("kalman_mnar", "mnar"),
}


def hide_blocks(ds: xr.Dataset, share: float = 0.1, length: int = 12, seed: int = 0) -> tuple[xr.Dataset, xr.DataArray]:
    """Take observed blocks out of a Dataset, to see how well they are found again.

    Args:
        ds: Dataset in the schema.
        share: Share of the blocks that go.
        length: Steps of a block.
        seed: Seed.

    Returns:
        The data with these values missing, and the values (NaN elsewhere), (series, time, variate).

    Raises:
        ValueError: if share or length is out of range, and if no value or all values of a variate would be hidden.
    """
    if not 0 < share < 1 or length < 1:
        raise ValueError(f"expected a share inside (0, 1) and a length of at least 1, got {share} and {length}")
    ds = canonical(ds)
    target = ds["target"].transpose("series", "time", "variate")
    series, steps, variates = target.shape
    rng = np.random.default_rng(seed)
    blocks = rng.random((series, steps // length + 1, variates)) < share
    hidden = np.repeat(blocks, length, axis=1)[:, :steps] & ds["observed"].to_numpy()
    if not hidden.any():
        raise ValueError(
            f"no block of {length} steps was hidden at share {share}; raise the share or shorten the blocks"
        )
    kept = target.where(~xr.DataArray(hidden, dims=target.dims))
    lost = (hidden.any(axis=(0, 1)) & kept.isnull().all(("series", "time"))).to_numpy()
    if lost.any():
        name = target["variate"].to_numpy()[lost.argmax()]
        raise ValueError(
            f"blocks of {length} steps at share {share} hide all values of {name}; lower it or shorten the blocks"
        )
    return canonical(ds.drop_vars("observed").assign(target=kept)), target.where(hidden)


def compare_imputations(truth: xr.DataArray, filled: dict[str, xr.Dataset]) -> pd.DataFrame:
    """Errors of several imputations at the same steps.

    Args:
        truth: Hidden values, NaN elsewhere; see `hide_blocks`.
        filled: Name to filled data, with `imputed`.

    Returns:
        A row per method: `rmse` and `mae` in units of each variate's standard deviation over its known values, hidden
        ones among them, and the number of values compared.

    Raises:
        ValueError: if nothing is hidden.
    """
    dims = ("series", "time", "variate")
    truth = truth if "series" in truth.dims else truth.expand_dims(series=["0"])
    known = truth.transpose(*dims).to_numpy().astype(np.float64)
    if not np.isfinite(known).any():
        raise ValueError("there is no hidden value to compare the imputations at")
    first = next(iter(filled.values()))
    seen = first["target"].where(~first["imputed"]).transpose(*dims).to_numpy().astype(np.float64)
    scale = np.nanstd(np.where(np.isfinite(known), known, seen), axis=(0, 1))
    rows = []
    for name, ds in filled.items():
        error = (ds["target"].transpose(*dims).to_numpy() - known) / np.where(scale > 0, scale, 1.0)
        error = error[np.isfinite(known)]
        rows.append(
            {
                "method": name,
                "rmse": float(np.sqrt(np.mean(error**2))),
                "mae": float(np.abs(error).mean()),
                "values": error.size,
            }
        )
    return pd.DataFrame(rows)
