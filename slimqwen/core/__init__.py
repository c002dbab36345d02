"""Foundations that every room uses, independent of models: errors, terminal output, progress, warnings, memory, units."""
