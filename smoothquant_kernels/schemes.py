"""Names of the quantization schemes."""

ACTIVATION_SCHEMES = ("per_token", "per_tensor", "static")
WEIGHT_GRANULARITIES = ("channel", "tensor")
