"""Quantizes a checkpoint that is larger than memory."""
