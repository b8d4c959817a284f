"""The recurrence of Mamba-3: trapezoidal input, data-dependent rotation of keys and queries, several ranks."""
