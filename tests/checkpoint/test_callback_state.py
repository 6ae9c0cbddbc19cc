"""Callbacks go on as if their run had not been stopped."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import mostly_long
from tests.resumable_run import (
    Stopped,
    assert_same_bits,
    state_of,
)
from tfamp.checkpoint import plain_values
from tfamp.checkpoint.callback_state import CallbackStates


class StopBefore(keras.callbacks.Callback):
    """The process goes away as an epoch begins, or after its second step."""

    def __init__(self, epoch, in_the_middle=False):
        super().__init__()
        self._at = epoch, in_the_middle

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        if (epoch, False) == self._at:
            raise Stopped

    def on_train_batch_end(self, batch, logs=None):
        if (self._epoch, True) == self._at and batch == 2:
            raise Stopped


def fit(directory, callbacks, stop=None, epochs=6, use_ema=False):
    """Of a small model whose validation loss gets worse after a while."""
    keras.utils.set_random_seed(0)
    generator = np.random.default_rng(1)
    x = generator.normal(size=(24, 3)).astype("float32")
    y = x[:, :1] + 1.0
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    inner = keras.optimizers.Adam(0.3, use_ema=use_ema, ema_momentum=0.5)
    model.compile(tfamp.wrap_optimizer(inner), "mse", auto_scale_loss=False)
    stops = [] if stop is None else [StopBefore(*stop)]
    with contextlib.suppress(Stopped):
        tfamp.fit(
            model,
            tf.data.Dataset.from_tensor_slices((x, y)).batch(8),
            epochs=epochs,
            validation_data=(x, -y),
            callbacks=[*callbacks, *stops],
            checkpoint_dir=directory,
            verbose=0,
        )
    return model


class Counts(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.epochs = 0
        self.settings = [1, 2]

    def on_epoch_end(self, epoch, logs=None):
        self.epochs += 1


class Remembers(Counts):
    def get_state(self):
        return {"epochs": self.epochs, "array": np.arange(3, dtype="int16")}

    def set_state(self, state):
        self.epochs = state["epochs"]
        self.array = state["array"]


def rate_of(model):
    return float(model.optimizer.learning_rate.numpy())


@pytest.fixture
def save_at_each_step(monkeypatch):
    monkeypatch.setattr(tfamp.training.run, "SECONDS_BETWEEN_SAVES", 0)


def all_callbacks(folder):
    """One of each that remembers something."""
    return [
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.9 * rate),
        keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
        keras.callbacks.ReduceLROnPlateau(
            monitor="loss", patience=2, factor=0.5, min_delta=100.0
        ),
        keras.callbacks.ModelCheckpoint(
            str(folder / "best.weights.h5"),
            save_best_only=True,
            save_weights_only=True,
        ),
        keras.callbacks.EarlyStopping(patience=4, restore_best_weights=True),
        keras.callbacks.CSVLogger(str(folder / "log.csv")),
        Remembers(),
    ]


@pytest.mark.parametrize(
    "stop", mostly_long([((3, False),), ((3, True),)], always=[((3, True),)])
)
def test_callbacks_of_keras_end_as_in_a_run_never_stopped(
    tmp_path, stop, save_at_each_step
):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = fit(None, all_callbacks(tmp_path / "whole"), use_ema=True)
    directory, folder = tmp_path / "saves", tmp_path / "stopped"
    callbacks = all_callbacks(folder)
    fit(directory, callbacks, stop, use_ema=True)
    # The process that goes away closes its files.
    callbacks[-2].on_train_end()
    callbacks = all_callbacks(folder)
    resumed = fit(directory, callbacks, use_ema=True)
    epochs = len(whole.history.history["loss"])
    assert callbacks[-1].epochs == epochs
    rows = (folder / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == [
        "epoch",
        *map(str, range(epochs)),
    ]
    # Halved once and stopped, as the worse validation losses wanted.
    assert epochs < 6
    assert rate_of(whole) < 0.3 * 0.9**epochs
    assert rate_of(resumed) == rate_of(whole)
    assert_same_bits(state_of(resumed), state_of(whole))
    best = []
    for name in ("whole", "stopped"):
        other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        other.load_weights(tmp_path / name / "best.weights.h5")
        best.append([weight.numpy() for weight in other.weights])
    assert_same_bits(*best)


@pytest.mark.slow
def test_a_backup_of_keras_beside_it_does_not_turn_the_run_back(
    tmp_path, save_at_each_step
):
    def callbacks():
        return [keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))]

    whole = fit(None, [])
    fit(tmp_path / "saves", callbacks(), (3, True))
    resumed = fit(tmp_path / "saves", callbacks())
    assert_same_bits(state_of(resumed), state_of(whole))


def test_a_callback_without_state_is_named_once_where_it_changes(
    warnings_of_absl,
):
    callback = Counts()
    states = CallbackStates([callback, keras.callbacks.EarlyStopping()])
    states.begin()
    state, arrays = states.capture()
    assert not warnings_of_absl
    callback.on_epoch_end(0)
    for _ in range(2):
        state, arrays = states.capture()
    assert warnings_of_absl == [
        "Callback Counts changes epochs, which checkpoints lack: a run that "
        "goes on begins with it anew. With get_state() and set_state(state) "
        "it goes on too."
    ]
    # Where the run goes on it is known at once.
    states = CallbackStates([Counts()])
    states.begin()
    states.restore(state, arrays)
    states.capture()
    assert len(warnings_of_absl) == 2


def test_callbacks_are_told_apart_by_class_and_number():
    one, two = (keras.callbacks.EarlyStopping() for _ in range(2))
    states = CallbackStates([one, keras.callbacks.CallbackList([two])])
    states.begin()
    one.wait, two.wait = 1, 2
    two.best_weights = [np.ones(2, "float32"), np.zeros((), "bfloat16")]
    state, arrays = states.capture()
    others = [keras.callbacks.EarlyStopping() for _ in range(2)]
    CallbackStates(others).restore(state, arrays)
    assert [each.wait for each in others] == [1, 2]
    assert others[0].best_weights is None
    assert_same_bits(others[1].best_weights, two.best_weights)


def test_plain_values_come_back_as_they_were():
    values = {
        "none": None,
        "tuple": (1, -2.5, True, "text", float("inf")),
        3: [np.float32(1.5), np.zeros((0, 2)), {"a", "b"}],
        "tensor": tf.constant([1, 2]),
    }
    arrays = []
    encoded = plain_values.encode(values, arrays)
    described, content = plain_values.pack(arrays)
    decoded = plain_values.decode(
        encoded, plain_values.unpack(described, content)
    )
    assert decoded["tuple"] == values["tuple"]
    assert type(decoded[3][0]) is np.float32
    assert decoded[3][1].shape == (0, 2)
    assert decoded[3][2] == {"a", "b"}
    assert decoded["tensor"].numpy().tolist() == [1, 2]
    for value in (print, object(), np.array(["text"])):
        with pytest.raises(plain_values.NotPlain):
            plain_values.encode(value, [])
