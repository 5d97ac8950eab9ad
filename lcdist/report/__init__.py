"""Write the HTML report of a run.

This package imports neither torch nor matplotlib; figures import matplotlib when they are drawn.
"""
