"""LoRA adapters of peft on quantized layers."""
