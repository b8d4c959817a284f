"""Image classification: a backbone by name, cross entropy, and exact errors over all images."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ssmcore.training import SSMTask
from ..ssmcore.training.optim import LRSchedulerCallable, OptimizerCallable
from .data.batches import ImageBatch
from .registry import create_model

Loss = Literal["ce", "bce"]
_SUMS = ("loss", "accuracy", "top5", "count")


class ImageClassification(SSMTask):
    """Train and test a classifier of images.

    Images come in [0, 1] and are normalised here with the mean and deviation of the model's own `default_cfg`. Logs
    `train/loss`, and for validation and test `loss`, `accuracy` and `top5` (e.g. `val/accuracy`), each a sum over all
    images divided by their number. Average weights by the callback `omnissm.ssmcore.training.EMA`.

    Args:
        backbone: Name of a model, see `omnissm.vision.list_models`; those of timm work too.
        backbone_args: Its options.
        num_classes: Width of the logits; taken from the data module on the command line.
        loss: "ce" (cross entropy) or "bce" (one binary decision per class).
        label_smoothing: Share of the label spread over all classes. With Mixup set it in the data module instead.
        optimizer: Called with the parameter groups.
        lr_scheduler: Called with the optimiser.
        compile: Compile the model.
        check_finite: Stop at a loss or gradient that is not finite.

    Raises:
        ValueError: if an option is out of range or the model unknown.
    """

    def __init__(
        self,
        backbone: str = "hydra_vit_tiny_patch16_224",
        backbone_args: dict[str, Any] | None = None,
        num_classes: int = 1000,
        loss: Loss = "ce",
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        compile: bool = False,
        check_finite: bool = True,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, compile, check_finite)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        if loss not in ("ce", "bce"):
            raise ValueError(f"loss must be 'ce' or 'bce', got {loss!r}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is a share in [0, 1), got {label_smoothing}.")
        self.backbone, self.loss, self.label_smoothing = backbone, loss, label_smoothing
        self.num_classes = num_classes
        self.args: dict[str, Any] = {**(backbone_args or {}), "num_classes": num_classes}
        self.net = create_model(backbone, **self.args)
        self.sums: dict[str, Tensor] = {}

    def forward(self, image: Tensor) -> Tensor:
        """Logits (b, num_classes) of images (batch, channels, height, width) in [0, 1]."""
        return self.net(normalized(image, self.net))

    def model_config(self) -> dict[str, Any]:
        """Name and arguments that rebuild the network."""
        return {"model": f"vision/{self.backbone}", "args": dict(self.args), "task": {"loss": self.loss}}

    def losses(self, logits: Tensor, label: Tensor, smoothing: float = 0.0) -> Tensor:
        """Loss of each image, (b,); labels are numbers (b,) or soft (b, num_classes)."""
        logits = logits.float()
        if self.loss == "ce":
            return F.cross_entropy(logits, label, reduction="none", label_smoothing=smoothing)
        if label.dim() == 1:
            label = F.one_hot(label, self.num_classes).to(logits.dtype)
        target = label * (1 - smoothing) + smoothing / self.num_classes
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=1)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Mean loss of the batch."""
        loss = self.losses(self(batch.image), batch.label, self.label_smoothing).mean()
        self.log_loss(loss, len(batch.image))
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Add one batch to the sums."""
        self._add(batch)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Add one batch to the sums."""
        self._add(batch)

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Probabilities, labels and numbers of the images."""
        return {"probability": self(batch.image).float().softmax(-1), "label": batch.label, "number": batch.number}

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew, also after a validation that was broken off."""
        self.sums = {}

    def on_test_epoch_start(self) -> None:
        """Start the sums anew."""
        self.sums = {}

    def on_validation_epoch_end(self) -> None:
        """Log the errors of all validation images."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log the errors of all test images."""
        self._report("test")

    def _add(self, batch: ImageBatch) -> None:
        logits = self(batch.image)
        best = logits.topk(min(5, self.num_classes), dim=1).indices == batch.label[:, None]
        found = {
            "loss": self.losses(logits, batch.label).double().sum(),
            "accuracy": best[:, 0].double().sum(),
            "top5": best.any(dim=1).double().sum(),
            "count": torch.tensor(float(len(batch.label)), dtype=torch.float64, device=logits.device),
        }
        self.sums = {name: self.sums.get(name, 0) + found[name] for name in _SUMS}

    def _report(self, part: str) -> None:
        zeros = torch.zeros(len(_SUMS), dtype=torch.float64, device=self.device)
        sums = torch.stack([self.sums[name] for name in _SUMS]) if self.sums else zeros
        *totals, count = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        shares = {name: total / count if count else float("nan") for name, total in zip(_SUMS, totals)}
        # one value on all processes already
        self.log_dict({f"{part}/{name}": value for name, value in shares.items()}, prog_bar=part == "val")


def normalized(image: Tensor, net: nn.Module) -> Tensor:
    """Images in [0, 1] with the mean and deviation of a model's `default_cfg`, per channel.

    Raises:
        TypeError: if the images are no floating tensor.
        ValueError: if the model takes another number of channels.
    """
    if not image.is_floating_point():
        raise TypeError(f"images are floating tensors in [0, 1], got {image.dtype}; divide bytes by 255.")
    settings: dict[str, Any] = getattr(net, "default_cfg", None) or {"mean": (0.5,), "std": (0.5,)}
    channels = image.shape[1]
    expected = getattr(net, "in_chans", channels)
    if channels != expected:
        raise ValueError(f"the model takes images of {expected} channels, got {channels}; set in_chans={channels}.")
    values = []
    for name in ("mean", "std"):
        numbers = torch.tensor(settings[name], dtype=image.dtype, device=image.device)
        values.append((numbers if len(numbers) == channels else numbers.mean().expand(channels)).view(-1, 1, 1))
    return (image - values[0]) / values[1]
