"""Applying a plan to a checkpoint: the axis table says how, the plan says what."""
