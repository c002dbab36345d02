"""The figures of the pages: numbers in, a plotly Figure out.

Lines and bars have a contrast of at least 3:1 on a light and on a dark page; text and grid lines get theirs
from the page's style sheet, so that they follow the reader's theme.
"""
