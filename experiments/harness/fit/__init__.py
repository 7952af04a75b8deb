"""Parts of experiments/fit.py: cells of the tables, reference choices, correlations, and the page."""
