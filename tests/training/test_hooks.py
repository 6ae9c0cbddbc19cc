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


class OfEpochs(keras.callbacks.Callback):
    """Has an attribute that callbacks of Keras have, and a hook."""

    update_freq = "epoch"
    calls = 0

    def on_train_batch_end(self, batch, logs=None):
        self.calls += 1


def test_an_attribute_that_looks_like_keras_keeps_no_hook_from_being_called():
    callback = OfEpochs()
    tfamp.fit(
        build_model(), X, Y, batch_size=2, callbacks=[callback], verbose=0
    )
    assert callback.calls == 6


def several_optimizers():
    optimizers = keras.optimizers.OptimizerMap(
        default_optimizer=keras.optimizers.SGD(0.5)
    )
    optimizers["kernel"] = keras.optimizers.SGD(0.25)
    return keras.optimizers.MultiOptimizer(optimizers)


def test_a_schedule_sets_the_rates_of_several_optimizers():
    model = build_model()
    model.compile(several_optimizers(), "mse")
    halve = keras.callbacks.LearningRateScheduler(lambda _, rate: rate / 2)
    plateau = keras.callbacks.ReduceLROnPlateau(
        monitor="loss", factor=0.5, patience=1, min_delta=1e9
    )

    tfamp.fit(
        model, X[:2], Y[:2], epochs=2, callbacks=[halve, plateau], verbose=0
    )

    # Halved in each epoch, and once more at the end of the second.
    rates = [float(o.learning_rate) for o in model.optimizer.optimizers]
    assert sorted(rates) == [0.25 / 8, 0.5 / 8]


def test_an_optimizer_that_is_one_has_no_several():
    assert not hasattr(
        tfamp.LossScaleOptimizer(keras.optimizers.SGD()), "optimizers"
    )
