"""Parts of experiments/ptq.py: the cells of its table, measured in worker processes, and its page."""
