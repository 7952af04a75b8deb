"""Parts of experiments/results_page.py: results/README.md, the headline table and the headline figure."""
