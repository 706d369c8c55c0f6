"""Searching the settings of each layer by their cost at the model's output."""
