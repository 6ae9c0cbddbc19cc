"""Callbacks get every hook they have, as from `Model.fit`."""

import keras
import numpy as np
import pytest

import tfamp

X = np.arange(12, dtype="float32")[:, None]
Y = 2 * X


def build_model():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(1e-4), "mse")
    return model


class Counts(keras.callbacks.ModelCheckpoint):
    """A subclass with batch hooks of its own, saving at epochs only."""

    def __init__(self, path):
        super().__init__(path / "model.keras")
        self.calls = dict.fromkeys(("train", "test", "tests"), 0)

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        self.calls["train"] += 1

    def on_test_batch_end(self, batch, logs=None):
        assert "loss" in logs
        self.calls["test"] += 1

    def on_test_end(self, logs=None):
        self.calls["tests"] += 1


@pytest.mark.parametrize(
    "given",
    [
        lambda callback: callback,
        lambda callback: [None, [callback]],
        lambda callback: keras.callbacks.CallbackList([callback]),
    ],
    ids=["alone", "nested", "list"],
)
def test_hooks_of_subclasses_are_called_for_each_batch(tmp_path, given):
    counts = Counts(tmp_path)
    tfamp.fit(
        build_model(),
        X,
        Y,
        batch_size=2,
        epochs=2,
        validation_data=(X[:6], Y[:6]),
        callbacks=given(counts),
        verbose=0,
    )
    assert counts.calls == {"train": 12, "test": 6, "tests": 2}


def test_evaluate_calls_its_callbacks():
    seen = []
    callback = keras.callbacks.Callback()
    callback.on_test_batch_begin = lambda batch, logs=None: seen.append(batch)
    tfamp.evaluate(build_model(), X, Y, batch_size=5, callbacks=[callback])
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("bad", [0, 2])
def test_one_loss_that_is_no_number_ends_training_where_asked(bad):
    x = X.copy()
    x[2 * bad] = np.nan
    model = build_model()
    history = tfamp.fit(
        model,
        x,
        Y,
        batch_size=2,
        epochs=2,
        shuffle=False,
        callbacks=keras.callbacks.TerminateOnNaN(),
        verbose=0,
    )
    # The steps before it were made, it was skipped, and none came after.
    assert int(model.optimizer.iterations.numpy()) == bad
    assert len(history.epoch) == 1


def test_nothing_is_printed_where_interactive_logging_is_off(capsys):
    keras.config.disable_interactive_logging()
    try:
        tfamp.fit(build_model(), X, Y)
    finally:
        keras.config.enable_interactive_logging()
    assert capsys.readouterr().out == ""
