"""Healing: every layer of a cut model trained alone, by gradient, to hand on the stream that the teacher's does."""
