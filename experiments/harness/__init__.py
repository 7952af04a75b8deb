"""Machinery that the experiments share: running the command lines, tables, and results kept for the next run."""
