"""Searching a shape by what the cut model says: KL to the teacher, axis by axis, then of whole shapes (docs/search.md)."""
