"""The compressed-tensors format of W8A8 checkpoints, which llm-compressor writes and vLLM, SGLang and transformers read."""
