"""Parts of experiments/ptq.py: cells of its table, measured in workers, and its page."""
