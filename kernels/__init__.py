"""Scan operators of state-space models, as functions on tensors."""
