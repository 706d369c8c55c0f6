"""Files: safetensors, folders that appear whole or not at all, digests, JSON."""
