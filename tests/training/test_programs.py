"""A step that was traced serves again, until something of it changes."""

import gc
import logging
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfamp
from tests.conftest import mostly_long
from tfamp.training import programs

X = np.random.default_rng(0).random((24, 4), "float32")
Y = X[:, :1]


class Scale(layers.Layer):
    """Reads numbers from wherever layers keep them, and counts its traces."""

    traces = 0

    def __init__(self):
        super().__init__()
        self.factor = 2.0
        self.factors = {"more": [3.0]}
        self.held = type("Held", (), {})()
        self.held.factor = 0.5
        self.array = np.ones(4, "float32")

    def call(self, inputs):
        Scale.traces += 1
        factor = self.factor * self.factors["more"][0] * self.held.factor
        return inputs * factor * self.array


class Weighted(keras.Model):
    """Has a loss that hangs on a number of the model's."""

    weight = 1.0

    def compute_loss(self, *arguments, **options):
        return self.weight * super().compute_loss(*arguments, **options)


def trained_model():
    keras.utils.set_random_seed(0)
    inputs = keras.Input([4])
    outputs = layers.Dense(4, activation="tanh", name="first")(inputs)
    outputs = layers.Dropout(0.5, name="dropout")(outputs)
    outputs = layers.BatchNormalization(name="norm")(outputs)
    scaled = Scale()
    outputs = layers.Dense(1, name="last")(scaled(outputs))
    model = Weighted(inputs, outputs)
    model.scaled = scaled
    model.compile(keras.optimizers.Adam(0.1), "mse", metrics=["mae"])
    train(model)
    return model


def train(model, **options):
    tfamp.fit(model, X, Y, batch_size=8, verbose=0, **options)


def test_what_was_traced_serves_again():
    tfamp.set_precision("mixed_float16")
    model = trained_model()
    model.compile(tfamp.wrap_optimizer(keras.optimizers.Adam()), "mse")

    def all_of_it():
        train(model, validation_data=(X[:9], Y[:9]))
        tfamp.evaluate(model, X, Y, batch_size=5)
        return tfamp.predict(model, X, batch_size=7)

    def steps():
        optimizer = model.optimizer
        return int(optimizer.iterations + optimizer.skipped_steps)

    all_of_it()
    before = steps()
    Scale.traces = 0
    outputs = all_of_it()
    assert Scale.traces == 0
    assert steps() == before + 3
    expected = model(X, training=False).numpy().astype("float32")
    np.testing.assert_allclose(outputs, expected, atol=2e-3, rtol=2e-3)


def frozen(model):
    model.get_layer("first").trainable = False


def of_other_precision(model):
    model.get_layer("first").dtype_policy = "mixed_bfloat16"


def regularized(model):
    model.get_layer("first").kernel.regularizer = keras.regularizers.L2(0.1)


def of_another_call(model):
    model.scaled.call = lambda inputs: -inputs


def updated_otherwise(model):
    inner = model.optimizer.inner_optimizer
    inner.update_step = lambda gradient, variable, rate: variable.assign_sub(
        rate * gradient
    )


def clipped(model):
    model.optimizer.inner_optimizer.clipnorm = 1e-3


def scheduled(model):
    rate = keras.optimizers.schedules.ExponentialDecay(0.5, 2, 0.5)
    model.optimizer.inner_optimizer.learning_rate = rate


def compiled(model):
    model.compile("sgd", "mae", metrics=["mse"])


CHANGES = {
    "weight of a loss": lambda m: setattr(m, "weight", 3.0),
    "attribute": lambda m: setattr(m.scaled, "factor", -1.0),
    "entry": lambda m: m.scaled.factors["more"].__setitem__(0, -1.0),
    "object": lambda m: setattr(m.scaled.held, "factor", -1.0),
    "array": lambda m: m.scaled.array.fill(-1.0),
    "rate": lambda m: setattr(m.get_layer("dropout"), "rate", 0.1),
    "momentum": lambda m: setattr(m.get_layer("norm"), "momentum", 0.1),
    "frozen": frozen,
    "precision": of_other_precision,
    "regularizer": regularized,
    "call": of_another_call,
    "update_step": updated_otherwise,
    "clipnorm": clipped,
    "schedule": scheduled,
    "compiled": compiled,
    "seed": lambda m: keras.utils.set_random_seed(5),
    "epsilon": lambda m: keras.config.set_epsilon(1e-2),
    "learning rate": lambda m: setattr(m.optimizer, "learning_rate", 0.5),
    "weights": lambda m: m.set_weights([2 * w for w in m.get_weights()]),
    "microbatches": {"microbatches": 2},
    "XLA": {"jit": True},
    "class_weight": {"class_weight": {0: 3.0}},
    "sample_weight": {"sample_weight": np.arange(24.0)},
    "nothing": lambda m: None,
}


