"""Benchmarks, run from the root of a checkout: `python -m benchmarks.gemm --help`. README.md lists them."""
