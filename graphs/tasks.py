"""Prediction on graphs: classes, yes or no, or values, of graphs, nodes or pairs of nodes."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision, multiclass_f1_score

from ..ssmcore.training import SSMTask
from ..ssmcore.training.optim import LRSchedulerCallable, OptimizerCallable
from .batch import GraphBatch
from .models import GraphEnsemble, create_model

Loss = Literal["mse", "mae", "huber"]
_LOSSES = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.smooth_l1_loss}
_TARGETS = ("classes", "binary", "values")


class GraphPrediction(SSMTask):
    """Train and test a model of graphs.

    What is predicted comes with the data: classes (cross entropy; logs loss, accuracy and f1, macro), yes or no
    (binary cross entropy per label; logs loss, auroc and ap, means over labels) or values (in units of the training
    part's deviation while training; logs rmse, mae and pearson in the data's own units, pearson as the mean over
    outputs). Unknown targets, -1 or NaN, are left out. Metrics are of whole parts, not means over batches.

    Args:
        model: Name of a model, see `omnissm.graphs.list_models`.
        model_args: Its options.
        schema: What the graphs are, see `GraphData.schema`; taken from the data module on the command line.
        loss: For values: "mse", "mae" or "huber".
        class_weighted: For classes: weigh by the share of the others in the batch, as the published runs on images do.
        label_smoothing: For classes: share of each label that goes to all classes alike while training.
        optimizer: Called with the parameter groups.
        lr_scheduler: Called with the optimiser.
        compile: Compile the model.
        check_finite: Stop at a loss or gradient that is not finite.

    Raises:
        ValueError: if there is no schema, or an option or the model is unknown.
    """

    def __init__(
        self,
        model: str = "dag_ssm_tiny",
        model_args: dict[str, Any] | None = None,
        schema: dict[str, Any] | None = None,
        loss: Loss = "mse",
        class_weighted: bool = False,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        compile: bool = False,
        check_finite: bool = True,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, compile, check_finite)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        if schema is None:
            raise ValueError("a graph task needs a schema; give that of the data module, `data.schema`.")
        if loss not in _LOSSES:
            raise ValueError(f"loss must be one of {', '.join(_LOSSES)}, got {loss!r}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}.")
        about = dict(schema)
        self.target = about.pop("target", "classes")
        if self.target not in _TARGETS:
            raise ValueError(f"target must be one of {', '.join(_TARGETS)}, got {self.target!r}.")
        for name, given in (("class_weighted", class_weighted), ("label_smoothing", label_smoothing)):
            if given and self.target != "classes":
                raise ValueError(f"{name} is for targets that are classes; these are {self.target!r}.")
        self.model, self.loss, self.class_weighted = model, loss, class_weighted
        self.label_smoothing = label_smoothing
        self.mean, self.scale = about.pop("mean", None), about.pop("scale", None)
        self.args: dict[str, Any] = {**about, **(model_args or {})}
        self.net = create_model(model, **self.args)
        self.kept: list[tuple[Tensor, Tensor]] = []

    def forward(self, batch: GraphBatch) -> Tensor:
        """Logits or values, in the data's units, of a batch: (graphs, v or q, num_outputs)."""
        return self._in_units(self.net(batch))

    def model_config(self) -> dict[str, Any]:
        """Name and arguments that rebuild the network."""
        task = {"target": self.target, "loss": self.loss, "mean": self.mean, "scale": self.scale}
        return {"model": f"graphs/{self.model}", "args": dict(self.args), "task": task}

    def training_step(self, batch: GraphBatch, batch_idx: int) -> Tensor:
        """Mean loss of the batch."""
        answers = self.net.each(batch) if isinstance(self.net, GraphEnsemble) else [self.net(batch)]
        loss = torch.stack([self.mean_loss(y, _labels(batch)) for y in answers]).mean()
        self.log_loss(loss, batch.num_graphs)
        return loss

    def validation_step(self, batch: GraphBatch, batch_idx: int) -> None:
        """Keep outputs and labels."""
        self.kept.append((_rows(self.net(batch)).float().cpu(), _rows(_labels(batch)).cpu()))

    test_step = validation_step

    def predict_step(self, batch: GraphBatch, batch_idx: int) -> Tensor:
        """Logits or values, in the data's units."""
        return self(batch)

    def on_validation_epoch_start(self) -> None:
        """Start anew, also after a validation that was broken off."""
        self.kept = []

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation part."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test part."""
        self._report("test")

    def mean_loss(self, y: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over all known labels; zero if there are none.

        Raises:
            ValueError: if there are other numbers of outputs and labels.
        """
        y, labels = _rows(y).float(), _rows(labels)
        if self.target == "classes":
            labels = labels[:, 0]
            if len(y) != len(labels):
                raise ValueError(f"the model gives {len(y)} answers, the data have {len(labels)} labels; see `level`.")
            weight = None
            if self.class_weighted:
                count = torch.bincount(labels[labels >= 0], minlength=y.shape[1]).to(y.dtype)
                weight = (count.sum() - count) / count.sum().clamp(min=1) * (count > 0)
            smoothing = self.label_smoothing if self.training else 0.0
            total = F.cross_entropy(
                y, labels, weight=weight, ignore_index=-1, reduction="sum", label_smoothing=smoothing
            )
            known = labels >= 0
            size = known.sum() if weight is None else weight[labels[known]].sum()
            return total / size.clamp(min=1e-6)
        if y.shape != labels.shape:
            raise ValueError(f"the model gives {tuple(y.shape)} numbers, the data have {tuple(labels.shape)}.")
        known = labels.isfinite()
        wanted = torch.where(known, labels, 0.0).to(y.dtype)
        if self.target == "binary":
            each = F.binary_cross_entropy_with_logits(y, wanted, reduction="none")
        else:
            if self.mean is not None and self.scale is not None:
                wanted = (wanted - y.new_tensor(self.mean)) / y.new_tensor(self.scale)
            each = _LOSSES[self.loss](y, wanted, reduction="none")
        return (each * known).sum() / known.sum().clamp(min=1)

    def metrics(self, y: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Metrics of outputs of the network and labels of a whole part, both (rows, columns)."""
        if self.target == "classes":
            known = labels[:, 0] >= 0
            chosen, wanted = y[known].argmax(1), labels[known, 0]
            return {
                "accuracy": (chosen == wanted).float().mean(),
                "f1": multiclass_f1_score(chosen, wanted, y.shape[1], average="macro"),
            }
        columns = [self._column(y[:, k], labels[:, k]) for k in range(y.shape[1])]
        found = {name: torch.stack([one[name] for one in columns]).nanmean() for name in columns[0]}
        if self.target == "values":
            found["rmse"] = found.pop("mse").sqrt()
        return found

    def _column(self, y: Tensor, labels: Tensor) -> dict[str, Tensor]:
        known = labels.isfinite()
        y, labels = y[known].double(), labels[known].double()
        if self.target == "values":
            error = y - labels
            pearson = torch.corrcoef(torch.stack([y, labels]))[0, 1]
            return {"mse": error.square().mean(), "mae": error.abs().mean(), "pearson": pearson}
        if len(labels) == 0 or labels.min() == labels.max():  # without both sides there is no ranking
            nan = torch.tensor(math.nan, dtype=torch.float64)
            return {"auroc": nan, "ap": nan}
        share, bits = y.sigmoid(), labels.int()
        return {"auroc": binary_auroc(share, bits).double(), "ap": binary_average_precision(share, bits).double()}

    def _in_units(self, y: Tensor) -> Tensor:
        if self.target != "values" or self.mean is None or self.scale is None:
            return y
        return y * y.new_tensor(self.scale) + y.new_tensor(self.mean)

    def _report(self, part: str) -> None:
        kept, self.kept = self.kept, []
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, kept)
            kept = [pair for one in parts for pair in one]
        if not kept:
            return
        y, labels = (torch.cat(list(column)) for column in zip(*kept))
        found = {"loss": self.mean_loss(y, labels), **self.metrics(self._in_units(y), labels)}
        # one value on all processes already
        values = {f"{part}/{name}": value.float().to(self.device) for name, value in found.items()}
        self.log_dict(values, prog_bar=part == "val")


def _labels(batch: GraphBatch) -> Tensor:
    if batch.y is None:
        raise ValueError("the graphs have no `y` to learn from or to compare with.")
    return batch.y


def _rows(tensor: Tensor) -> Tensor:
    return tensor[:, None] if tensor.dim() == 1 else tensor
