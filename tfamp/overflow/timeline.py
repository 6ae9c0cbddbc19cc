"""`scale.jsonl`: every move of the loss scale, and every step it skipped.

One JSON object a line, in the order of the steps:

- `step`: steps of the run so far, this one included, counted from 1 over all
  epochs, skipped ones too; 0 before the first. A run that resumes counts on.
- `epoch`: from 0, as in `History.epoch` and `metrics.jsonl`.
- `optimizer`: the attribute of the model that holds it, where there are
  several; null otherwise.
- `scale`: from the next step on.
- `reason`: "start" or "resumed", the scale that a call of `tfamp.fit` begins
  with; "overflow", the step was not finite and was skipped, at which the scale
  backs off unless it is fixed, at its floor, or told to bear some; "growth",
  enough steps in a row were finite; "set", something else set the scale.
- `at_fault`: of an overflow that was replayed: "data", "weights", "forward",
  "loss", "backward", "reduction", "scale" or "unknown"; null otherwise.
- `replica`, `worker`, `layer`: where the overflow was first; null where that
  was not looked for (`on_overflow` says when) or has no answer.
- `message`: the same in a sentence, or null.

A later run into the same folder appends. Its "start" begins another timeline;
"resumed" goes on with the one before, and takes back the lines above it whose
step is beyond its own: those steps were lost, and are done again.
"""

import os

import keras

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
)
from tfamp.overflow.watch import ScaleEvent


class ScaleTimeline(keras.callbacks.Callback):
    """Writes `scale.jsonl` under `tfamp.fit`, a line when something happens.

    `keras.Model.fit` tells no callback of scales: there it writes nothing.

    Args:
        output_dir: A local folder; made when training begins.

    Raises:
        InputError: `output_dir` cannot be written, or holds a `scale.jsonl`
            that is not one.
    """

    def __init__(self, output_dir: str | os.PathLike):
        super().__init__()
        self._path = output_folder(output_dir) / "scale.jsonl"
        read_json_lines(self._path)

    def on_train_begin(self, logs=None):
        make_folder(self._path.parent)
        repair_json_lines(self._path)

    def on_scale_event(self, event: ScaleEvent) -> None:
        """Appends a line; `tfamp.fit` calls it."""
        blame = event.blame
        line = {
            "step": event.step,
            "epoch": event.epoch,
            "optimizer": event.optimizer,
            **json_numbers({"scale": event.scale}),
            "reason": event.reason,
            "at_fault": blame and blame.at_fault,
            "replica": blame and blame.replica,
            "worker": blame and blame.worker,
            "layer": blame and blame.layer,
            "message": blame and blame.message,
        }
        with said_and_done_without(self._path):
            append_json_line(self._path, line)
