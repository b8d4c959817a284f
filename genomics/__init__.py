"""State-space models of DNA: training, and scoring of variants.

Names are imported on first use, so that the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .intervals import Interval as Interval
    from .intervals import Variant as Variant
    from .models import create_model as create_model
    from .models import from_pretrained as from_pretrained
    from .models import list_models as list_models
    from .models import pretrained_models as pretrained_models
    from .models import save_pretrained as save_pretrained
    from .reference import Reference as Reference
    from .scanning import scan as scan
    from .scoring import merge_scores as merge_scores
    from .scoring import score_sequences as score_sequences
    from .scoring import score_variants as score_variants
    from .sequence import decode as decode
    from .sequence import encode as encode
    from .variants import read_variants as read_variants
    from .variants import read_vcf as read_vcf

_HOME = {
    "Interval": "intervals",
    "Reference": "reference",
    "Variant": "intervals",
    "create_model": "models",
    "decode": "sequence",
    "encode": "sequence",
    "from_pretrained": "models",
    "list_models": "models",
    "merge_scores": "scoring",
    "pretrained_models": "models",
    "read_variants": "variants",
    "read_vcf": "variants",
    "save_pretrained": "models",
    "scan": "scanning",
    "score_sequences": "scoring",
    "score_variants": "scoring",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
