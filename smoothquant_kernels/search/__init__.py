"""Settings for each layer, searched by what they cost at the model's output."""
