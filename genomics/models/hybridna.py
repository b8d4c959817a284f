"""HybriDNA: seven layers of Mamba-2 to one of attention with shared keys and values, all with MLPs; causal.

| name | layout | width | parameters |
| --- | --- | --- | --- |
| hybridna_tiny | M1T1M2 | 64 | 195,250 |
| hybridna_300m | three times M3T1M4 | 1024 | 297,526,432 |

Ma et al. (2025), "HybriDNA: A Hybrid Transformer-Mamba2 Long-Range DNA Language Model". The place of attention within a
group of eight follows the published drawing; widths of MLPs and numbers of heads are not published.
"""

from __future__ import annotations

from typing import Any

from .hnet import HNet


def hybridna_tiny(**overrides: Any) -> HNet:
    """64 wide, 4 layers: for tests."""
    return _hybrid(overrides, "M1T1M2", 64, hidden=128, heads=4, kv_heads=2, d_state=16)


def hybridna_300m(**overrides: Any) -> HNet:
    """1024 wide, 24 layers."""
    return _hybrid(overrides, "M3T1M4" * 3, 1024, hidden=2048, heads=16, kv_heads=4, d_state=128)


def _hybrid(
    overrides: dict[str, Any], pattern: str, width: int, *, hidden: int | None, heads: int, kv_heads: int, d_state: int
) -> HNet:
    attention = {"num_heads": [heads], "num_kv_heads": [kv_heads], "rotary_emb_dim": [width // heads]}
    defaults: dict[str, Any] = {
        "arch_layout": [pattern],
        "d_model": [width],
        "d_intermediate": [hidden],
        "ssm_cfg": {"d_state": d_state},
        "attn_cfg": attention | {"window_size": [-1]},
        "tie_embeddings": True,
        "vocabulary": "char",
    }
    return HNet(**(defaults | overrides))
