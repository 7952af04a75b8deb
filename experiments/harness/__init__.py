"""Machinery that the experiments share: running the command lines, and tables, pages and figures of the results."""
