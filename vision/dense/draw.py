"""Boxes and masks drawn on images, and sheets of such drawings."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ...ssmcore.training.checkpoints import write_atomic
from .detectors import Found

Colour = tuple[int, int, int]


def colours(count: int) -> list[Colour]:
    """Distinct colours of classes, by steps of the golden ratio around the circle of hues."""
    found = []
    for k in range(count):
        red, green, blue = colorsys.hsv_to_rgb((0.02 + 0.618034 * k) % 1, 0.85, 0.95)
        found.append((round(255 * red), round(255 * green), round(255 * blue)))
    return found


def draw_boxes(image: Tensor, found: Found, classes: Sequence[str]) -> Tensor:
    """Boxes on an image of bytes (3, height, width), with class and score where it is large enough for letters."""
    if not len(found.boxes):
        return image
    palette = colours(len(classes))
    labels = [f"{classes[k]} {score:.2f}" for k, score in zip(found.labels.tolist(), found.scores.tolist())]
    boxes = found.boxes.cpu().clone()
    boxes[:, 2:] = boxes[:, 2:].maximum(boxes[:, :2])
    width = max(1, round(min(image.shape[1:]) / 200))
    legible = labels if min(image.shape[1:]) >= 128 else None
    return draw_bounding_boxes(image, boxes, legible, [palette[k] for k in found.labels.tolist()], width=width)


def draw_mask(image: Tensor, mask: Tensor, classes: Sequence[str], opacity: float = 0.5) -> Tensor:
    """Classes 1, 2, ... of a mask (height, width) as colours over an image of bytes (3, height, width)."""
    palette = colours(len(classes))
    layers = torch.stack([mask == k for k in range(1, len(classes))])
    return draw_segmentation_masks(image, layers, opacity, palette[1:])


def encode(image: Tensor) -> bytes:
    """An image of bytes (3, height, width) as a PNG file."""
    return _png(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()))


def encode_mask(mask: Tensor, count: int) -> bytes:
    """A mask (height, width) as a PNG file of class numbers with a palette."""
    image = Image.fromarray(mask.cpu().numpy().astype(np.uint8))
    image.putpalette([0, 0, 0] + [value for colour in colours(count)[1:] for value in colour])
    return _png(image)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_sheet(
    drawings: Sequence[tuple[str, Tensor]], classes: Sequence[str], out: Path, first: int = 0, columns: int = 3
) -> None:
    """Write drawings side by side with their names below and the classes' colours above.

    Args:
        drawings: Names and images of bytes (3, height, width).
        classes: Names of the classes.
        out: Picture, .png or .jpg.
        first: First class with a colour: 1 of masks, whose background is not drawn.
        columns: Images per row.
    """
    side, line, gap = 256, 18, 10
    rows, width = max(1, -(-len(drawings) // columns)), columns * (side + gap) + gap
    measure, legend, left, top = ImageDraw.Draw(Image.new("RGB", (1, 1))), [], gap, gap
    for name, colour in list(zip(classes, colours(len(classes))))[first:]:
        space = 30 + round(measure.textlength(name))
        if left > gap and left + space > width:
            left, top = gap, top + line
        legend.append((left, top, name, colour))
        left += space
    top += line + gap
    sheet = Image.new("RGB", (width, top + rows * (side + line + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, y, name, colour in legend:
        draw.rectangle((x, y, x + 10, y + 10), fill=colour)
        draw.text((x + 15, y), name, fill="#1f2933")
    for k, (name, drawn) in enumerate(drawings):
        x, y = gap + k % columns * (side + gap), top + k // columns * (side + line + gap)
        picture = Image.fromarray(drawn.permute(1, 2, 0).cpu().numpy())
        if (times := side // max(picture.size)) > 1:
            picture = picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)
        picture.thumbnail((side, side))
        sheet.paste(picture, (x + (side - picture.width) // 2, y + (side - picture.height) // 2))
        draw.text((x, y + side + 2), name[-36:], fill="#7b8794")
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG" if out.suffix.lower() in (".jpg", ".jpeg") else "PNG")
    write_atomic(out, buffer.getvalue())
