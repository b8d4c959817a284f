"""What timm is told of our models: default input, normalisation, and names of first and last layer."""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def token_cfg(paper: str, **changes: Any) -> dict[str, Any]:
    """Settings of a token model of 224 x 224 pixels; there are no weights, so nothing is ever downloaded."""
    settings = {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": paper,
    }
    return {**settings, **changes}


def pyramid_cfg(paper: str, first_conv: str, classifier: str, **changes: Any) -> dict[str, Any]:
    """Settings of a pyramid: any input size, 7 x 7 cells before pooling at 224 x 224 pixels."""
    changes = {"first_conv": first_conv, "classifier": classifier, "pool_size": (7, 7), **changes}
    return token_cfg(paper, fixed_input_size=False, **changes)
