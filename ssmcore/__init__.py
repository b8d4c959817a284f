"""Building blocks of state-space models."""
