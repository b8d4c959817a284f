"""Time series: 2-D state-space forecasting on xarray data."""
