"""Models and text to evaluate, and how good a model is on them."""
