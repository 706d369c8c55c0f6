"""Inspects, runs and changes a model: its layers, what reads each tensor, and the record of what was done."""
