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
from torchvision.ops import complete_box_iou_loss

from .yolo import BINS, Raw, decoded


class Assigned(NamedTuple):
    """Targets of the A cells of each image.

    Attributes:
        box: Number of the box of each cell, (b, A) int64; 0 where there is none.
        positive: Whether there is one, (b, A) bool.
        weight: Soft label of the positive cells, (b, A) float32, else 0.
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
    """Match cells with boxes, in all images at once. A box too small to hold a centre takes the nearest finest cell.

    Args:
        probability: Of each class, (b, A, classes).
        boxes: Predicted corners, (b, A, 4).
        raw: Whose centres and strides count.
        truth: Corners of m boxes an image, at least one, (b, m, 4).
        labels: Their classes, (b, m), -1 where there is no box.
        top: Cells per box at most.
        alpha: Power of the score.
        beta: Power of the overlap.
    """
    x, y = raw.centres[:, 0], raw.centres[:, 1]
    x0, y0, x1, y1 = truth[..., None].unbind(2)  # (b, m, 1)
    inside = torch.stack([x - x0, y - y0, x1 - x, y1 - y]).amin(0) > 1e-6  # (b, m, A)
    finest = int((raw.strides == raw.strides[0]).sum())
    middle = (truth[..., :2] + truth[..., 2:]) / 2
    nearest = torch.cdist(middle, raw.centres[:finest].expand(len(truth), -1, -1)).argmin(2, keepdim=True)
    empty = ~inside.any(2, keepdim=True)
    inside = inside.scatter(2, nearest, inside.gather(2, nearest) | empty) & (labels >= 0)[..., None]

    overlap = _overlaps(truth, boxes)
    score = probability.mT.gather(1, labels.clamp(min=0)[..., None].expand_as(overlap))
    merit = (score**alpha * overlap**beta).where(inside, 0)
    best = merit.topk(min(top, merit.shape[2]), dim=2).indices
    taken = torch.zeros_like(inside).scatter(2, best, True) & inside
    winner = overlap.where(taken, -1).argmax(1, keepdim=True)
    taken &= torch.zeros_like(taken).scatter(1, winner, True)

    merit, overlap = merit * taken, overlap * taken
    # a box of few pixels begins with an overlap of 1e-3 and a merit of 1e-19, and must learn all the same
    soft = merit * overlap.amax(2, keepdim=True) / merit.amax(2, keepdim=True).clamp(min=1e-37)
    return Assigned(taken.long().argmax(1), taken.any(1), soft.amax(1))


def _overlaps(truth: Tensor, boxes: Tensor) -> Tensor:
    """IoU of boxes (b, m, 4) with boxes (b, A, 4), (b, m, A); 0 where there is no area."""
    ours, theirs = truth[:, :, None], boxes[:, None]
    sides = torch.minimum(ours[..., 2:], theirs[..., 2:]) - torch.maximum(ours[..., :2], theirs[..., :2])
    common = sides.clamp(min=0).prod(-1)
    areas = (ours[..., 2:] - ours[..., :2]).prod(-1) + (theirs[..., 2:] - theirs[..., :2]).prod(-1)
    return (common / (areas - common)).nan_to_num(0, 0, 0).clamp(min=0)


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
    if not labels.shape[1]:
        score = F.binary_cross_entropy_with_logits(scores, soft, reduction="sum")
        return {"score": score, "box": score.new_zeros(()), "distribution": score.new_zeros(())}
    boxes = boxes.float()
    with torch.no_grad():
        found = assign(scores.sigmoid(), predicted, raw, boxes, labels)
    image, cell = found.positive.nonzero(as_tuple=True)
    number, weight = found.box[image, cell], found.weight[image, cell]
    soft[image, cell, labels[image, number]] = weight
    total, truth = weight.sum().clamp(min=1), boxes[image, number]
    box = (complete_box_iou_loss(predicted[image, cell], truth) * weight).sum()
    centres, strides = raw.centres[cell], raw.strides[cell, None]
    sides = torch.cat([centres - truth[:, :2], truth[:, 2:] - centres], dim=1) / strides
    distribution = (distribution_loss(raw.distances[image, cell].float(), sides).mean(1) * weight).sum()
    score = F.binary_cross_entropy_with_logits(scores, soft, reduction="sum")
    return {"score": score / total, "box": box / total, "distribution": distribution / total}
