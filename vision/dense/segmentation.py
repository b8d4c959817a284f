"""Training and testing of networks that name the class of each pixel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ssmcore.training import SSMTask
from ...ssmcore.training.optim import LRSchedulerCallable, OptimizerCallable
from ..data.dense_batches import IGNORE, SegmentationBatch
from ..tasks import normalized
from .metrics import confusion, mean_overlap
from .segmenter import TORCHVISION, create_segmenter, unfitted


class SemanticSegmentation(SSMTask):
    """Train and test a network that names the class of each pixel.

    Logs `train/loss`, and for validation and test `loss` (per pixel), `miou`, `recall` (means over classes) and
    `accuracy`, each from sums over all pixels of the original images. Pixels marked 255 count nowhere.

    Args:
        backbone: Name of a model of ours or timm's, or "torchvision/NAME" of a whole segmentation model.
        backbone_args: Its options.
        head: "fpn", "upernet" or "segman"; a model of torchvision keeps its own.
        head_args: Its options.
        num_classes: Classes; taken from the data module on the command line.
        auxiliary: Channels of a second head on the level before the coarsest; 0 for none.
        auxiliary_weight: Weight of its loss.
        dice: Weight of a Dice loss beside cross entropy: 1 - 2 |p y| / (|p| + |y|), mean over classes.
        label_smoothing: Share of the label spread over all classes.
        backbone_lr: Factor of the optimiser's rate for the backbone.
        optimizer: Called with the parameter groups.
        lr_scheduler: Called with the optimiser.
        compile: Compile the network.
        check_finite: Stop at a loss or gradient that is not finite.

    Raises:
        ValueError: if an option is out of range or a name unknown.
    """

    def __init__(
        self,
        backbone: str = "vmamba_tiny_s1l8",
        backbone_args: dict[str, Any] | None = None,
        head: str = "upernet",
        head_args: dict[str, Any] | None = None,
        num_classes: int = 2,
        auxiliary: int = 0,
        auxiliary_weight: float = 0.4,
        dice: float = 0.0,
        label_smoothing: float = 0.0,
        backbone_lr: float = 1.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        compile: bool = False,
        check_finite: bool = True,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, compile, check_finite)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        if min(auxiliary, auxiliary_weight, dice, backbone_lr) < 0:
            raise ValueError("auxiliary, auxiliary_weight, dice and backbone_lr must not be negative.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is a share in [0, 1), got {label_smoothing}.")
        whole = backbone.startswith(TORCHVISION)
        if whole and backbone_lr != 1:
            raise ValueError(f"{backbone} is trained as a whole; backbone_lr must be 1, got {backbone_lr}.")
        self.num_classes = num_classes
        self.auxiliary_weight, self.dice = auxiliary_weight, dice
        self.label_smoothing, self.backbone_lr = label_smoothing, backbone_lr
        self.args: dict[str, Any] = {"backbone": backbone, "num_classes": num_classes}
        self.args |= {"backbone_args": backbone_args or {}}
        self.args |= {"head_args": head_args or {}, "auxiliary": auxiliary}
        if not whole:
            self.args["head"] = head
        self.net = create_segmenter(**self.args)
        self.matrix = confusion(num_classes)
        self.sums = torch.zeros(2, dtype=torch.float64)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (b, num_classes, height, width) of images (batch, 3, height, width) in [0, 1]."""
        return self.net(normalized(image, self.net))

    def model_config(self) -> dict[str, Any]:
        """Name and arguments that rebuild the network."""
        return {"model": "vision/segmenter", "args": dict(self.args), "task": {"kind": "segmentation"}}

    def lr_scales(self) -> dict[Tensor, float]:
        """The backbone's own rate."""
        features = getattr(self.net, "features", None)
        if features is None or self.backbone_lr == 1:
            return {}
        return dict.fromkeys(features.body.parameters(), self.backbone_lr)

    def loss(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Mean cross entropy over the pixels that count, plus the Dice loss; 0 where no pixel counts.

        Args:
            logits: (b, classes, height, width).
            mask: Class of each pixel, (b, height, width); `IGNORE` where none is known.

        Returns:
            A scalar.
        """
        logits, known = logits.float(), mask != IGNORE
        losses = F.cross_entropy(
            logits, mask, ignore_index=IGNORE, reduction="none", label_smoothing=self.label_smoothing
        )
        loss = losses.sum() / known.sum().clamp(min=1)
        if self.dice:
            share = logits.softmax(1) * known[:, None]
            truth = F.one_hot(mask.where(known, 0), self.num_classes).movedim(-1, 1) * known[:, None]
            over = (0, 2, 3)
            score = (2 * (share * truth).sum(over) + 1) / (share.sum(over) + truth.sum(over) + 1)
            loss = loss + self.dice * (1 - score.mean())
        return loss

    def training_step(self, batch: SegmentationBatch, batch_idx: int) -> Tensor:
        """Loss of the batch."""
        logits, second = self.net(normalized(batch.image, self.net), auxiliary=True)
        loss = self.loss(logits, batch.mask)
        if second is not None:
            loss = loss + self.auxiliary_weight * self.loss(second, batch.mask)
        self.log_loss(loss, len(batch.image))
        return loss

    def validation_step(self, batch: SegmentationBatch, batch_idx: int) -> None:
        """Count the pixels of one batch."""
        self._add(batch)

    def test_step(self, batch: SegmentationBatch, batch_idx: int) -> None:
        """Count the pixels of one batch."""
        self._add(batch)

    def on_validation_epoch_start(self) -> None:
        """Start the counts anew."""
        self._reset()

    def on_test_epoch_start(self) -> None:
        """Start the counts anew."""
        self._reset()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all validation images."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of all test images."""
        self._report("test")

    def _reset(self) -> None:
        self.matrix.reset()
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)

    def _add(self, batch: SegmentationBatch) -> None:
        for logits, mask, (rows, columns) in zip(self(batch.image), batch.mask, batch.size.tolist()):
            full, truth = unfitted(logits.float(), (rows, columns))[None], mask[None, :rows, :columns]
            known = (truth != IGNORE).sum()
            total = F.cross_entropy(full, truth, ignore_index=IGNORE, reduction="sum")
            self.sums += torch.stack([total, known]).double()
            self.matrix.update(full.argmax(1), truth)

    def _report(self, part: str) -> None:
        total, count = self.trainer.strategy.reduce(self.sums, reduce_op="sum").tolist()
        found = {"loss": total / count if count else float("nan"), **mean_overlap(self.matrix.compute())}
        self.log_dict({f"{part}/{name}": value for name, value in found.items()}, prog_bar=part == "val")
