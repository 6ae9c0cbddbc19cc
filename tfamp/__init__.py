"""Mixed-precision training for Keras 3 on TensorFlow.

Public names load on first use: `import tfamp` imports neither Keras nor
TensorFlow, sets no global state and creates no device.
"""

import importlib
from typing import TYPE_CHECKING

from tfamp.version import __version__

if TYPE_CHECKING:
    from tfamp import callbacks, recipe
    from tfamp.analysis.lint import lint
    from tfamp.analysis.probe import probe
    from tfamp.errors import (
        InputError,
        LossScaleError,
        Preempted,
        WorkerLostError,
    )
    from tfamp.faster_layers import optimize
    from tfamp.float32 import keep_float32
    from tfamp.formats import FORMATS
    from tfamp.hardware import detect_hardware, recommend
    from tfamp.loss_scale import (
        LossScaleOptimizer,
        value_and_gradients,
        wrap_optimizer,
    )
    from tfamp.precision import precision_scope, set_precision
    from tfamp.saving import load_model
    from tfamp.strategy import get_strategy
    from tfamp.training import evaluate, fit

# Public name -> the module that defines it.
_HOMES = {
    "FORMATS": "formats",
    "InputError": "errors",
    "LossScaleError": "errors",
    "LossScaleOptimizer": "loss_scale",
    "Preempted": "errors",
    "WorkerLostError": "errors",
    "detect_hardware": "hardware",
    "evaluate": "training",
    "fit": "training",
    "get_strategy": "strategy",
    "keep_float32": "float32",
    "lint": "analysis.lint",
    "load_model": "saving",
    "optimize": "faster_layers",
    "precision_scope": "precision",
    "probe": "analysis.probe",
    "recommend": "hardware",
    "set_precision": "precision",
    "value_and_gradients": "loss_scale",
    "wrap_optimizer": "loss_scale",
}
_MODULES = ("callbacks", "recipe")

__all__ = [
    "FORMATS",
    "InputError",
    "LossScaleError",
    "LossScaleOptimizer",
    "Preempted",
    "WorkerLostError",
    "__version__",
    "callbacks",
    "detect_hardware",
    "evaluate",
    "fit",
    "get_strategy",
    "keep_float32",
    "lint",
    "load_model",
    "optimize",
    "precision_scope",
    "probe",
    "recipe",
    "recommend",
    "set_precision",
    "value_and_gradients",
    "wrap_optimizer",
]


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"tfamp.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"tfamp.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tfamp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
