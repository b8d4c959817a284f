"""H_t = exp(log_decay_t) H_{t-1} + weight_t x_t B_t^T, y_t = H_t C_t + D x_t, the recurrence of Mamba-2."""
