"""A run whose files are kept, to see that later versions go on with them.

    python -m tests.saving.former_run FOLDER

trains for two of four epochs and leaves in FOLDER `checkpoints`, `model.keras`
and `weights.npz`. `written_by_0_1_0` is what 0.1.0 left, on its own names.
"""

import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tfamp

EPOCHS_BEFORE = 2


def build_model() -> keras.Model:
    """Of every class that tfamp registers for saving, but attention."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input([2, 2, 2]),
            layers.Conv2D(2, 1),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(4, activation="relu"),
            layers.LayerNormalization(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    tfamp.optimize(model)
    tfamp.keep_float32(model)
    model.compile(
        optimizer=tfamp.wrap_optimizer(keras.optimizers.AdamW(1e-3)),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        auto_scale_loss=False,
    )
    return model


def make_dataset() -> tf.data.Dataset:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(32, 2, 2, 2)).astype("float32")
    labels = (inputs[:, 0, 0, 0] > 0).astype("int64")
    return tf.data.Dataset.from_tensor_slices((inputs, labels)).batch(8)


def main(folder: pathlib.Path) -> None:
    with tfamp.precision_scope("mixed_float16"):
        model = build_model()
        tfamp.fit(
            model,
            make_dataset(),
            epochs=EPOCHS_BEFORE,
            verbose=0,
            checkpoint_dir=folder / "checkpoints",
        )
    model.save(folder / "model.keras")
    np.savez(folder / "weights.npz", *model.get_weights())


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
