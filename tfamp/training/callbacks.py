"""What a user watches: the progress bar and the logs of a run.

Every callback here works in `tfamp.fit` and in `keras.Model.fit`, where only
`ScaleTimeline` has nothing to tell. None of them reads a tensor, so none makes
the host wait for the device.
"""

import csv
import io
import math
import os
import sys
import time
import weakref
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from absl import logging
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

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
from tfamp.training.run_record import RunRecord

__all__ = [
    "MetricsLog",
    "ProgressBar",
    "RunRecord",
    "ScaleTimeline",
    "TensorBoardScalars",
    "format_figures",
]


class ProgressBar(keras.callbacks.Callback):
    """Shows loss, metrics, loss scale, skipped steps, speed and time left.

    A terminal gets a live bar, and above it one line for each finished epoch.
    Anything else (a pipe, a log file, a notebook) gets only these lines, in
    plain text without control characters.

    Args:
        one_line_per_epoch: Leaves the live bar out on a terminal too.
    """

    def __init__(self, one_line_per_epoch: bool = False):
        super().__init__()
        self._one_line_per_epoch = one_line_per_epoch
        self._live: Live | None = None
        self._steps: int | None = None
        self._steps_done = 0

    def on_train_begin(self, logs=None):
        self._steps = self.params.get("steps")

    def on_epoch_begin(self, epoch, logs=None):
        self.close()
        self._epoch_start = time.monotonic()
        self._steps_done = 0
        self._title = f"epoch {epoch + 1}/{self.params.get('epochs', '?')}"
        # Asked of the stream itself: rich also takes a pipe for a terminal
        # where FORCE_COLOR is set, as many CI systems do.
        console = Console(highlight=False)
        live = (
            sys.stdout.isatty()
            and not console.is_dumb_terminal
            and keras.config.is_interactive_logging_enabled()
        )
        if live and not self._one_line_per_epoch:
            self._start_bar(console)

    def on_train_batch_end(self, batch, logs=None):
        self._steps_done = batch + 1
        if self._live is None:
            return
        self._progress.update(self._task, completed=self._steps_done)
        if logs:
            self._figures.plain = format_figures(logs)

    def on_test_begin(self, logs=None):
        if self._live is not None:
            self._progress.update(
                self._task, description=f"{self._title} validation"
            )

    def on_epoch_end(self, epoch, logs=None):
        self.close()
        # Known only now where the data set does not tell its length.
        self._steps = self.params.get("steps") or self._steps_done
        seconds = time.monotonic() - self._epoch_start
        line = f"{self._title}  {format_figures(logs or {})}  {seconds:.1f} s"
        if keras.config.is_interactive_logging_enabled():
            print(line, flush=True)
        else:
            logging.info(line)

    def on_train_end(self, logs=None):
        self.close()

    def close(self) -> None:
        """Takes the live bar off the screen and gives the cursor back.

        Whoever drives the callbacks calls it when training raises, because
        Keras tells callbacks nothing then. Safe to call at any time.
        """
        if self._live is not None:
            self._restore_terminal()
            self._live = None

    def _start_bar(self, console):
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task(self._title, total=self._steps)
        self._figures = Text("waiting for the first step")
        live = Live(
            Group(self._progress, self._figures),
            console=console,
            refresh_per_second=4,
            transient=True,
            # rich would send it to stdout, past a user's `2> errors.txt`.
            redirect_stderr=sys.stderr.isatty(),
        )
        # Also when the interpreter exits: a terminal without a cursor would
        # outlive the process.
        self._restore_terminal = weakref.finalize(self, live.stop)
        self._live = live
        live.start()


class MetricsLog(keras.callbacks.Callback):
    """Writes each epoch's logs to `metrics.jsonl` and `metrics.csv`.

    One JSON object, or row, per epoch: `epoch` (from 0, as in
    `History.epoch`), `time` (UTC, ISO 8601), `elapsed_seconds` since training
    began, and every log. A number that is not finite is `null` in JSON and
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
            **json_numbers(logs or {}),
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
    """Writes each epoch's logs as TensorBoard scalars.

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
        for name, value in (logs or {}).items():
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

# The logs of `tfamp.fit` that are no metric, in the order they are shown.
_RUN_FIGURES = (
    "loss_scale",
    "skipped_steps",
    "examples_per_second",
    "step_milliseconds",
    "peak_memory_bytes",
)


def format_figures(logs: Mapping[str, float]) -> str:
    """One line: loss, metrics, their `val_` twins, then scale, skips, speed.

    The loss scale shows as a power of two, `2^16`, where it is one. A metric
    that is an array has no place in a line.
    """
    # Keras hands logs to callbacks in alphabetical order.
    shown = sorted((n for n in logs if not np.ndim(logs[n])), key=_place)
    return "  ".join(_format(name, logs[name]) for name in shown)


def _place(name):
    if name in _RUN_FIGURES:
        return 2, _RUN_FIGURES.index(name)
    return name.startswith("val_"), not name.endswith("loss")


def _format(name, value):
    match name:
        case "loss_scale":
            return f"scale {_power_of_two(value)}"
        case "skipped_steps":
            return f"skipped {value:.0f}"
        case "examples_per_second":
            return f"{value:,.0f} examples/s"
        case "step_milliseconds":
            return f"{value:.3g} ms/step"
        case "peak_memory_bytes":
            return f"{value / 2**30:.2f} GiB"
    plain = value == 0 or 1e-3 <= abs(value) < 1e5
    return f"{name} {value:.4f}" if plain else f"{name} {value:.3e}"


def _power_of_two(value):
    exponent = math.log2(value) if value > 0 else math.nan
    return f"2^{exponent:.0f}" if exponent.is_integer() else f"{value:.6g}"
