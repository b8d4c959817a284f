"""What timm is told of our models: default input, normalisation, names of first and last layer; how it makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


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


def create_tokens(
    model: type[M], filter_fn: Callable[..., dict[str, Tensor]] | None, name: str, pretrained: bool, **options: Any
) -> M:
    """timm's way to a token model; `features_only=True` takes its levels by the model's own method.

    Args:
        model: Its class.
        filter_fn: From the weights of a file and a model to that model's weights; None where names agree.
        name: Registered name.
        pretrained: Whether to load weights.
        **options: Of the model, or of timm's builder.
    """
    levels = {"out_indices": 3, "feature_cls": "getter"}  # new each time: timm writes into it
    return build_model_with_cfg(model, name, pretrained, pretrained_filter_fn=filter_fn, feature_cfg=levels, **options)


def create_pyramid(
    model: type[M], filter_fn: Callable[..., dict[str, Tensor]] | None, name: str, pretrained: bool, **options: Any
) -> M:
    """The same for a pyramid, whose stages are its levels; arguments as of `create_tokens`."""
    levels = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
    return build_model_with_cfg(model, name, pretrained, pretrained_filter_fn=filter_fn, feature_cfg=levels, **options)
