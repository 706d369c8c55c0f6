"""Quantized layers, and what they need of float ones."""
