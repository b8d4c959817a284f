"""Supervised tasks: classes, several labels or values of whole sequences, and classes of bases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    multiclass_auroc,
    multiclass_average_precision,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
)

from ..ssmcore.training import SSMTask
from ..ssmcore.training.optim import LRSchedulerCallable, OptimizerCallable
from .data.batch import SequenceBatch
from .losses import IGNORE
from .models import create_model, from_pretrained, is_supervised, model_config, vocabulary_file
from .models.predictor import other_strand

Metrics = dict[str, Tensor]


class SequencePrediction(SSMTask):
    """What classification and regression share.

    Args:
        model: Name of a supervised model, or of one that gets a `SequencePredictor` around it.
        model_args: Its own options.
        n_outputs: Numbers that the network gives per sequence.
        head_args: Options of the predictor: pool, echo, dropout, freeze.
        pretrained: Model folder of a language model that takes the place of `model` and gives the first weights.
        backbone_lr: Learning rate of that model as a multiple of the head's.
        vocabulary: Of the ids; taken from the data module on the command line.
        strands: "both" averages predictions over both strands in evaluation; "one" takes sequences as they come.
        optimizer: Called with the parameter groups.
        lr_scheduler: Called with the optimiser.
        compile: Compile the network.
        check_finite: Stop at a loss or gradient that is not finite.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: for options of a head where the model has its own, or data in another vocabulary than the model's.
    """

    net: Any

    def __init__(
        self,
        model: str,
        model_args: dict[str, Any] | None,
        n_outputs: int,
        head_args: dict[str, Any] | None,
        pretrained: str | None,
        backbone_lr: float,
        vocabulary: str,
        strands: Literal["one", "both"],
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        compile: bool,
        check_finite: bool,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, compile, check_finite)
        args = {"vocabulary": vocabulary} | (model_args or {})
        self.backbone_lr = backbone_lr
        if pretrained is not None:
            self.net = self._pretrained(pretrained, n_outputs, head_args or {}, vocabulary)
        elif is_supervised(model):
            if head_args:
                raise ValueError(f"{model!r} has its own head; leave out head_args, got {sorted(head_args)}.")
            self.net = create_model(model, n_outputs=n_outputs, **args)
        else:
            options = {"model": model, "model_args": args, "n_outputs": n_outputs}
            self.net = create_model("predictor", **options, **(head_args or {}))
        if strands not in ("one", "both"):
            raise ValueError(f"`strands` must be 'one' or 'both', got {strands!r}.")
        self.strands = strands
        self.kept: list[tuple[Tensor, Tensor]] = []

    @staticmethod
    def _pretrained(path: str, n_outputs: int, head_args: dict[str, Any], vocabulary: str) -> Any:
        """A head on the language model of a folder."""
        backbone: Any = from_pretrained(path)
        if getattr(backbone, "supervised", False):
            raise ValueError(f"{path!r} holds a model with a head; start from a language model, or use --init_from.")
        if backbone.vocabulary != vocabulary:
            raise ValueError(
                f"the data come in the vocabulary {vocabulary!r}, {path!r} reads {backbone.vocabulary!r}; set"
                f" vocabulary: {backbone.vocabulary} in the data module."
            )
        options = {"model": backbone.name, "model_args": backbone.config, "n_outputs": n_outputs}
        net: Any = create_model("predictor", **options, **head_args)
        net.backbone.load_state_dict(backbone.state_dict())
        return net

    def lr_scales(self) -> dict[Tensor, float]:
        """The factor of the backbone's rate."""
        backbone = getattr(self.net, "backbone", None)
        return {} if backbone is None else dict.fromkeys(backbone.parameters(), self.backbone_lr)

    def forward(self, batch: SequenceBatch) -> Tensor:
        """What the network says, (b, n_outputs); in evaluation the mean over both strands if asked."""
        y = self.net(batch.tokens, mask=batch.mask)
        if self.training or self.strands == "one" or self.net.strands == "equivariant":
            return y
        other, mask, _ = other_strand(batch.tokens, self.net.vocabulary, batch.mask)
        return (y + self.net(other, mask=mask)) / 2

    def model_config(self) -> dict[str, Any]:
        """Name and all options that rebuild the network."""
        return model_config(self.net) | {"task": {"kind": type(self).__name__, **self.task_config()}}

    def task_config(self) -> dict[str, Any]:
        """What the outputs mean, JSON-able."""
        return {}

    def export_files(self) -> dict[str, str]:
        """The data module's state, and the meaning of the ids."""
        return super().export_files() | vocabulary_file(self.net)

    def loss(self, y: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss of outputs (b, n_outputs)."""
        raise TypeError(f"{type(self).__name__} is not a task by itself.")

    def metrics(self, y: Tensor, labels: Tensor) -> Metrics:
        """Values over a whole part."""
        raise TypeError(f"{type(self).__name__} is not a task by itself.")

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """Mean loss of the batch."""
        loss = self.loss(self(batch), _labels(batch))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.tokens))
        return loss

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Keep outputs and labels."""
        self.kept.append((self(batch).float().cpu(), _labels(batch).cpu()))

    test_step = validation_step

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """Outputs (b, n_outputs)."""
        return self(batch)

    def on_validation_epoch_start(self) -> None:
        """Start anew."""
        self.kept = []

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all validation sequences."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of all test sequences."""
        self._report("test")

    def _report(self, part: str) -> None:
        kept, self.kept = self.kept, []
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, kept)
            kept = [pair for one in parts for pair in one]
        if not kept:
            return
        y, labels = (torch.cat(list(column)) for column in zip(*kept))
        found = {"loss": self.loss(y.to(self.device), labels.to(self.device)), **self.metrics(y, labels)}
        # One value on all processes already.
        self.log_dict({f"{part}/{name}": value for name, value in found.items()}, prog_bar=part == "val")


