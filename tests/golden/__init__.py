"""The golden capture: what slimqwen makes of three tiny models, written down so that a refactoring can be seen to change nothing.

`make golden` rewrites golden.json; tests/test_golden.py makes everything again and compares.
"""
