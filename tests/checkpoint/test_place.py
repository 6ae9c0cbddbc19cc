"""Paths are paths, links are not followed, refusals are one line."""

import errno
import os
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tfamp.checkpoint import place
from tfamp.errors import SaveError
from tfamp.recipe import describe_exit

ODD = "lr[1] a*b?\n%s\\{}é"


def fit(directory, epochs=1, rate=0.5, dataset=None, seed=0, callbacks=()):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(rate), "mse")
    if dataset is None:
        x = np.arange(4, dtype="float32")[:, None]
        dataset = tf.data.Dataset.from_tensor_slices((x, x)).batch(2)
    tfamp.fit(
        model,
        dataset,
        epochs=epochs,
        callbacks=list(callbacks),
        checkpoint_dir=directory,
        verbose=0,
    )
    return model


@pytest.mark.parametrize("kind", [str, os.fsencode, pathlib.Path])
def test_any_kind_of_path_is_its_text(kind):
    assert place.text_of(kind("a b")) == "a b"


@pytest.mark.parametrize("path", ["", b"", "a\0b", 5, None, ["a"]])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(tfamp.InputError) as raised:
        place.text_of(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("directory", "message"),
    [
        ("s3://bucket/x", "scheme 's3' not implemented"),
        ("gs://bucket/[x]", "TensorFlow takes for a pattern"),
        ("/proc/x/y", "No such file or directory"),
        ("x" * 300, "Cannot save checkpoints"),
    ],
)
def test_what_cannot_be_made_is_told_in_one_line(
    directory, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tfamp.InputError, match=message) as raised:
        fit(directory)
    assert "\n" not in str(raised.value)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 75, "No space"),
        (OSError(errno.EROFS, "Read-only file system"), 2, "Read-only"),
        (OSError(errno.ENOENT, "No such file"), 75, "No such file"),
        (
            tf.errors.ResourceExhaustedError(
                None, None, "/d/ckpt-1; No space left on device [Op:SaveV2]"
            ),
            75,
            "No space left on device",
        ),
        (
            tf.errors.PermissionDeniedError(
                None, None, "{{function_node x}} /d; Permission denied\nmore"
            ),
            2,
            "Permission denied",
        ),
        (tf.errors.InvalidArgumentError(None, None, "File too large"), 75, "."),
        (tf.errors.UnavailableError(None, None, ""), 75, "UnavailableError"),
    ],
)
def test_errors_end_in_the_status_that_fits(error, status, reason):
    with (
        pytest.raises((tfamp.InputError, SaveError), match=reason) as raised,
        place.told_in_one_line("/d"),
    ):
        raise error
    line, found = describe_exit(raised.value)
    assert found == status
    assert line.startswith("Cannot save checkpoints in /d: ")
    assert "Op:" not in line
    assert "{{" not in line


def test_a_full_disk_of_a_callback_is_one_line():
    error = OSError(errno.ENOSPC, "No space left on device", "best.keras")
    with (
        pytest.raises(SaveError, match=r"A file best\.keras cannot"),
        place.full_disks_told(),
    ):
        raise error
    with pytest.raises(PermissionError), place.full_disks_told():
        raise PermissionError(errno.EACCES, "no")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Unable to flush (errno = 28, 'No space left on device')"),
        tf.errors.ResourceExhaustedError(
            None, None, "/d/events.1; No space left on device [Op:X]"
        ),
    ],
)
def test_a_full_disk_of_a_library_is_one_line(error):
    line = r"^A file cannot be written: No space left\.$"
    with pytest.raises(SaveError, match=line), place.full_disks_told():
        raise error
    with pytest.raises(RuntimeError, match="mine"), place.full_disks_told():
        raise RuntimeError("mine")


def test_links_go_and_their_targets_stay(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "inner").symlink_to(target)
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "file").symlink_to(target / "precious")
    place.write_text(str(tmp_path / "file"), "other")
    for name in ("folder", "link", "file"):
        place.remove(str(tmp_path / name))
    assert os.listdir(tmp_path) == ["target"]
    assert (target / "precious").read_text() == "mine"


def test_an_odd_name_is_resumed_and_what_changed_is_said(
    tmp_path, warnings_of_absl
):
    """And the dataset that was used before goes on where it was."""
    x = np.arange(8, dtype="float32")[:, None]

    def make():
        dataset = tf.data.Dataset.from_tensor_slices((x, 3 * x))
        return dataset.shuffle(8, seed=1).batch(2)

    def stop(epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt

    whole = fit(None, 4, 0.01, make())
    used, directory = make(), tmp_path / ODD
    stops = keras.callbacks.LambdaCallback(on_epoch_begin=stop)
    with pytest.raises(KeyboardInterrupt):
        fit(directory, 4, 0.01, used, callbacks=[stops])
    resumed = fit(directory, 4, 0.01, used)
    assert not warnings_of_absl
    for one, other in zip(whole.weights, resumed.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    names = {path.name.partition(".")[0] for path in directory.iterdir()}
    assert names == {"best", "checkpoint", "ckpt-2", "ckpt-3", "ckpt-4"}
    # Another rate, another seed, another order.
    model = fit(directory, 5, 0.25, make().shuffle(4, seed=2), seed=9)
    assert float(model.optimizer.learning_rate.numpy()) == 0.25
    other, rate, order = warnings_of_absl
    assert "began with other weights" in other
    assert rate.startswith("This command changes learning_rate from 0.00999")
    assert "to 0.25: from here on as it says now" in rate
    assert "come in another order" in order
