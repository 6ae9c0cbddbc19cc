"""Folders and disks that fail under a run: one line, and nothing lost."""

import contextlib
import os
import resource
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tfamp.errors import SaveError
from tfamp.recipe import describe_exit

EPOCHS = 4


class At(keras.callbacks.Callback):
    """Does something as the third epoch begins."""

    def __init__(self, do):
        super().__init__()
        self._do = do

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            self._do()


def fit(directory, *callbacks):
    keras.utils.set_random_seed(0)
    x = np.linspace(-1, 1, 16, dtype="float32").reshape(8, 2)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    tfamp.fit(
        model,
        tf.data.Dataset.from_tensor_slices((x, x[:, :1]))
        .shuffle(8, 1)
        .batch(4),
        epochs=EPOCHS,
        callbacks=list(callbacks),
        checkpoint_dir=directory,
        verbose=0,
    )
    return [weight.numpy() for weight in model.weights]


@pytest.fixture(scope="module")
def never_stopped():
    return fit(None)


@contextlib.contextmanager
def files_that_end():
    """No file of this process grows beyond some bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, (700, before[1])
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names_in(directory):
    return {
        name.partition(".")[0]
        for name in os.listdir(directory)
        if not name.startswith(".")
    }


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_from_before(
    never_stopped, tmp_path
):
    with files_that_end() as fill, pytest.raises(SaveError) as raised:
        fit(tmp_path, At(fill))
    line, status = describe_exit(raised.value)
    assert status == 75
    assert line.startswith(f"Cannot save checkpoints in {tmp_path}")
    assert line.endswith("File too large.")
    # Nothing half-written is left.
    assert names_in(tmp_path) == {"best", "checkpoint", "ckpt-1", "ckpt-2"}
    assert len(names_in(tmp_path / "best")) == 2
    for one, other in zip(fit(tmp_path), never_stopped, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_folder_that_vanishes_ends_in_one_line(never_stopped, tmp_path):
    directory = tmp_path / "saves"
    with pytest.raises(SaveError) as raised:
        fit(directory, At(lambda: shutil.rmtree(directory)))
    assert describe_exit(raised.value)[1] == 75
    assert "\n" not in str(raised.value)


def test_a_folder_that_becomes_a_file_is_bad_input(tmp_path):
    directory = tmp_path / "saves"

    def replace():
        shutil.rmtree(directory)
        directory.write_text("mine")

    with pytest.raises(tfamp.InputError) as raised:
        fit(directory, At(replace))
    assert describe_exit(raised.value)[1] == 2
    assert str(raised.value) == (
        f"{directory} is no directory any more; give another checkpoint_dir."
    )
    assert directory.read_text() == "mine"


def test_logs_that_find_no_room_are_said_and_done_without(
    never_stopped, tmp_path, warnings_of_absl
):
    logs = [
        tfamp.callbacks.MetricsLog(tmp_path),
        tfamp.callbacks.RunRecord(tmp_path),
    ]
    with files_that_end() as fill:
        weights = fit(None, *logs, At(fill))
    for one, other in zip(weights, never_stopped, strict=True):
        np.testing.assert_array_equal(one, other)
    told = [line for line in warnings_of_absl if "cannot be written" in line]
    assert len(told) == len(set(told)) >= 1
    assert "training goes on without" in told[0]
    # What is there is whole.
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert line.endswith("}")
    assert not list(tmp_path.glob("*.tmp"))
