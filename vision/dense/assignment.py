"""Which cells are trained to find which box, and the loss of a head that predicts scores and distances.

    t    = score(class of the box) ** alpha * IoU(predicted box, box) ** beta           for cells inside the box
    each box takes its `top` cells of largest t; a cell taken by several goes to the box it overlaps most
    soft label of a cell = t / max(t of the box's cells) * max(IoU of the box's cells)

Source: Feng, Zhong, Gao, Scott, Huang (2021), TOOD, section 3.3 (assignment and soft labels); Li, Wang, Wu et al.
(2020), Generalized focal loss, section 3.2 (distributions); Zheng et al. (2020), Distance-IoU loss, section 3 (CIoU).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, complete_box_iou_loss

from .yolo import BINS, Raw, decoded


class Assigned(NamedTuple):
    """Targets of one image's A cells.

    Attributes:
        box: Number of the box of each cell, (A,) int64; 0 where there is none.
        positive: Whether there is one, (A,) bool.
        weight: Soft label of the positive cells, (A,) float32, else 0.
    """

    box: Tensor
    positive: Tensor
    weight: Tensor


def assign(
    probability: Tensor,
    boxes: Tensor,
    raw: Raw,
    truth: Tensor,
    labels: Tensor,
    top: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> Assigned:
    """Match the cells of one image with its boxes. A box too small to hold a centre takes the nearest finest cell.

    Args:
        probability: Of each class, (A, classes).
        boxes: Predicted corners, (A, 4).
        raw: Whose centres and strides count.
        truth: Corners of the m boxes, (m, 4).
        labels: Their classes, (m,).
        top: Cells per box at most.
        alpha: Power of the score.
        beta: Power of the overlap.
    """
    cells = len(raw.centres)
    if not len(truth):
        none = torch.zeros(cells, device=boxes.device)
        return Assigned(none.long(), none.bool(), none)
    x, y = raw.centres[:, 0], raw.centres[:, 1]
    edges = [x - truth[:, :1], y - truth[:, 1:2], truth[:, 2:3] - x, truth[:, 3:] - y]
    inside = torch.stack(edges).amin(0) > 1e-6  # (m, A)
    finest = int((raw.strides == raw.strides[0]).sum())
    middle = (truth[:, :2] + truth[:, 2:]) / 2
    nearest = torch.cdist(middle, raw.centres[:finest]).argmin(1)
    empty = ~inside.any(1)
    inside[empty, nearest[empty]] = True

    overlap = box_iou(truth, boxes).nan_to_num(0).clamp(min=0)
    merit = (probability.T[labels] ** alpha * overlap**beta).where(inside, 0)
    best = merit.topk(min(top, cells), dim=1).indices
    taken = torch.zeros_like(inside).scatter_(1, best, True) & inside
    several = taken.sum(0) > 1
    winner = overlap.where(taken, -1).argmax(0)
    only = F.one_hot(winner, len(truth)).T.bool()
    taken = torch.where(several, taken & only, taken)

    positive = taken.any(0)
    box = taken.long().argmax(0)
    merit, overlap = merit * taken, overlap * taken
    # a box of few pixels begins with an overlap of 1e-3 and a merit of 1e-19, and must learn all the same
    soft = merit * overlap.amax(1, keepdim=True) / merit.amax(1, keepdim=True).clamp(min=1e-37)
    return Assigned(box, positive, soft.amax(0))


def distribution_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy with the two whole numbers beside the target, weighted by nearness.

    Args:
        logits: Of the distributions, (..., 16).
        target: Distances in strides, (...), cut to [0, 14.99].
    """
    target = target.clamp(0, BINS - 1 - 0.01)
    low = target.long()
    share = target - low
    flat = logits.flatten(0, -2)
    below = F.cross_entropy(flat, low.flatten(), reduction="none").view_as(target)
    above = F.cross_entropy(flat, low.flatten() + 1, reduction="none").view_as(target)
    return below * (1 - share) + above * share


def detection_loss(raw: Raw, boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Losses of a batch, each divided by the sum of all soft labels (at least 1), in float32.

    Args:
        raw: What the head says.
        boxes: Corners in pixels, (b, m, 4).
        labels: Classes, (b, m), -1 where there is no box.

    Returns:
        `score` (binary cross entropy with the soft labels), `box` (CIoU) and `distribution`.
    """
    scores, predicted = raw.scores.float(), decoded(raw)
    soft = torch.zeros_like(scores)
    box_loss = distribution = scores.new_zeros(())
    for k in range(len(scores)):
        held = labels[k] >= 0
        truth, classes = boxes[k][held].float(), labels[k][held]
        with torch.no_grad():
            found = assign(scores[k].sigmoid(), predicted[k], raw, truth, classes)
        if not len(truth):
            continue
        cells = found.positive.nonzero()[:, 0]
        number, weight = found.box[cells], found.weight[cells]
        soft[k, cells, classes[number]] = weight
        box_loss = box_loss + (complete_box_iou_loss(predicted[k][cells], truth[number]) * weight).sum()
        centres, strides = raw.centres[cells], raw.strides[cells, None]
        sides = torch.cat([centres - truth[number, :2], truth[number, 2:] - centres], dim=1) / strides
        losses = distribution_loss(raw.distances[k][cells].float(), sides)
        distribution = distribution + (losses.mean(1) * weight).sum()
    total = soft.sum().clamp(min=1)
    score = F.binary_cross_entropy_with_logits(scores, soft, reduction="sum")
    return {"score": score / total, "box": box_loss / total, "distribution": distribution / total}
