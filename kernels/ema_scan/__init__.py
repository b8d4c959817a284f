"""m_t = p_t x_t + (1 - p_t) m_{t-1}, smoothing with one weight per position."""
