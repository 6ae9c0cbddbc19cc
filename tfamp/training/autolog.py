"""MLflow's autologging, which replaces `Model.fit`, and so misses `tfamp.fit`.

Its own callback logs here what it would have logged there, but for the model.
"""

import importlib
import sys
from typing import Any

import keras

from tfamp.training.warning import warn

# Each puts its own function in the place of `Model.fit`.
_FLAVORS = ("keras", "tensorflow")


class Autolog(keras.callbacks.Callback):
    """Logs to the active run of MLflow, or to one of its own."""

    def __init__(self, every_steps: int | None):
        super().__init__()
        self._mlflow: Any = importlib.import_module("mlflow")
        flavor: Any = importlib.import_module("mlflow.keras")
        self._logs = flavor.MlflowCallback(
            log_every_epoch=every_steps is None, log_every_n_steps=every_steps
        )
        self._has_own_run = False
        if every_steps is not None:
            # Where it is not, nobody has to see each batch.
            self.on_train_batch_end = self._logs.on_batch_end

    def on_train_begin(self, logs=None):
        if self._mlflow.active_run() is None:
            self._mlflow.start_run()
            self._has_own_run = True
        self._logs.set_model(self.model)
        self._logs.set_params(self.params)
        self._mlflow.log_params({"epochs": self.params.get("epochs")})
        self._logs.on_train_begin(logs)

    def on_epoch_end(self, epoch, logs=None):
        self._logs.on_epoch_end(epoch, logs)

    def on_test_end(self, logs=None):
        self._logs.on_test_end(logs)

    def on_train_end(self, logs=None):
        self.close("FINISHED")

    def close(self, status: str = "FAILED") -> None:
        """Ends a run that was begun here; safe to call at any time."""
        if self._has_own_run:
            self._has_own_run = False
            self._mlflow.end_run(status)


def callbacks_of_autolog(callbacks: list[Any]) -> list[Autolog]:
    """What logs for MLflow, where its autologging was turned on."""
    config = _config()
    is_there = any(
        type(each).__name__ == "MlflowCallback" for each in callbacks
    )
    if config is None or is_there:
        return []
    if config.get("log_models", True):
        warn(
            "MLflow's autologging logs no model from tfamp.fit; call "
            "mlflow.keras.log_model(model), or autolog(log_models=False)."
        )
    every_epoch = config.get("log_every_epoch", True)
    return [Autolog(None if every_epoch else config.get("log_every_n_steps"))]


def _config() -> dict[str, Any] | None:
    """What autologging was told; None where it is off."""
    utilities = sys.modules.get("mlflow.utils.autologging_utils")
    if utilities is None:
        return None
    for flavor in _FLAVORS:
        if not utilities.autologging_is_disabled(flavor):
            return dict(utilities.AUTOLOGGING_INTEGRATIONS[flavor])
    return None
