"""The two-sided mix of Hydra: one recurrence from each end, and a free diagonal."""
