"""Calibration, smoothing factors, folding and conversion to int8."""
