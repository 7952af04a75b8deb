"""When methods that learn look at their result so far, to keep the best one."""

_LOOKS = 4


def is_look_due(iteration: int, iterations: int) -> bool:
    """Whether to look after an iteration, counted from 0: a few times, evenly spaced, the last time at the end."""
    return (iteration + 1) * _LOOKS // iterations > iteration * _LOOKS // iterations
