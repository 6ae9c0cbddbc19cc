"""Mixed-precision training for Keras 3 on TensorFlow.

Public names load on first use: `import tfamp` imports neither Keras nor
TensorFlow, sets no global state and creates no device.
"""

import importlib
from typing import TYPE_CHECKING

from tfamp.version import __version__

if TYPE_CHECKING:
    from tfamp import callbacks, recipe
    from tfamp.analysis.lint.check import lint
    from tfamp.analysis.probe.measure import probe
    from tfamp.analysis.shadow.compare import compare
    from tfamp.analysis.tune.measure import tune
    from tfamp.distribute.sharded import sharded
    from tfamp.distribute.strategy import get_strategy
    from tfamp.errors import (
        InputError,
        LossScaleError,
        Preempted,
        SaveError,
        WorkerLostError,
    )
    from tfamp.formats import FORMATS
    from tfamp.hardware.devices import detect_hardware, recommend
    from tfamp.layers.float8 import float8
    from tfamp.layers.optimize import optimize
    from tfamp.precision.keep_float32 import keep_float32
    from tfamp.precision.policy import precision_scope, set_precision
    from tfamp.saving.export import export
    from tfamp.saving.load import load_model
    from tfamp.scaling.optimizer import (
        LossScaleOptimizer,
        value_and_gradients,
        wrap_optimizer,
    )
    from tfamp.training.fit import evaluate, fit
    from tfamp.training.predict import predict

# Public name -> the module that defines it.
_HOMES = {
    "FORMATS": "formats",
    "InputError": "errors",
    "LossScaleError": "errors",
    "LossScaleOptimizer": "scaling.optimizer",
    "Preempted": "errors",
    "SaveError": "errors",
    "WorkerLostError": "errors",
    "compare": "analysis.shadow.compare",
    "detect_hardware": "hardware.devices",
    "evaluate": "training.fit",
    "export": "saving.export",
    "fit": "training.fit",
    "float8": "layers.float8",
    "get_strategy": "distribute.strategy",
    "keep_float32": "precision.keep_float32",
    "lint": "analysis.lint.check",
    "load_model": "saving.load",
    "optimize": "layers.optimize",
    "precision_scope": "precision.policy",
    "predict": "training.predict",
    "probe": "analysis.probe.measure",
    "recommend": "hardware.devices",
    "set_precision": "precision.policy",
    "sharded": "distribute.sharded",
    "tune": "analysis.tune.measure",
    "value_and_gradients": "scaling.optimizer",
    "wrap_optimizer": "scaling.optimizer",
}
_MODULES = ("callbacks", "recipe")

__all__ = [
    "FORMATS",
    "InputError",
    "LossScaleError",
    "LossScaleOptimizer",
    "Preempted",
    "SaveError",
    "WorkerLostError",
    "__version__",
    "callbacks",
    "compare",
    "detect_hardware",
    "evaluate",
    "export",
    "fit",
    "float8",
    "get_strategy",
    "keep_float32",
    "lint",
    "load_model",
    "optimize",
    "precision_scope",
    "predict",
    "probe",
    "recipe",
    "recommend",
    "set_precision",
    "sharded",
    "tune",
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
