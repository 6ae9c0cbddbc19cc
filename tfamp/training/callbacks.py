"""What a user watches: the logs of a run, and all callbacks of tfamp.

Every callback here works in `tfamp.fit` and in `keras.Model.fit`, where only
`ScaleTimeline` has nothing to tell. None of them reads a tensor in a step, so
none makes the host wait for the device.
"""

import csv
import io
import os
import time
from typing import Any

import keras
import numpy as np

from tfamp.files.json_lines import (
    append_json_line,
    read_json_lines,
    repair_json_lines,
)
from tfamp.files.output import (
    json_numbers,
    make_folder,
    output_folder,
    said_and_done_without,
    utc_now,
    write_atomically,
)
from tfamp.overflow.timeline import ScaleTimeline
from tfamp.training.progress_bar import ProgressBar, format_figures
from tfamp.training.run_record import RunRecord

__all__ = [
    "MetricsLog",
    "ProgressBar",
    "RunRecord",
    "ScaleTimeline",
    "TensorBoardScalars",
    "format_figures",
]


class MetricsLog(keras.callbacks.Callback):
    """Writes each epoch's logs to `metrics.jsonl` and `metrics.csv`.

    One JSON object, or row, per epoch: `epoch` (from 0, as in
    `History.epoch`), `time` (UTC, ISO 8601), `elapsed_seconds` since training
    began, every log, and the `learning_rate` that the optimizer has come to,
    where it is one number. A number that is not finite is `null` in JSON and
    empty in CSV. Both are on disk after every epoch. A run into the same
    folder appends, so an epoch that a resumed run repeats stands there twice
    and the later line counts.

    `keras.callbacks.CSVLogger` does not serve here: its columns are those of
    the first epoch it sees, and it appends the rows of another run under that
    run's header even where the keys differ (GPU against CPU, with against
    without validation).

    Args:
        output_dir: A local folder; made when training begins.

    Raises:
        InputError: `output_dir` cannot be written, or holds a `metrics.jsonl`
            that is not one.
    """

    def __init__(self, output_dir: str | os.PathLike):
        super().__init__()
        folder = output_folder(output_dir)
        self._lines_path = folder / "metrics.jsonl"
        self._table_path = folder / "metrics.csv"
        self._rows = read_json_lines(self._lines_path)

    def on_train_begin(self, logs=None):
        self._start = time.monotonic()
        make_folder(self._lines_path.parent)
        self._rows = repair_json_lines(self._lines_path)

    def on_epoch_end(self, epoch, logs=None):
        row = {
            "epoch": epoch,
            "time": utc_now(),
            "elapsed_seconds": round(time.monotonic() - self._start, 3),
            **json_numbers(_learning_rate(self.model) | (logs or {})),
        }
        self._rows.append(row)
        with said_and_done_without(self._lines_path):
            append_json_line(self._lines_path, row)
        # Whole, because a new key widens the rows that stand there already.
        columns = dict.fromkeys(key for row in self._rows for key in row)
        table = io.StringIO()
        writer = csv.DictWriter(table, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        with said_and_done_without(self._table_path):
            write_atomically(self._table_path, table.getvalue())


class TensorBoardScalars(keras.callbacks.Callback):
    """Writes each epoch's logs and learning rate as TensorBoard scalars.

    `tensorboard/train` and `tensorboard/validation` under `output_dir` use
    the same tag for a metric and its `val_` twin, so the curves overlay.
    `keras.callbacks.TensorBoard` needs the `tensorboard` package to write;
    this needs it only to look.

    Args:
        output_dir: A local folder; made when training begins.

    Raises:
        InputError: `output_dir` cannot be written.
    """

    def __init__(self, output_dir: str | os.PathLike):
        super().__init__()
        self._folder = output_folder(output_dir) / "tensorboard"
        self._writers: dict[str, Any] = {}

    def on_train_begin(self, logs=None):
        make_folder(self._folder)

    def on_epoch_end(self, epoch, logs=None):
        sides: dict[str, dict[str, Any]] = {"train": {}, "validation": {}}
        logs = _learning_rate(self.model) | (logs or {})
        for name, value in logs.items():
            side = "validation" if name.startswith("val_") else "train"
            if not np.ndim(value):
                sides[side][name.removeprefix("val_")] = value
        for side, values in sides.items():
            if values:
                with said_and_done_without(self._folder / side):
                    self._write(side, values, epoch)

    def on_train_end(self, logs=None):
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def _write(self, side, values, epoch):
        import tensorflow as tf

        if side not in self._writers:
            self._writers[side] = tf.summary.create_file_writer(
                str(self._folder / side)
            )
        # What tensorboard's own `scalar` would pass. Without the package
        # `tf.summary.scalar` only raises, and `tf.summary.write` still works.
        metadata = tf.compat.v1.SummaryMetadata(
            plugin_data=tf.compat.v1.SummaryMetadata.PluginData(
                plugin_name="scalars"
            ),
            data_class="DATA_CLASS_SCALAR",
        )
        # Leaving the context flushes the file.
        try:
            with self._writers[side].as_default(step=epoch):
                for tag, value in values.items():
                    scalar = tf.constant(value, tf.float32)
                    tf.summary.write(tag, scalar, metadata=metadata)
        except tf.errors.OpError as error:
            raise OSError(error.message) from None


def _learning_rate(model) -> dict[str, float]:
    """The optimizer's rate; nothing where it has none, or one a layer."""
    try:
        # 0.01 and not 0.009999999776: a float32 has seven digits.
        rate = float(f"{float(model.optimizer.learning_rate):.7g}")
        return {"learning_rate": rate}
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return {}


# Of several workers only the chief calls these.
FILE_WRITERS = (
    MetricsLog,
    ProgressBar,
    RunRecord,
    ScaleTimeline,
    TensorBoardScalars,
    keras.callbacks.BackupAndRestore,
    keras.callbacks.CSVLogger,
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.ProgbarLogger,
    keras.callbacks.TensorBoard,
)
