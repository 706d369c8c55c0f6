"""The compressed-tensors format: llm-compressor writes it; vLLM, SGLang and transformers read it."""
