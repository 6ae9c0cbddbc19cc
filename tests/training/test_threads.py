"""Trainings in threads of one process: each as alone, and nothing left."""

import threading
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp

X = np.linspace(-1, 1, 64, dtype="float32").reshape(16, 4)
LABELS = np.arange(16) % 80
NAMESPACES = (tf, tf.nn, tf.math, keras.ops, keras.losses, keras.activations)


def a_model(seed):
    """Of 80 classes, whose cross-entropy is a kernel of ours."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, activation="softmax"),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(80),
        ]
    )
    tfamp.keep_float32(model)
    model.compile(
        tfamp.wrap_optimizer(keras.optimizers.SGD(0.1)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def train(model):
    tfamp.fit(
        model, X, LABELS, batch_size=8, epochs=2, shuffle=False, verbose=0
    )


def functions():
    """Everything callable that a patch could have been put in place of."""
    backend = keras.src.backend.tensorflow
    modules = [
        *NAMESPACES,
        *(m for m in vars(backend).values() if isinstance(m, types.ModuleType)),
    ]
    return {
        (module.__name__, name): value
        for module in modules
        for name, value in vars(module).items()
        if callable(value)
    }


@pytest.mark.slow
def test_fits_in_threads_train_as_alone_and_leave_tensorflow_as_it_was():
    before = functions()
    tfamp.set_precision("mixed_bfloat16")
    alone = []
    for seed in range(3):
        model = a_model(seed)
        train(model)
        alone.append(model.get_weights())
    models = [a_model(seed) for seed in range(3)]
    errors = []

    def work(model):
        try:
            train(model)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[m]) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    for model, weights in zip(models, alone, strict=True):
        for ours, want in zip(model.get_weights(), weights, strict=True):
            np.testing.assert_array_equal(ours, want)
    after = functions()
    changed = [k for k in before if after.get(k) is not before[k]]
    assert not changed
