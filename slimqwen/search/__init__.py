"""The search for a shape by measured damage: KL to the teacher of cuts along one axis, then of whole shapes (docs/search.md)."""
