"""Tensor parallelism: int8 layers whose weights are spread over the processes of a group."""
