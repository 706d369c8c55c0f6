"""Whole blocks in int8: norms and activations that quantize for their readers, merged GEMMs, residuals in epilogues."""
