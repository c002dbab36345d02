"""The figures of the pages, each made by a function from numbers to a plotly Figure.

Lines and bars have a contrast of at least 3:1 on a light and on a dark page; text and grid lines are coloured
by the page's style sheet, so that they follow the browser's theme.
"""
