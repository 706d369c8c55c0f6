"""The command `smoothquant-kernels`."""
