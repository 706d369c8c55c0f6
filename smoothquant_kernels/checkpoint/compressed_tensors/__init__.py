"""The compressed-tensors format of llm-compressor and vLLM, read and written by hand: that package is not needed."""
