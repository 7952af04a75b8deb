"""Parts of experiments/clip_limit.py and codebook_limit.py: the candidates for OABN's limit k, and the pages."""
