"""Files: safetensors, folders that appear whole, digests, JSON."""
