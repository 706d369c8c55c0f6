"""Checks of the binding (csrc/torch) with every torch that it promises to fit; no GPU and no CUDA are needed."""
