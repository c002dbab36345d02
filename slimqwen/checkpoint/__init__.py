"""Hugging Face checkpoints on disk: config, headers, lazy reading of tensors, and writing of shards."""
