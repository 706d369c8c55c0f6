"""Experts of a mixture: what calibration measures of them, their smoothing factors, and their int8 layers."""
