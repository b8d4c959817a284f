"""h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, y_t = C_t h_t: the selective scan of Mamba, and its step."""
