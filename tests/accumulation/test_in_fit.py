"""fit's bias gradients are exact sums, in layers of anybody."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfamp
from tfamp.training import preconditions

ROWS = 8 * 32 * 32


class Biased(layers.Layer):
    """A layer of somebody: adds its bias in a way of its own."""

    def __init__(self, add, **options):
        super().__init__(**options)
        self.add = add

    def build(self, shape):
        self.bias = self.add_weight(
            shape=(shape[-1],), initializer="zeros", name="bias"
        )

    def call(self, x):
        return self.add(x, self.bias)


def gathered(x, bias):
    """Each pixel looks its bias up in a table."""
    places = ops.zeros(ops.shape(x)[:-1], "int32")
    return x + tf.gather(tf.convert_to_tensor(bias)[None], places)


def branches():
    return {
        "dense": layers.Dense(4),
        "einsum": layers.EinsumDense(
            "abcd,de->abce", (None, None, 4), bias_axes="e"
        ),
        "conv": layers.Conv2D(4, 1),
        "depthwise": layers.DepthwiseConv2D(1),
        "transpose": layers.Conv2DTranspose(4, 1),
        "keras_add": Biased(ops.add),
        "plus": Biased(lambda x, bias: x + bias),
        "bias_add": Biased(
            lambda x, bias: tf.nn.bias_add(x, tf.convert_to_tensor(bias))
        ),
        "broadcast": Biased(
            lambda x, bias: x + ops.broadcast_to(bias, ops.shape(x))
        ),
        "gather": Biased(gathered),
    }


def mean_of_row(ones, outputs):
    # Of the data, so that no compiler folds the gradients into constants.
    outputs = ops.cast(outputs, "float32")
    return ops.mean(outputs, axis=(1, 2, 3)) * ops.cast(ones[:, 0], "float32")


def biases_after_a_step(precision, strategy=None, **options):
    """What one step of SGD makes of biases of 0."""
    keras.config.set_dtype_policy(precision)
    with (strategy or tf.distribute.get_strategy()).scope():
        inputs = keras.Input((32, 32, 4))
        made = branches()
        model = keras.Model(inputs, [each(inputs) for each in made.values()])
        model.compile(
            tfamp.wrap_optimizer(keras.optimizers.SGD(1.0), precision),
            [mean_of_row] * len(made),
            auto_scale_loss=False,
        )
    images = np.ones((8, 32, 32, 4), "float32")
    data = (images, (np.ones((8, 1), "float32"),) * len(made))
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(8)
    # In float32 nothing would have to be added in another dtype.
    tfamp.fit(model, dataset, keep_float32=False, verbose=0, **options)
    return {name: np.asarray(layer.bias) for name, layer in made.items()}


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        pytest.param("mixed_float16", {}, marks=pytest.mark.slow),
        ("mixed_bfloat16", {"microbatches": 2}),
        pytest.param("mixed_bfloat16", {"jit": True}, marks=pytest.mark.slow),
    ],
    ids=["float16", "microbatches", "XLA"],
)
def test_biases_of_all_layers_get_the_sum_over_rows(precision, options):
    biases = biases_after_a_step(precision, **options)
    for name, bias in biases.items():
        # Each of ROWS * 4 outputs has as much part in the mean.
        np.testing.assert_array_equal(bias, np.full(4, -1 / 4), name)


@pytest.mark.slow
def test_biases_on_two_replicas(mirrored):
    biases = biases_after_a_step("mixed_bfloat16", mirrored(2))
    for name, bias in biases.items():
        np.testing.assert_array_equal(bias, np.full(4, -1 / 4), name)


class Messages(layers.Layer):
    """Sums over edges, into one node."""

    def call(self, x):
        edges = ops.reshape(x, (-1, 1))
        target = ops.zeros((3072,), "int32")
        summed = ops.segment_sum(edges, target, num_segments=1)
        return ops.reshape(summed, (-1, 1))


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_forward_passes_are_the_same_in_fit_and_in_evaluate(precision):
    keras.config.set_dtype_policy(precision)
    inputs = keras.Input((3072,), batch_size=1)
    scaled = layers.Dense(3072, use_bias=False, kernel_initializer="identity")
    model = keras.Model(inputs, Messages()(scaled(inputs)))
    model.compile(
        # At a scale of 65536 the step would overflow, and not count.
        tfamp.wrap_optimizer(
            keras.optimizers.SGD(0.0), precision, initial_scale=1.0
        ),
        lambda _, outputs: ops.cast(outputs, "float32")[:, 0],
        auto_scale_loss=False,
    )
    data = (np.ones((1, 3072), "float32"), np.zeros((1, 1), "float32"))
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(1)
    history = tfamp.fit(
        model, dataset, validation_data=dataset, keep_float32=False, verbose=0
    )
    assert history.history["loss"] == [3072]
    assert history.history["val_loss"] == [3072]


@pytest.mark.parametrize(
    ("precision", "eagerly", "lines"),
    [
        ("mixed_bfloat16", True, 1),
        ("mixed_bfloat16", False, 0),
        ("float32", True, 0),
    ],
)
def test_eager_steps_are_said_to_be_left_as_they_are(
    precision, eagerly, lines, warnings_of_absl
):
    keras.config.set_dtype_policy(precision)
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=eagerly)
    preconditions.warn_of_eager_sums(model)
    assert len(warnings_of_absl) == lines
