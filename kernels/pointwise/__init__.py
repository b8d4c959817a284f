"""Element-wise steps between projections, each in one kernel on a GPU where no gradient is asked for."""
