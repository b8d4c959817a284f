"""Images together with their boxes or masks: resized, cropped, mirrored and coloured by torchvision's joint transforms.

A sample is an image (3, height, width) of bytes and a mapping with `boxes`, `labels` and what goes with each box, or
with a `mask`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

DenseAugment = Literal["none", "flip", "cells", "scenes"]

GREY = 114  # of the rows and columns that fill up an image
KEPT_SHARE = 0.25  # of a box's area that must be left after a crop
# augmentation: mirrored (sideways, and from top to bottom), smallest and largest zoom, jitter of colours
PLANS: dict[str, dict[str, Any]] = {
    "none": {},
    "flip": {"sideways": True},
    "cells": {"sideways": True, "upside_down": True, "zoom": (0.7, 1.4), "colour": 0.2},
    "scenes": {"sideways": True, "zoom": (0.5, 1.5), "colour": 0.3},
}


def fitted_size(height: int, width: int, target: tuple[int, int], zoom: float = 1.0) -> tuple[int, int]:
    """Rows and columns, each at least 1, of the largest copy of an image that fits into `target`, times a zoom."""
    scale = zoom * min(target[0] / height, target[1] / width)
    return max(1, round(height * scale)), max(1, round(width * scale))


class View(nn.Module):
    """Resize to fit into a size with proportions kept, times a random zoom, then crop or fill up to that size.

    Without a zoom the upper left corner stays where it is, so positions in the result are those in the image times a
    factor. Otherwise the place is random, and boxes of which less than a quarter is left are dropped.

    Args:
        size: Rows and columns of the result.
        zoom: Smallest and largest zoom; None fits the image.
        mask_fill: Value of masks where the image is filled up.
    """

    def __init__(self, size: tuple[int, int], zoom: tuple[float, float] | None = None, mask_fill: int = 255) -> None:
        super().__init__()
        self.size, self.zoom, self.mask_fill = size, zoom, mask_fill

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Image and target of the new size."""
        zoom = 1.0 if self.zoom is None else float(torch.empty(1).uniform_(*self.zoom))
        rows, columns = fitted_size(image.shape[-2], image.shape[-1], self.size, zoom)
        places = []
        for inside, outside in ((rows, self.size[0]), (columns, self.size[1])):
            room = abs(outside - inside) if self.zoom is not None else 0
            places.append(int(torch.randint(room + 1, ())))
        top, left = places
        cut_rows, cut_columns = min(rows, self.size[0]), min(columns, self.size[1])

        def place(value: Any) -> Any:
            fill = self.mask_fill if isinstance(value, tv_tensors.Mask) else GREY
            value = tvf.resize(value, [rows, columns], antialias=True)
            cut = (top if rows > self.size[0] else 0, left if columns > self.size[1] else 0)
            value = tvf.crop(value, *cut, cut_rows, cut_columns)
            above, before = (top if rows < self.size[0] else 0), (left if columns < self.size[1] else 0)
            after, below = self.size[1] - cut_columns - before, self.size[0] - cut_rows - above
            return tvf.pad(value, [before, above, after, below], fill=fill)

        moved = {name: place(v) if isinstance(v, tv_tensors.TVTensor) else v for name, v in target.items()}
        if "boxes" in target:
            scale = rows / image.shape[-2] * columns / image.shape[-1]
            left_over = _areas(moved["boxes"]) / (_areas(target["boxes"]) * scale).clamp(min=1e-6)
            moved = {name: v[left_over >= KEPT_SHARE] for name, v in moved.items()}
        return place(image), moved


# luminance, and two axes of colour around it
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


class Colours(nn.Module):
    """Random brightness b, contrast c, saturation s and hue h of an image by one product with a matrix, cut to [0, 1].

        y = b c Q^-1 diag(1, s R(h)) Q x + b (1 - c) m,      Q x = luminance and two axes of colour, m = mean luminance

    As four changes one after another, but for their cuts to [0, 1]; hues turn around the axis of greys, not in HSV.

    Args:
        strength: b, c and s are drawn from [1 - strength, 1 + strength], h from a tenth of [-strength, strength] turns.
    """

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """An image of bytes as float32 in [0, 1], and the target as it is."""
        brightness, contrast, saturation = (1 + self.strength * (2 * torch.rand(3) - 1)).tolist()
        angle = 2 * math.pi * self.strength / 10 * (2 * float(torch.rand(())) - 1)
        cos, sin = saturation * math.cos(angle), saturation * math.sin(angle)
        turned = torch.tensor([[1.0, 0, 0], [0, cos, -sin], [0, sin, cos]])
        matrix = brightness * contrast * torch.linalg.solve(YIQ, turned @ YIQ)
        values = as_float(image)
        grey = brightness * (1 - contrast) * (YIQ[0] @ values.mean(dim=(1, 2)))
        changed = torch.addmm(grey.expand(3, 1), matrix, values.flatten(1)).clamp_(0, 1)
        return tv_tensors.Image(changed.view_as(values)), target


def _areas(boxes: Tensor) -> Tensor:
    corners = boxes.as_subclass(Tensor)
    return (corners[:, 2:] - corners[:, :2]).prod(dim=1)


def train_view(
    size: tuple[int, int], augment: DenseAugment, options: dict[str, Any] | None = None, mask_fill: int = 255
) -> nn.Module:
    """Transform of training samples.

    Args:
        size: Rows and columns of the result.
        augment: "none"; "flip" mirrors sideways; "cells" mirrors both ways and zooms and colours a little; "scenes"
            mirrors sideways and zooms and colours more.
        options: Changes of the plan: sideways, upside_down (booleans), zoom (pair), colour (strength).
        mask_fill: Value of masks where the image is filled up.

    Raises:
        ValueError: for an unknown name or option.
    """
    if augment not in PLANS:
        raise ValueError(f"augment must be one of {', '.join(PLANS)}, got {augment!r}.")
    plan: dict[str, Any] = {"sideways": False, "upside_down": False, "zoom": None, "colour": 0.0}
    unknown = sorted(set(options or {}) - set(plan))
    if unknown:
        raise ValueError(f"augmentation has no option {unknown[0]!r}; it has {', '.join(plan)}.")
    plan = {**plan, **PLANS[augment], **(options or {})}
    zoom, strength = plan["zoom"], plan["colour"]
    pair = isinstance(zoom, (list, tuple)) and len(zoom) == 2 and all(isinstance(one, (int, float)) for one in zoom)
    if zoom is not None and not (pair and 0 < zoom[0] <= zoom[1]):
        raise ValueError(f"zoom is a pair [smallest, largest] of positive numbers, got {zoom}.")
    if not (isinstance(strength, (int, float)) and 0 <= strength <= 1):
        raise ValueError(f"colour is a strength in [0, 1], got {strength!r}.")
    for name in ("sideways", "upside_down"):
        if not isinstance(plan[name], bool):
            raise ValueError(f"{name} is true or false, got {plan[name]!r}.")
    steps: list[nn.Module] = []
    if plan["sideways"]:
        steps.append(v2.RandomHorizontalFlip())
    if plan["upside_down"]:
        steps.append(v2.RandomVerticalFlip())
    steps.append(View(size, tuple(zoom) if zoom else None, mask_fill))
    if strength:
        steps.append(Colours(strength))
    return v2.Compose(steps)


def as_float(image: Tensor) -> Tensor:
    """Bytes (3, height, width) as plain float32 in [0, 1]; what is so already stays."""
    values = image.as_subclass(Tensor)
    return values if values.is_floating_point() else values.float().div_(255)
