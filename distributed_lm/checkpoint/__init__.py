"""Checkpoints in Megatron's ``dist_checkpointing`` format, under names that no layout changes."""
