"""Experts of a mixture whose weights are matrices in one 3-D parameter: the float module, and its int8 layer."""
