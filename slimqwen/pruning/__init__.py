"""Applying a plan to a checkpoint, by its family's axis table."""
