"""One training run whose precision changes each time it is preempted.

    python -m benchmarks.resume_precision --output_dir=runs/switched

Runs the image recipe as a program, sends it SIGTERM after some epochs, and
starts it again on the same checkpoints with the next precision. Prints, as a
Markdown table, each epoch's losses beside those of a run in float32 that is
left alone.
"""

import dataclasses
import itertools
import json
import pathlib
import signal
import subprocess
import sys
import time

import tfamp
from tfamp.errors import Preempted
from tfamp.recipe import flag

_POLL_SECONDS = 0.01


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    precisions: tuple[str, ...] = flag(
        ("mixed_float16", "mixed_bfloat16", "float32", "mixed_float16"),
        "in this order, each from where the one before it was stopped",
    )
    epochs: int = flag(12, "of the whole run; sets the schedule")
    seed: int = flag(0, "of weights, order and augmentation")
    output_dir: str = flag("", "new folder for logs and checkpoints")


def main(config: Config) -> dict[str, float]:
    """Trains both runs and prints the table; returns the last losses."""
    folder = pathlib.Path(config.output_dir or ".")
    if not config.output_dir or folder.exists():
        raise tfamp.InputError(
            f"output_dir={config.output_dir!r}; expected the name of a folder "
            "that does not exist yet."
        )
    switched, alone = folder / "switched", folder / "alone"
    lasts = _last_epochs(config.epochs, len(config.precisions))
    begins = []
    for precision, last in zip(config.precisions, lasts, strict=True):
        begins.append(len(_epochs(switched)))
        _train(config, precision, switched, last)
    _train(config, "float32", alone, config.epochs)
    rows = list(zip(_epochs(switched), _epochs(alone), strict=True))
    _print_table(config.precisions, begins, rows)
    return {"loss": rows[-1][0]["loss"], "float32_loss": rows[-1][1]["loss"]}


def _last_epochs(epochs: int, parts: int) -> list[int]:
    return [round(epochs * (i + 1) / parts) for i in range(parts)]


def _train(config: Config, precision: str, folder, last: int) -> None:
    """Trains until so many epochs are logged, or to the end."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "recipes.image_classification",
            f"--precision={precision}",
            "--strategy=one_device",
            f"--epochs={config.epochs}",
            f"--seed={config.seed}",
            f"--output_dir={folder}",
            f"--checkpoint_dir={folder / 'checkpoints'}",
        ]
    )
    is_whole = last == config.epochs
    while not is_whole and process.poll() is None:
        if len(_epochs(folder)) >= last:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(_POLL_SECONDS)
    status = process.wait()
    if status != (0 if is_whole else Preempted.STATUS):
        raise RuntimeError(f"The {precision} run ended with status {status}.")


def _epochs(folder: pathlib.Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def _print_table(precisions, begins, rows) -> None:
    print(
        "| epoch | precision | loss scale | loss | validation loss "
        "| accuracy | float32 loss | its validation loss |"
    )
    print("|--:|:--|--:|--:|--:|--:|--:|--:|")
    for number, (logs, alone) in enumerate(rows):
        names = [
            precision
            for precision, (begin, end) in zip(
                precisions,
                itertools.pairwise([*begins, len(rows)]),
                strict=True,
            )
            if begin <= number < end
        ]
        print(
            f"| {number + 1} | {', '.join(names)} | {logs['loss_scale']:g} "
            f"| {logs['loss']:.3f} | {logs['val_loss']:.3f} "
            f"| {logs['val_accuracy']:.3f} "
            f"| {alone['loss']:.3f} | {alone['val_loss']:.3f} |"
        )


if __name__ == "__main__":
    tfamp.recipe.main(main, Config)
