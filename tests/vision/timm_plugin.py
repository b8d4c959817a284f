"""Pytest plugin that makes timm's own tests/test_models.py run over the models of this package and no others.

    PYTHONPATH=tests/vision pytest -p timm_plugin PATH/pytorch-image-models/tests/test_models.py

Token models go where that file has its plain transformers: among the models without spatial output.
"""

import os
from fnmatch import fnmatch

import timm

from omnissm import vision

NAMES = vision.list_models()
TOKENS = ("hydra_vit_*", "vim_*", "lbvim_*", "chimera_vit_*", "plainmamba_*")


def list_models(filter="", module="", pretrained=False, exclude_filters="", **_):
    """timm's function of this name, for our models; OMNISSM_MODELS narrows them."""
    if pretrained or ("vit_*" not in exclude_filters and filter and "vit_*" not in filter):
        return []
    names = [name for name in NAMES if fnmatch(name, os.environ.get("OMNISSM_MODELS", "*"))]
    if "vit_*" in (filter or ()):
        return [name for name in names if any(fnmatch(name, pattern) for pattern in TOKENS)]
    if "vit_*" in (exclude_filters or ()):
        return [name for name in names if not any(fnmatch(name, pattern) for pattern in TOKENS)]
    return names


timm.list_models = list_models
timm.list_pretrained = lambda *_, **__: []


def pytest_configure(config):
    for marker in ("base", "cfg", "torchscript", "features", "fxforward", "fxbackward", "timeout"):
        config.addinivalue_line("markers", f"{marker}: of timm's suite")
