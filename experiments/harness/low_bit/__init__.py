"""Parts of experiments/low_bit.py: methods, fine-tunings, learning rates, paired statistics, rows, page and figure."""
