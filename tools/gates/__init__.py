"""Checks of compiled kernels that need no GPU."""
