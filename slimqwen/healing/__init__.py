"""Healing: every layer of a cut model trained alone, by gradient, towards the teacher's stream after the same layer."""
