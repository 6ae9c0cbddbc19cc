"""Taps on models: which parts they find, and what they leave alone."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfamp.taps.parts import Part, Taps, layers_of, operations_of
from tfamp.taps.passing import with_gradient_seen


def branch(units=1):
    """A nested model whose name and whose layer's name are always the same."""
    inputs = keras.Input((2,))
    outputs = keras.layers.Dense(
        units, use_bias=False, kernel_initializer="ones", name="dense"
    )(inputs)
    return keras.Model(inputs, outputs, name="branch")


class Twins(keras.Model):
    """The second of two nested models of one name sees doubled inputs."""

    def __init__(self):
        super().__init__()
        self.first = branch()
        self.second = branch()

    def call(self, x):
        return self.first(x) + self.second(2.0 * x)


def own_attributes(parts):
    return [dict(vars(part.owner)) for part in parts]


def outputs_seen(model, parts, run):
    """Sums of what came out of each part, by path."""
    sums = {}

    def see(spot, value):
        if spot.side == "output":
            sums[spot.part.path] = tf.reduce_sum(value)
        return value

    taps = Taps(parts)
    with taps.attached(), taps.watching(see):
        run(model)
    return {path: float(value) for path, value in sums.items()}


def test_layers_of_one_name_in_nested_models_of_one_name_are_told_apart():
    model = Twins()
    x = tf.constant([[1.0, 2.0]])
    model(x)
    parts = layers_of(model)
    dense = [
        part for part in parts if isinstance(part.owner, keras.layers.Dense)
    ]
    assert [(part.owner, part.path) for part in dense] == [
        (model.first.layers[1], "branch/dense"),
        (model.second.layers[1], "branch#2/dense"),
    ]
    seen = outputs_seen(model, parts, lambda m: m(x))
    assert seen["branch/dense"] == 3.0
    assert seen["branch#2/dense"] == 6.0


def test_an_operation_that_two_nested_models_share_is_one_part():
    inputs = keras.Input((2,))
    doubled = keras.ops.multiply(inputs, 2.0)
    short = keras.Model(inputs, doubled, name="short")
    long = keras.Model(inputs, keras.ops.add(doubled, 1.0), name="long")
    outer = keras.Input((2,))
    model = keras.Model(outer, short(outer) + long(outer))
    parts = operations_of(model)
    assert len({id(part.owner) for part in parts}) == len(parts)
    before = own_attributes(parts)
    with Taps(parts).attached():
        pass
    assert own_attributes(parts) == before


def test_a_gradient_is_seen_and_goes_on_as_it_is():
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    model = keras.Sequential([keras.Input((2,)), layer])
    gradients = []

    def see(spot, value):
        return with_gradient_seen(value, gradients.append)

    taps = Taps(layers_of(model))
    x = tf.constant([[1.0, 2.0]])
    with taps.attached(), taps.watching(see), tf.GradientTape() as tape:
        loss = 5.0 * tf.reduce_sum(model(x))
    with taps.watching(see):
        (kernel,) = tape.gradient(loss, model.trainable_variables)
    np.testing.assert_array_equal(kernel, [[5.0], [10.0]])
    # That of the output; of the input, data, nobody asked.
    assert [float(each[0, 0]) for each in gradients] == [5.0]


def test_within_a_graph_an_eager_constant_reaches_a_layer_as_it_is():
    held = tf.constant([[1.0, 2.0]])

    class Looks(keras.layers.Layer):
        def call(self, x):
            self.got = x
            return 2.0 * x

    layer = Looks()
    model = keras.Sequential([layer])
    seen = []

    def see(spot, value):
        seen.append((spot.side, tf.is_symbolic_tensor(value)))
        return with_gradient_seen(value, lambda gradient: None)

    taps = Taps([Part(layer, "looks")])

    @tf.function(autograph=False)
    def run():
        with taps.watching(see):
            return layer(held)

    model.built = True
    with taps.attached():
        result = run()
    assert layer.got is held
    assert seen == [("input", True), ("output", True)]
    np.testing.assert_array_equal(result, [[2.0, 4.0]])


def test_ragged_and_masked_tensors_pass_with_what_belongs_to_them():
    layer = keras.layers.Masking(0.0)
    identity = keras.layers.Identity()
    taps = Taps([Part(layer, "masking"), Part(identity, "identity")])
    ragged = tf.ragged.constant([[1.0], [2.0, 3.0]])
    sizes = []

    def see(spot, value):
        sizes.append(int(tf.size(value)))
        return with_gradient_seen(value, lambda gradient: None)

    with taps.attached(), taps.watching(see):
        masked = layer(tf.constant([[[1.0], [0.0]]]))
        assert identity.call(ragged).to_list() == [[1.0], [2.0, 3.0]]
    np.testing.assert_array_equal(masked._keras_mask, [[True, False]])
    assert sizes == [2, 2, 3, 3]


def test_a_part_in_a_loop_is_told_and_not_seen():
    layer = keras.layers.Dense(1)
    layer.build((None, 1))
    taps = Taps([Part(layer, "dense")])
    seen, missed = [], []

    @tf.function(autograph=False)
    def run(x):
        def see(spot, value):
            seen.append(spot)
            return value

        with taps.watching(see, missed.append):
            return tf.while_loop(
                lambda i, x: i < 3,
                lambda i, x: (i + 1, layer(x)),
                (tf.constant(0), x),
            )

    with taps.attached():
        run(tf.ones([1, 1]))
    assert not seen
    assert missed[0].owner is layer


def test_an_error_in_a_layer_leaves_nothing_behind():
    model = Twins()
    model(tf.ones([1, 2]))
    parts = layers_of(model)
    before = own_attributes(parts)

    def see(spot, value):
        raise KeyError

    taps = Taps(parts)
    with pytest.raises(KeyError), taps.attached(), taps.watching(see):
        model(tf.ones([1, 2]))
    assert own_attributes(parts) == before
    with taps.attached():
        # Nobody watches any more.
        assert float(model(tf.ones([1, 2]))[0, 0]) == 6.0


def test_a_thread_sees_only_what_it_does_itself():
    model = Twins()
    x = tf.ones([1, 2])
    model(x)
    seen = []

    def see(spot, value):
        seen.append(threading.get_ident())
        return value

    taps = Taps(layers_of(model))
    with taps.attached(), taps.watching(see):
        other = threading.Thread(target=lambda: model(x))
        other.start()
        other.join()
        assert not seen
        model(x)
    assert set(seen) == {threading.get_ident()}


def test_a_single_operation_can_be_a_part():
    def see(spot, value):
        return value + 1.0 if spot.side == "output" else value

    taps = Taps([Part(keras.ops, "exp", method="exp")])
    with taps.attached(), taps.watching(see):
        assert float(keras.ops.exp(tf.constant(0.0))) == 2.0
    assert float(keras.ops.exp(tf.constant(0.0))) == 1.0
