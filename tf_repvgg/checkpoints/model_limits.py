"""What a model may ask for when it is built: a few lines of a configuration can state millions of calls or numbers."""

from collections.abc import Callable, Mapping
from typing import Any

# Numbers along all axes that a Normalization with constants keeps. Keras spreads the constants over its axes.
MOST_CONSTANTS = 2**20
# Networks of a thousand layers make some thousand calls. Keras takes milliseconds for each.
_MOST_CALLS = 10_000


def check_number_of_calls(record: Mapping[str, Any], check_config: Callable[[Any], None] | None = None) -> None:
    """Checks that building a model makes a number of calls that can be waited for.

    Keras follows a nested model each time it is called: thirty models, each of which calls the one before twice, are a
    thousand million calls.

    Args:
      record: The model as Keras 2 or Keras 3 describes it.
      check_config: Function that is given the configuration of each model and wrapper before its calls are counted.

    Raises:
      ValueError: If there are too many calls; names the layer. Or what `check_config` raises.
    """
    _Counter(check_config or (lambda config: None)).count(record)


class _Counter:
    def __init__(self, check_config):
        self._check_config = check_config
        self._shared: dict[str, int] = {}  # calls by the number under which Keras knows an object that it meets again

    def count(self, record):
        """The number of calls that building a layer, or calling it once, leads to."""
        number = max(self._count_new(record["config"]), self._shared.get(str(record.get("shared_object_id")), 0))
        if number > _MOST_CALLS:
            raise ValueError(
                f"layer {record['config'].get('name')!r} leads to more than {_MOST_CALLS:,} calls of layers"
            )
        if "shared_object_id" in record:
            self._shared[str(record["shared_object_id"])] = number
        return number

    def _count_new(self, config):
        self._check_config(config)
        if "layer" in config:  # a wrapper
            return 1 + self.count(config["layer"])
        layers = config if isinstance(config, list) else config.get("layers", [])
        return 1 + sum(self.count(layer) * (1 + len(layer.get("inbound_nodes", []))) for layer in layers)
