"""The int8 cache of keys and values for transformers, its calibration, and its attention."""
