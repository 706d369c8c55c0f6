"""placeholder until merged"""

QUANT_METHOD = "compressed-tensors"
WEIGHT = "weight"
WEIGHT_SCALE = "weight_scale"
INPUT_SCALE = "input_scale"
