"""The decoder: Megatron-core layers, our attention over them, and one file per position method."""
