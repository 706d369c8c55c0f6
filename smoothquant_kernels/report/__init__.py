"""A report on smoothing a model."""