@pytest.mark.parametrize(
    "change",
    mostly_long(CHANGES, always=["entry", "compiled"]),
)
def test_what_has_changed_counts_in_the_next_call(change):
    change = CHANGES[change]
    options = change if isinstance(change, dict) else {}
    ends = []
    epsilon = keras.config.epsilon()
    for is_forgotten in (False, True):
        try:
            model = trained_model()
            if not options:
                change(model)
            if is_forgotten:
                vars(model).pop("_tfamp_programs")
            train(model, **options)
            ends.append([*model.get_weights(), tfamp.predict(model, X)])
        finally:
            keras.config.set_epsilon(epsilon)
    for kept, anew in zip(*ends, strict=True):
        np.testing.assert_array_equal(kept, anew)


def test_each_change_of_the_matrix_moves_something():
    before = trained_model()
    train(before)
    model = trained_model()
    CHANGES["entry"](model)
    train(model)
    assert not np.array_equal(before.get_weights()[0], model.get_weights()[0])


def test_a_former_optimizer_and_a_model_that_is_gone_are_let_go():
    model = trained_model()
    former = weakref.ref(model.optimizer)
    model.compile("sgd", "mse")
    tfamp.evaluate(model, X, Y)
    gc.collect()
    assert former() is None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class Within(keras.callbacks.Callback):
    """Calls what it is called by."""

    def __init__(self, call):
        super().__init__()
        self.call = call
        self.results = []

    def on_test_batch_end(self, batch, logs=None):
        if batch == 1:
            self.results.append(self.call())


def test_a_call_within_a_call_has_a_loop_of_its_own():
    model = trained_model()
    first = tfamp.evaluate(model, X, Y, batch_size=8)
    within = Within(lambda: tfamp.evaluate(model, X[:8], Y[:8], batch_size=8))
    tfamp.evaluate(model, X, Y, batch_size=8, callbacks=[within])
    expected = tfamp.evaluate(model, X[:8], Y[:8], batch_size=8)
    assert within.results == [expected]
    assert tfamp.evaluate(model, X, Y, batch_size=8) == first


def test_a_skip_is_seen_by_a_loop_that_serves_again(caplog):
    tfamp.set_precision("mixed_float16")
    model = trained_model()
    bad = np.where(np.arange(24)[:, None] == 9, np.inf, X).astype("float32")
    caplog.set_level(logging.WARNING)
    tfamp.fit(model, bad, Y, batch_size=8, shuffle=False, verbose=0)
    assert "step 2: skipped 1 step" in caplog.text


def test_tensorflow_does_not_warn_of_models_and_calls(caplog):
    caplog.set_level(logging.WARNING, logger="tensorflow")
    for _ in range(6):
        model = keras.Sequential([keras.Input([4]), layers.Dense(1)])
        model.compile("sgd", "mse")
        data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(24)
        tfamp.fit(model, data, verbose=0)
        tfamp.evaluate(model, data)
        tfamp.predict(model, data)
    assert "retracing" not in caplog.text


class Changes(keras.callbacks.Callback):
    """Changes a number after a step that was traced with the former one."""

    def on_train_batch_end(self, batch, logs=None):
        self.model.scaled.factor = -1.0


def test_what_changes_while_it_trains_counts_in_the_next_call():
    model = trained_model()
    train(model, callbacks=[Changes()])
    Scale.traces = 0
    train(model)
    assert Scale.traces == 1


def test_a_vocabulary_is_not_walked_through():
    model = trained_model()
    few = len(repr(programs.facts(model)))
    model.scaled.vocabulary = [str(i) for i in range(100_000)]
    assert len(repr(programs.facts(model))) < few + 2000


def test_a_deep_model_is_known_again():
    inputs = outputs = keras.Input([4])
    for _ in range(500):
        outputs = layers.Activation("relu")(outputs)
    model = keras.Model(inputs, outputs)
    facts = programs.facts(model)
    assert facts == programs.facts(model)
    model.layers[250].activation = keras.activations.tanh
    assert facts != programs.facts(model)


def test_facts_keep_no_graph():
    class Leaves(layers.Layer):
        def call(self, inputs):
            self.left = inputs
            return inputs

    model = keras.Sequential([keras.Input([4]), Leaves(), layers.Dense(1)])
    model.compile("sgd", "mse")
    train(model)
    assert "FuncGraph" not in repr(programs.facts(model))
