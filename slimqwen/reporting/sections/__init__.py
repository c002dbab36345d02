"""What each section of the pages shows, out of the artefacts of a run; a module per theme.

Each is None or empty where the run has nothing to show in it.
"""
