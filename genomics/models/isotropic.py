"""Baselines without chunking: one stack over bases, of Mamba-2 or of attention, each about as large as a dnaHNet.

| name | layout | width | parameters | beside |
| --- | --- | --- | --- | --- |
| mamba2_debug | m4 | 224 | 1,454,388 | dnahnet_debug |
| transformer_debug | T3 | 192 | 1,426,752 | dnahnet_debug |
| mamba2_small | m20 | 512 | 34,664,896 | dnahnet_small |
| transformer_small | T11 | 512 | 35,597,824 | dnahnet_small |
| mamba2_hg38 | M10 | 512 | 33,197,536 | hnet_hg38_m15 |
| transformer_hg38 | T9 | 512 | 29,173,248 | hnet_hg38_t15 |

An `HNet` without stages; the last two are those of Hwang, Wang & Gu (2025), section 3.2.
"""

from __future__ import annotations

from typing import Any

from .hnet import HNet


def mamba2_debug(**overrides: Any) -> HNet:
    """4 layers of Mamba-2, 224 wide."""
    return _isotropic(overrides, "m4", 224, d_state=64)


def transformer_debug(**overrides: Any) -> HNet:
    """3 Transformer layers, 192 wide."""
    return _isotropic(overrides, "T3", 192, heads=4)


def mamba2_small(**overrides: Any) -> HNet:
    """20 layers of Mamba-2, 512 wide."""
    return _isotropic(overrides, "m20", 512)


def transformer_small(**overrides: Any) -> HNet:
    """11 Transformer layers, 512 wide."""
    return _isotropic(overrides, "T11", 512, hidden=1408)


def mamba2_hg38(**overrides: Any) -> HNet:
    """The published baseline: 10 layers of Mamba-2 with MLPs, 512 wide."""
    return _isotropic(overrides, "M10", 512, hidden=1024)


def transformer_hg38(**overrides: Any) -> HNet:
    """The published baseline: 9 Transformer layers, 512 wide."""
    return _isotropic(overrides, "T9", 512, hidden=1408)


def _isotropic(
    overrides: dict[str, Any],
    pattern: str,
    width: int,
    *,
    hidden: int | None = None,
    d_state: int = 128,
    heads: int = 8,
) -> HNet:
    defaults: dict[str, Any] = {
        "arch_layout": [pattern],
        "d_model": [width],
        "d_intermediate": [hidden],
        "ssm_cfg": {"d_state": d_state},
        "attn_cfg": {"num_heads": [heads], "rotary_emb_dim": [32], "window_size": [-1]},
    }
    return HNet(**(defaults | overrides))
