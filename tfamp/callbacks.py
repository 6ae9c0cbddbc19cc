"""Callbacks for `tfamp.fit` and `keras.Model.fit`: progress and logs."""

from tfamp.training.callbacks import (
    MetricsLog,
    ProgressBar,
    RunRecord,
    ScaleTimeline,
    TensorBoardScalars,
)

__all__ = [
    "MetricsLog",
    "ProgressBar",
    "RunRecord",
    "ScaleTimeline",
    "TensorBoardScalars",
]
