"""Data modules: sequence windows and labelled sequences as `SequenceBatch`."""

from __future__ import annotations

from .batch import SequenceBatch as SequenceBatch

__all__ = ["SequenceBatch"]
