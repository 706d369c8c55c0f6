"""Models and text for evaluation, and measures of how good a model is."""
