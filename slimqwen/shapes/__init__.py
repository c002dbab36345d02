"""Shapes that a model can be cut to, and their costs: counts and bytes from config.json alone."""
