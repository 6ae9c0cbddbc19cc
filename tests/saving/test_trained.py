"""The weights of a training, in a model that begins."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tfamp.saving import trained


def fresh():
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    model.compile(
        tfamp.wrap_optimizer(keras.optimizers.SGD(0.1)),
        "mse",
        metrics=["mae"],
        auto_scale_loss=False,
    )
    return model


def test_each_kind_of_checkpoint_gives_its_weights(tmp_path):
    model = fresh()
    x = np.float32([[1, 2], [3, 4]])
    folder = tmp_path / "checkpoints"
    tfamp.fit(model, x, x[:, :1], checkpoint_dir=folder, verbose=0)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")

    for path in (
        folder,
        tmp_path / "model.keras",
        tmp_path / "model.weights.h5",
    ):
        other = fresh()
        spec = tf.data.Dataset.from_tensors((x, x[:, :1])).element_spec
        trained.restore(other, path, spec)
        for found, expected in zip(other.weights, model.weights, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_what_is_no_checkpoint_of_it_is_refused(tmp_path):
    keras.Sequential([keras.Input([3]), keras.layers.Dense(1)]).save(
        tmp_path / "other.keras"
    )
    for path, said in (
        (tmp_path / "other.keras", "of another model"),
        (tmp_path / "missing.keras", "is not there"),
        (tmp_path, "holds no checkpoint; expected the checkpoint_dir"),
    ):
        with pytest.raises(tfamp.InputError, match=said):
            trained.restore(fresh(), path)
