"""Parts of experiments/low_bit.py: methods, fine-tunings, learning rates, statistics and its page."""
