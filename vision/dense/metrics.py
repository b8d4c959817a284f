"""Metrics of whole data sets: overlap of classes of pixels, and average precision of boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from ..data.dense_batches import IGNORE


def confusion(num_classes: int) -> Metric:
    """Sums pixels by true and predicted class over a data set, on all processes; 255 is not counted."""
    return MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE, validate_args=False)


def overlap_table(matrix: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows by class, with the IoU, recall, precision, Dice score and number of true pixels, from a confusion matrix.

    Classes that neither truth nor prediction has are NaN.

    Args:
        matrix: Pixels by true class (rows) and predicted class (columns).
        classes: Names.
    """
    counts = matrix.double().cpu()
    hit, true, said = counts.diagonal(), counts.sum(1), counts.sum(0)
    columns = {
        "iou": hit / (true + said - hit),
        "recall": hit / true,
        "precision": hit / said,
        "dice": 2 * hit / (true + said),
        "pixels": true,
    }
    return [
        {"class": name, **{key: float(values[k]) for key, values in columns.items()}} for k, name in enumerate(classes)
    ]


def mean_overlap(matrix: Tensor) -> dict[str, float]:
    """`miou` and `recall` as means over the classes that occur, and `accuracy` over pixels."""
    counts = matrix.double()
    hit, true, said = counts.diagonal(), counts.sum(1), counts.sum(0)
    return {
        "miou": float((hit / (true + said - hit)).nanmean()),
        "recall": float((hit / true).nanmean()),
        "accuracy": float(hit.sum() / counts.sum()),
    }


def average_precision() -> Metric:
    """torchmetrics' metric of COCO: boxes as corners in pixels of the original images, at most 100 per image.

    Raises:
        ImportError: if its backend is missing.
    """
    from torchmetrics.detection import MeanAveragePrecision
    from torchmetrics.utilities.imports import _FASTER_COCO_EVAL_AVAILABLE, _PYCOCOTOOLS_AVAILABLE

    if not (_PYCOCOTOOLS_AVAILABLE or _FASTER_COCO_EVAL_AVAILABLE):
        raise ImportError('average precision needs pycocotools: pip install "omnissm[detection]"')
    backend: Literal["pycocotools", "faster_coco_eval"] = (
        "pycocotools" if _PYCOCOTOOLS_AVAILABLE else "faster_coco_eval"
    )
    # its own thresholds are float32, and 0.8 then exceeds a recall of 4 / 5: COCO's are float64
    overlaps, recalls = np.linspace(0.5, 0.95, 10).tolist(), np.linspace(0, 1, 101).tolist()
    metric = MeanAveragePrecision(
        box_format="xyxy",
        iou_thresholds=overlaps,
        rec_thresholds=recalls,
        class_metrics=True,
        extended_summary=True,
        backend=backend,
    )
    metric.warn_on_many_detections = False  # COCO counts the surest 100
    return metric


def precision_table(found: Mapping[str, Any], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows by class: AP (mean over IoU 0.5 to 0.95), AP at 0.5 and at 0.75, and the largest mean recall.

    Args:
        found: What `average_precision().compute()` gives.
        classes: Names; a class without true boxes has NaN.
    """
    precision, recall = found["precision"], found["recall"]  # (iou, recall, class, area, detections); without recall
    seen = [int(label) for label in torch.as_tensor(found["classes"]).reshape(-1)]
    rows = []
    for k, name in enumerate(classes):
        values = dict.fromkeys(("ap", "ap50", "ap75", "recall"), float("nan"))
        if k in seen and (curve := precision[:, :, seen.index(k), 0, -1]).max() >= 0:
            values = {"ap": float(curve.mean()), "ap50": float(curve[0].mean()), "ap75": float(curve[5].mean())}
            values["recall"] = float(recall[:, seen.index(k), 0, -1].mean())
        rows.append({"class": name, **values})
    return rows
