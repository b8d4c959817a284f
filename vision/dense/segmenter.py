"""Networks that name the class of each pixel: a backbone with a head, or a model of torchvision to compare with."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.joint import fitted_size
from .features import Features, resized
from .heads import FCNHead, create_head

TORCHVISION = "torchvision/"


class Segmenter(nn.Module):
    """A backbone, a head on its levels, and in training a second head on the level before the coarsest.

    Args:
        backbone: Name of a model of ours or timm's.
        backbone_args: Its options.
        head: "fpn", "upernet" or "segman".
        head_args: Its options.
        num_classes: Classes.
        auxiliary: Channels of the second head; 0 for none.
    """

    def __init__(
        self,
        backbone: str,
        backbone_args: dict[str, Any] | None = None,
        head: str = "upernet",
        head_args: dict[str, Any] | None = None,
        num_classes: int = 2,
        auxiliary: int = 0,
    ) -> None:
        super().__init__()
        least = 8 if head == "segman" else 1  # its decoder leaves the finest level out
        self.features = Features(backbone, backbone_args, least_stride=least)
        self.default_cfg = self.features.default_cfg
        self.head = create_head(head, self.features.channels, num_classes, **(head_args or {}))
        second = self.features.channels[-2]
        self.auxiliary = FCNHead(second, num_classes, auxiliary) if auxiliary else None

    def forward(self, x: Tensor, auxiliary: bool = False) -> Any:
        """Logits (b, classes, height, width) of normalised images; with `auxiliary` the pair with the second head's.

        The latter are None where there is no second head.
        """
        size = x.shape[-2:]
        levels = self.features(x)
        logits = self._cut(self.head(levels), size)
        if not auxiliary:
            return logits
        return logits, None if self.auxiliary is None else self._cut(self.auxiliary(levels[-2]), size)

    @staticmethod
    def _cut(logits: Tensor, size: Any) -> Tensor:
        """To the image's size; images below 32 pixels had been filled up to 32."""
        whole = [max(32, size[0]), max(32, size[1])]
        return resized(logits, whole)[..., : size[0], : size[1]]


class TorchvisionSegmenter(nn.Module):
    """A model of `torchvision.models.segmentation` without weights, behind the same interface."""

    def __init__(self, name: str, num_classes: int, **options: Any) -> None:
        super().__init__()
        from torchvision.models import get_model_builder, list_models, segmentation

        if name not in list_models(module=segmentation):
            raise ValueError(f"torchvision has no segmentation model {name!r}, only {list_models(segmentation)}.")
        builder = get_model_builder(name)
        known = [k for k, p in inspect.signature(builder).parameters.items() if p.kind is not p.VAR_KEYWORD]
        for option in options:
            if option not in known:  # torchvision itself would take it and do nothing
                raise TypeError(f"model {TORCHVISION + name!r} has no option {option!r}; it has {', '.join(known)}.")
        self.body = builder(weights=None, weights_backbone=None, num_classes=num_classes, **options)

    def forward(self, x: Tensor, auxiliary: bool = False) -> Any:
        """As `Segmenter.forward`."""
        found = self.body(x)
        return (found["out"], found.get("aux")) if auxiliary else found["out"]


def create_segmenter(backbone: str, num_classes: int, backbone_args: Any = None, **options: Any) -> nn.Module:
    """Build a network.

    Args:
        backbone: Name of a model of ours or timm's, or "torchvision/NAME" for a whole model of torchvision.
        num_classes: Classes.
        backbone_args: Options of the backbone.
        **options: Others of `Segmenter`.

    Raises:
        ValueError: if the model is unknown, or a whole model of torchvision is to have a head of ours.
        TypeError: for an option that the model does not have.
    """
    if backbone.startswith(TORCHVISION):
        if any(options.values()):
            given = ", ".join(name for name, value in options.items() if value)
            raise ValueError(f"{backbone} is a whole model with its own head; it takes no {given}.")
        return TorchvisionSegmenter(backbone.removeprefix(TORCHVISION), num_classes, **(backbone_args or {}))
    return Segmenter(backbone, backbone_args, num_classes=num_classes, **options)


def unfitted(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (k, rows, columns) of a fitted and filled-up image, cut and resized to the original (height, width)."""
    rows, columns = fitted_size(*size, (maps.shape[-2], maps.shape[-1]))
    return resized(maps[None, :, :rows, :columns], size)[0]


def slide(net: nn.Module, image: Tensor, window: tuple[int, int], overlap: float = 0.5) -> Tensor:
    """Logits of a large image as means over windows that overlap.

    Args:
        net: Maps normalised images (b, 3, height, width) to logits of the same sides.
        image: One normalised image, (3, height, width).
        window: Rows and columns seen at a time.
        overlap: Share of a window that the next one covers too.

    Returns:
        (classes, height, width).

    Raises:
        ValueError: if the overlap is not in [0, 1).
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is a share in [0, 1), got {overlap}.")
    height, width = image.shape[-2:]
    fill = [0, max(0, window[1] - width), 0, max(0, window[0] - height)]
    padded = F.pad(image, fill)
    total = count = torch.zeros((), device=image.device)
    for top in _starts(padded.shape[-2], window[0], overlap):
        for left in _starts(padded.shape[-1], window[1], overlap):
            place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = net(padded[place][None])[0].float()
            if total.dim() == 0:
                total = logits.new_zeros(len(logits), *padded.shape[-2:])
                count = logits.new_zeros(padded.shape[-2:])
            total[place] += logits
            count[place] += 1
    return (total / count)[:, :height, :width]


def _starts(length: int, window: int, overlap: float) -> Iterator[int]:
    step = max(1, round(window * (1 - overlap)))
    yield from range(0, max(length - window, 0), step)
    yield length - window
