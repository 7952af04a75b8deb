"""Training beside the model: optimizer and losses, distillation, and callbacks that log, average, save and stop.

Importing this package imports none of its modules.
"""
