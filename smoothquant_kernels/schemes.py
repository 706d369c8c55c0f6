"""Names of the quantization schemes, and the largest rotation."""

ACTIVATION_SCHEMES = ("per_token", "per_tensor", "static")
#: The most channels that a rotation mixes.
MAX_ROTATION = 512
WEIGHT_GRANULARITIES = ("channel", "tensor")
