"""Pages of the experiments that are one table: min_max.py, recipes.py, targets.py, and int8_collapse.py."""
