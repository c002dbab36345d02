"""Hugging Face checkpoints on disk: read one tensor, write shards, check that every tensor is where it should be."""
