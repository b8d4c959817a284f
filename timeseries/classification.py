"""The classification task, and a trained classifier with what it needs to read series."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MultilabelAUROC,
    MultilabelAveragePrecision,
)

from ..ssmcore.training import SSMTask, load_weights
from ..ssmcore.training.optim import LRSchedulerCallable, OptimizerCallable
from .labelled import LabelledSeries, SeriesBatch
from .loading import read_run
from .models import create_model

__all__ = ["Classifier", "SeriesClassification"]


class SeriesClassification(SSMTask):
    """Train and test a classifier of whole series.

    Logs `train/loss`, and for validation and test `loss` and over all series together `accuracy`, `balanced_accuracy`
    (mean recall of the classes) and `f1` (mean over the classes), e.g. `val/accuracy`; with `multilabel` instead
    `auroc` and `auprc`, means over the classes.

    Args:
        model: Name of a classifier, see `list_models(task="classification")`.
        model_args: Its own options.
        n_variates: Number of variates; taken from the data module on the command line.
        num_classes: Number of classes; taken from the data module.
        multilabel: A series may belong to several classes: binary cross entropy instead of cross entropy.
        label_smoothing: Share of the label spread over all classes; of single labels only.
        optimizer: Called with the parameter groups.
        lr_scheduler: Called with the optimiser.
        compile: Compile the model.
        check_finite: Stop at a loss or gradient that is not finite.

    Raises:
        ValueError: if the model is unknown or no classifier, the smoothing is out of range, or the data have several
            labels a series without `multilabel`, or one with it.
    """

    def __init__(
        self,
        model: str = "chimera_classifier",
        model_args: dict[str, Any] | None = None,
        n_variates: int = 1,
        num_classes: int = 2,
        multilabel: bool = False,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        compile: bool = False,
        check_finite: bool = True,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, compile, check_finite)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is a share in [0, 1), got {label_smoothing}")
        self.model, self.multilabel, self.label_smoothing = model, multilabel, label_smoothing
        self.args: dict[str, Any] = {"n_variates": n_variates, "num_classes": num_classes, **(model_args or {})}
        self.net = create_model(model, task="classification", **self.args)
        metrics = create_metrics(num_classes, multilabel)
        self.metrics = nn.ModuleDict({part: metrics.clone(prefix=f"{part}/") for part in ("val", "test")})

    def forward(self, batch: SeriesBatch) -> Tensor:
        """Logits (b, num_classes)."""
        return self.net(batch)

    def model_config(self) -> dict[str, Any]:
        """Name and arguments that rebuild the network."""
        task = {"kind": "classification", "multilabel": self.multilabel}
        return {"model": f"timeseries/{self.model}", "args": dict(self.args), "task": task}

    def loss(self, logits: Tensor, label: Tensor, smoothing: float = 0.0) -> Tensor:
        """Mean loss of a batch."""
        if self.multilabel != (label.dim() == 2):
            found = "flags of several classes" if label.dim() == 2 else "one class"
            raise ValueError(f"the data have {found} for each series; set multilabel: {str(label.dim() == 2).lower()}")
        if self.multilabel:
            return F.binary_cross_entropy_with_logits(logits.float(), label)
        return F.cross_entropy(logits.float(), label, label_smoothing=smoothing)

    def training_step(self, batch: SeriesBatch, batch_idx: int) -> Tensor:
        """Mean loss of the batch."""
        loss = self.loss(self(batch), batch.label, self.label_smoothing)
        self.log_loss(loss, len(batch.x))
        return loss

    def validation_step(self, batch: SeriesBatch, batch_idx: int) -> None:
        """Add one batch."""
        self._add("val", batch)

    def test_step(self, batch: SeriesBatch, batch_idx: int) -> None:
        """Add one batch."""
        self._add("test", batch)

    def predict_step(self, batch: SeriesBatch, batch_idx: int) -> dict[str, Tensor]:
        """Probabilities, labels and places of the series."""
        return {
            "probability": probabilities(self(batch), self.multilabel),
            "label": batch.label,
            "number": batch.number,
        }

    def _add(self, part: str, batch: SeriesBatch) -> None:
        logits = self(batch)
        loss = self.loss(logits, batch.label)
        self.log(f"{part}/loss", loss, batch_size=len(batch.x), prog_bar=part == "val", sync_dist=True)
        metrics = self.metrics[part]
        metrics.update(probabilities(logits, self.multilabel), batch.label.long())  # type: ignore[operator]
        self.log_dict(metrics, on_step=False, on_epoch=True)  # type: ignore[arg-type]


def create_metrics(num_classes: int, multilabel: bool = False) -> MetricCollection:
    """The metrics of the task by name, without prefix."""
    if multilabel:
        found: dict[str, Metric] = {
            "auroc": MultilabelAUROC(num_classes),
            "auprc": MultilabelAveragePrecision(num_classes),
        }
    else:
        found = {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "balanced_accuracy": MulticlassAccuracy(num_classes, average="macro"),
            "f1": MulticlassF1Score(num_classes, average="macro"),
        }
    # each metric keeps its own sums: the types of the dictionary's values are all that mypy objects to
    return MetricCollection(found, compute_groups=False)  # type: ignore[arg-type]


def probabilities(logits: Tensor, multilabel: bool) -> Tensor:
    """Of each class, (b, num_classes)."""
    return logits.float().sigmoid() if multilabel else logits.float().softmax(dim=-1)


class Classifier:
    """A trained classifier.

    Args:
        net: The network.
        state: Classes, variates and scaling of the training data.
        multilabel: Whether a series may belong to several classes.
    """

    def __init__(self, net: nn.Module, state: dict[str, Any], multilabel: bool = False) -> None:
        self.net, self.state, self.multilabel = net.eval(), state, multilabel

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return list(self.state["classes"])

    @classmethod
    def load(cls, path: str | Path) -> Classifier:
        """Read a model folder, the folder of a run, or a checkpoint.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it holds no classifier.
        """
        folder = read_run(path, "classification")
        args = folder.config["args"]
        net = create_model(folder.config["model"].partition("/")[2], task="classification", **args)
        load_weights(net, folder.state, source=str(path))
        return cls(net, json.loads(folder.files["data.json"]), folder.config["task"]["multilabel"])

    @torch.no_grad()
    def predict(self, ds: xr.Dataset, batch_size: int = 256) -> pd.DataFrame:
        """Classify series.

        Args:
            ds: Dataset with the variates of the training data, e.g. of `read_ts`.
            batch_size: Series at once.

        Returns:
            A row per series: `series`, `predicted` (with several labels: names of the classes above one half,
            separated by blanks), the probability `p_CLASS` of each class, and `label` where the data have one.

        Raises:
            ValueError: naming the first variate that is missing.
        """
        names = [str(name) for name in ds["variate"].to_numpy()]
        missing = [name for name in self.state["variates"] if name not in names]
        if missing:
            raise ValueError(f"the model was trained on the variate {missing[0]!r}, the data have {', '.join(names)}")
        ds = ds.sel(variate=self.state["variates"])
        series = LabelledSeries(ds, np.array([self.state["mean"], self.state["scale"]]))
        batches = [range(k, min(k + batch_size, len(series))) for k in range(0, len(series), batch_size)]
        found = [probabilities(self.net(series.__getitems__(rows)), self.multilabel) for rows in batches]
        chances = torch.cat(found).numpy()
        if self.multilabel:
            predicted = [" ".join(np.array(self.classes)[row > 0.5]) for row in chances]
        else:
            predicted = [self.classes[k] for k in chances.argmax(axis=1)]
        numbers = ds["series"].to_numpy() if "series" in ds.coords else np.arange(len(series))
        columns = {"series": numbers.astype(str), "predicted": predicted}
        columns |= {f"p_{name}": chances[:, k] for k, name in enumerate(self.classes)}
        if "label" in ds and ds["label"].dims == ("series",):
            columns["label"] = ds["label"].to_numpy().astype(str)
        return pd.DataFrame(columns)
