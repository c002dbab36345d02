"""The content of the pages' sections, from the artefacts of a run; one module per topic.

Each is None or empty where the run has no data for it.
"""
