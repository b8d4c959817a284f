"""Training and testing of detectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ...ssmcore.training import SSMTask
from ...ssmcore.training.optim import LRSchedulerCallable, OptimizerCallable
from ..data.dense_batches import DetectionBatch
from ..data.joint import fitted_size
from ..tasks import normalized
from .detectors import Found, as_found, create_detector
from .metrics import average_precision

LEAST = 0.001  # score from which boxes count for the average precision


class Detection(SSMTask):
    """Train and test a detector.

    Logs `train/loss` and its parts, and for validation and test `map` (mean over classes and IoU 0.5 to 0.95, as COCO
    defines it), `map50`, `map75`, `recall` and `loss` = 1 - map, over all images and in pixels of the original ones;
    NaN where no image has a box.

    Args:
        detector: "yolo", "fcos", "retinanet", "faster_rcnn", or the name of a whole detector of torchvision.
        backbone: "mamba_yolo_tiny", "mamba_yolo_base", "mamba_yolo_large", or a pyramid of ours or timm's.
        backbone_args: Its options.
        detector_args: Further ones of the detector.
        num_classes: Classes; taken from the data module on the command line.
        image_size: Side, or rows and columns, of the images; taken from the data module on the command line.
        optimizer: Called with the parameter groups.
        lr_scheduler: Called with the optimiser.
        compile: Compile the network.
        check_finite: Stop at a loss or gradient that is not finite.

    Raises:
        ValueError: if an option is out of range or a name unknown.
    """

    def __init__(
        self,
        detector: str = "yolo",
        backbone: str | None = None,
        backbone_args: dict[str, Any] | None = None,
        detector_args: dict[str, Any] | None = None,
        num_classes: int = 80,
        image_size: int | tuple[int, int] = 512,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        compile: bool = False,
        check_finite: bool = True,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, compile, check_finite)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        self.args: dict[str, Any] = {"detector": detector, "num_classes": num_classes, "image_size": list(size)}
        if backbone is not None:
            self.args |= {"backbone": backbone, "backbone_args": backbone_args or {}}
        self.args |= detector_args or {}
        self.num_classes = num_classes
        self.net = create_detector(**self.args)
        self.precision: Metric | None = None

    def setup(self, stage: str) -> None:
        """Make the metric, before any work, so that a missing package is named at once."""
        super().setup(stage)
        if stage != "predict":
            self.precision = average_precision()

    def forward(self, image: Tensor) -> list[Found]:
        """Boxes of images (batch, 3, height, width) in [0, 1], in their pixels."""
        return self.net.detect(normalized(image, self.net), LEAST)  # type: ignore[operator]

    def model_config(self) -> dict[str, Any]:
        """Name and arguments that rebuild the network."""
        return {"model": "vision/detector", "args": dict(self.args), "task": {"kind": "detection"}}

    def training_step(self, batch: DetectionBatch, batch_idx: int) -> Tensor:
        """Sum of the detector's losses."""
        parts = self.net.losses(normalized(batch.image, self.net), batch.boxes, batch.labels)  # type: ignore[operator]
        loss = torch.stack([part.float() for part in parts.values()]).sum()
        logged = {f"train/{name}": value.detach() for name, value in parts.items()}
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=len(batch.image), sync_dist=True)
        self.log_loss(loss, len(batch.image))
        return loss

    def validation_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        """Compare the boxes of one batch."""
        self._add(batch)

    def test_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        """Compare the boxes of one batch."""
        self._add(batch)

    def on_validation_epoch_start(self) -> None:
        """Start anew."""
        self._metric().reset()

    def on_test_epoch_start(self) -> None:
        """Start anew."""
        self._metric().reset()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all validation images."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of all test images."""
        self._report("test")

    def _metric(self) -> Metric:
        if self.precision is None:
            self.precision = average_precision()
        self.precision.to(self.device)
        return self.precision

    def _add(self, batch: DetectionBatch) -> None:
        predicted, true = compare(self(batch.image), batch)
        self._metric().update(predicted, true)

    def _report(self, part: str) -> None:
        found = self._metric().compute()
        names = {"map": "map", "map50": "map_50", "map75": "map_75", "recall": "mar_100"}
        values = {name: float(found[key]) for name, key in names.items()}
        values = {name: value if value >= 0 else float("nan") for name, value in values.items()}  # -1 without any box
        self.log_dict({f"{part}/{name}": value for name, value in values.items()}, prog_bar=part == "val")
        self.log(f"{part}/loss", 1 - values["map"])


def compare(found: list[Found], batch: DetectionBatch) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """What torchmetrics compares: predicted and true boxes of each image, in pixels of the original images."""
    predicted, true = [], []
    whole = (batch.image.shape[-2], batch.image.shape[-1])
    for k, one in enumerate(found):
        size = (int(batch.size[k, 0]), int(batch.size[k, 1]))
        rows, columns = fitted_size(*size, whole)
        factor = torch.tensor([columns / size[1], rows / size[0]], device=batch.boxes.device)
        one = as_found(one, factor, size)
        predicted.append({"boxes": one.boxes.float(), "scores": one.scores.float(), "labels": one.labels})
        held = batch.labels[k] >= 0
        boxes = batch.boxes[k][held] / factor.repeat(2)
        fields = {"boxes": boxes, "labels": batch.labels[k][held], "area": batch.area[k][held]}
        true.append({**fields, "iscrowd": batch.crowd[k][held].long()})
    return predicted, true