class SequenceClassification(SequencePrediction):
    """One of several classes, or several labels at once.

    Logs loss, accuracy, mcc, f1 (macro), auroc and auprc; with several labels the means over labels of f1, auroc and
    auprc, and accuracy over all of them.

    Args:
        model: Name of a model, see `omnissm.genomics.list_models`.
        model_args: Its own options.
        num_classes: Classes or labels; taken from the data module on the command line.
        multilabel: Labels are (b, num_classes) bits instead of (b,) classes; NaN marks a missing one.
        class_weights: Weight of each class in the loss.
        head_args: Options of the head: pool, echo, dropout, freeze.
        pretrained: Model folder of a language model that takes the place of `model` and gives the first weights.
        backbone_lr: Learning rate of that model as a multiple of the head's.
        vocabulary: Of the ids; taken from the data module.
        strands: "both" averages predictions over both strands in evaluation.
        optimizer: Called with the parameter groups.
        lr_scheduler: Called with the optimiser.
        compile: Compile the network.
        check_finite: Stop at a loss or gradient that is not finite.
    """

    def __init__(
        self,
        model: str = "lyra",
        model_args: dict[str, Any] | None = None,
        num_classes: int = 2,
        multilabel: bool = False,
        class_weights: list[float] | None = None,
        head_args: dict[str, Any] | None = None,
        pretrained: str | None = None,
        backbone_lr: float = 1.0,
        vocabulary: str = "acgt",
        strands: Literal["one", "both"] = "one",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        compile: bool = False,
        check_finite: bool = True,
    ) -> None:
        if class_weights is not None and len(class_weights) != num_classes:
            raise ValueError(f"`class_weights` needs {num_classes} entries, got {len(class_weights)}.")
        if num_classes < (1 if multilabel else 2):
            raise ValueError(f"expected at least two classes, or one label with multilabel, got {num_classes}.")
        super().__init__(
            model, model_args, num_classes, head_args, pretrained, backbone_lr, vocabulary, strands, optimizer,
            lr_scheduler, compile, check_finite,
        )  # fmt: skip
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.num_classes, self.multilabel = num_classes, multilabel
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)

    def task_config(self) -> dict[str, Any]:
        """Classes or labels."""
        return {"num_classes": self.num_classes, "multilabel": self.multilabel}

    def loss(self, y: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy over classes, or over each label."""
        weights: Any = self.class_weights
        if not self.multilabel:
            return F.cross_entropy(y, labels, weight=weights)
        there = labels.isfinite()
        each = F.binary_cross_entropy_with_logits(y, labels.where(there, 0).to(y.dtype), reduction="none")
        shares = there.to(y.dtype) if weights is None else there * weights
        return (each * shares).sum() / shares.sum().clamp(min=1e-6)

    def metrics(self, y: Tensor, labels: Tensor) -> Metrics:
        """Accuracy, MCC, F1, AUROC and AUPRC."""
        if self.multilabel:
            there = labels.isfinite()
            columns = [(y[known, k], labels[known, k].int()) for k, known in enumerate(there.unbind(1))]
            each = [self._label_metrics(margin, bits) for margin, bits in columns]
            means = {name: torch.stack([one[name] for one in each]).nanmean() for name in each[0]}
            return {"accuracy": ((y > 0) == (labels > 0.5))[there].float().mean(), **means}
        n, chosen = self.num_classes, y.argmax(1)
        found = {
            "accuracy": (chosen == labels).float().mean(),
            "mcc": multiclass_matthews_corrcoef(chosen, labels, n),
            "f1": multiclass_f1_score(chosen, labels, n, average="macro"),
        }
        if n == 2:
            margin = y[:, 1] - y[:, 0]
            scores = self._label_metrics(margin, labels)
            return found | {"auroc": scores["auroc"], "auprc": scores["auprc"]}
        share = y.softmax(1)
        return found | {
            "auroc": multiclass_auroc(share, labels, n),
            "auprc": multiclass_average_precision(share, labels, n),
        }

    @staticmethod
    def _label_metrics(margin: Tensor, bits: Tensor) -> Metrics:
        """Of one label; NaN where only one side occurs."""
        if not len(bits) or bits.min() == bits.max():
            nan = torch.tensor(math.nan)
            return {"f1": nan, "auroc": nan, "auprc": nan}
        share = margin.double().sigmoid()
        return {
            "f1": multiclass_f1_score((margin > 0).int(), bits, 2, average="none")[1],
            "auroc": binary_auroc(share, bits).float(),
            "auprc": binary_average_precision(share, bits).float(),
        }


class TokenClassification(SequenceClassification):
    """A class for every base; label -100 asks nothing. `AnnotatedWindows` gives labels from annotation.

    Causal models see what comes before a base only, unless head_args say `echo: repeat`. Logs what
    `SequenceClassification` logs, over all labelled bases.

    Args:
        model: Name of a model of bases, see `omnissm.genomics.list_models`.
        model_args: Its own options.
        num_classes: Classes; taken from the data module on the command line.
        class_weights: Weight of each class in the loss.
        head_args: Options of the head: echo, dropout, freeze.
        pretrained: Model folder of a language model that takes the place of `model` and gives the first weights.
        backbone_lr: Learning rate of that model as a multiple of the head's.
        vocabulary: Of the ids; taken from the data module.
        strands: "both" averages predictions over both strands in evaluation, where classes have no strand.
        optimizer: Called with the parameter groups.
        lr_scheduler: Called with the optimiser.
        compile: Compile the network.
        check_finite: Stop at a loss or gradient that is not finite.

    Raises:
        ValueError: for a model with a head of its own, or a head that pools.
    """

    def __init__(
        self,
        model: str = "hydra_dna_tiny",
        model_args: dict[str, Any] | None = None,
        num_classes: int = 2,
        class_weights: list[float] | None = None,
        head_args: dict[str, Any] | None = None,
        pretrained: str | None = None,
        backbone_lr: float = 1.0,
        vocabulary: str = "acgt",
        strands: Literal["one", "both"] = "one",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        compile: bool = False,
        check_finite: bool = True,
    ) -> None:
        head = {"pool": "none"} | (head_args or {})
        if head["pool"] != "none" or (pretrained is None and is_supervised(model)):
            raise ValueError(
                f"classes of bases need a model of bases and pool: none; got {model!r}, pool {head['pool']!r}."
            )
        super().__init__(
            model, model_args, num_classes, False, class_weights, head, pretrained, backbone_lr, vocabulary, strands,
            optimizer, lr_scheduler, compile, check_finite,
        )  # fmt: skip

    def forward(self, batch: SequenceBatch) -> Tensor:
        """What the network says, (b, l, num_classes); in evaluation the mean over both strands if asked."""
        y = self.net(batch.tokens, mask=batch.mask)
        if self.training or self.strands == "one" or self.net.strands == "equivariant":
            return y
        other, mask, order = other_strand(batch.tokens, self.net.vocabulary, batch.mask)
        found = self.net(other, mask=mask)
        return (y + torch.empty_like(found).scatter(1, order[..., None].expand_as(found), found)) / 2

    def loss(self, y: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy over the labelled bases; zero if there are none."""
        weights: Any = self.class_weights
        total = F.cross_entropy(
            y.flatten(0, -2), labels.flatten(), weight=weights, ignore_index=IGNORE, reduction="sum"
        )
        known = labels[labels != IGNORE]
        # A number and no tensor in the dtype of `y`: float16 ends at 65,504.
        return total / (max(len(known), 1) if weights is None else weights[known].sum().clamp(min=1e-6))

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Keep outputs and labels of the labelled bases."""
        labels = _labels(batch)
        asked = labels != IGNORE
        self.kept.append((self(batch)[asked].float().cpu(), labels[asked].cpu()))

    test_step = validation_step


class SequenceRegression(SequencePrediction):
    """One or several values per sequence; NaN marks a missing one.

    Logs loss, pearson and spearman, means over the values.

    Args:
        model: Name of a model, see `omnissm.genomics.list_models`.
        model_args: Its own options.
        n_outputs: Values per sequence.
        loss_kind: "mse", "mae" or "huber".
        head_args: Options of the head: pool, echo, dropout, freeze.
        pretrained: Model folder of a language model that takes the place of `model` and gives the first weights.
        backbone_lr: Learning rate of that model as a multiple of the head's.
        vocabulary: Of the ids; taken from the data module on the command line.
        strands: "both" averages predictions over both strands in evaluation.
        optimizer: Called with the parameter groups.
        lr_scheduler: Called with the optimiser.
        compile: Compile the network.
        check_finite: Stop at a loss or gradient that is not finite.
    """

    def __init__(
        self,
        model: str = "lyra",
        model_args: dict[str, Any] | None = None,
        n_outputs: int = 1,
        loss_kind: Literal["mse", "mae", "huber"] = "mse",
        head_args: dict[str, Any] | None = None,
        pretrained: str | None = None,
        backbone_lr: float = 1.0,
        vocabulary: str = "acgt",
        strands: Literal["one", "both"] = "one",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        compile: bool = False,
        check_finite: bool = True,
    ) -> None:
        if loss_kind not in LOSSES:
            raise ValueError(f"`loss_kind` must be one of {', '.join(LOSSES)}, got {loss_kind!r}.")
        super().__init__(
            model, model_args, n_outputs, head_args, pretrained, backbone_lr, vocabulary, strands, optimizer,
            lr_scheduler, compile, check_finite,
        )  # fmt: skip
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.n_outputs, self.loss_kind = n_outputs, loss_kind

    def task_config(self) -> dict[str, Any]:
        """Number of values."""
        return {"n_outputs": self.n_outputs, "loss": self.loss_kind}

    def loss(self, y: Tensor, labels: Tensor) -> Tensor:
        """Mean over the values that are there; zero if there are none."""
        if labels.numel() != y.numel():
            raise ValueError(f"labels {tuple(labels.shape)} need n_outputs={labels[0].numel()}, got {self.n_outputs}.")
        labels = labels.to(y.dtype).view_as(y)
        there = labels.isfinite()
        return LOSSES[self.loss_kind](y[there], labels[there], reduction="sum") / there.sum().clamp(min=1)

    def metrics(self, y: Tensor, labels: Tensor) -> Metrics:
        """Pearson's and Spearman's correlation, means over the values."""
        labels = labels.to(y.dtype).view_as(y)
        found: dict[str, Sequence[Tensor]] = {"pearson": [], "spearman": []}
        for prediction, label in zip(y.unbind(1), labels.unbind(1)):
            there = label.isfinite()
            pair = (prediction[there].double(), label[there].double())
            known = there.sum() > 2 and all(values.std() > 0 for values in pair)
            for name, function in (("pearson", pearson_corrcoef), ("spearman", spearman_corrcoef)):
                value = function(*pair).float() if known else torch.tensor(math.nan)
                found[name] = [*found[name], value]
        return {name: torch.stack(list(values)).nanmean() for name, values in found.items()}


LOSSES: dict[str, Callable[..., Tensor]] = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}


def _labels(batch: SequenceBatch) -> Tensor:
    if batch.labels is None:
        raise ValueError(
            "a supervised task needs labels; the data module gives none. Use LabelledSequences, GeneWindows with a"
            " label, or AnnotatedWindows."
        )
    return batch.labels
