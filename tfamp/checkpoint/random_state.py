"""The random numbers of the process: Python's, NumPy's and Keras's.

Layers have seeds of their own, which are variables of the model.
"""

import random
from typing import Any

import numpy as np

from tfamp import keras_internals


def get_random_state() -> dict[str, Any]:
    """The state of what draws without a seed of its own, as JSON holds it."""
    generator = keras_internals.global_seed_generator(create=False)
    return {
        "python": random.getstate(),
        "numpy": _without_arrays(np.random.get_state(legacy=False)),
        "keras": generator and generator.state.numpy().tolist(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Sets what `get_random_state` returned, also after it was JSON."""
    if state["keras"] is not None:
        # Where it is made, it draws from Python's: so this comes first.
        generator = keras_internals.global_seed_generator(create=True)
        generator.state.assign(state["keras"])
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))
    np.random.set_state(state["numpy"])


def _without_arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_arrays(each) for key, each in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value
