"""Checkpoints of quantized models: written, read, and loaded by transformers."""
