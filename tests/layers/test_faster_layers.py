"""The faster layers compute what Keras's do: values, gradients, statistics.

Keras's own layer in float64 tells what is right. In 16 bits the faster layer
must be as near to it as Keras's layer is, which rounds as often or oftener.
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfamp
from tests.conftest import FLOAT32_ROUNDING, first_always, mostly_long
from tfamp.layers import row_products

# Keras 3.15 copies its variables with np.array, of which NumPy 2 warns.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
IMAGES = (4, 3, 5, 6)
CASES = {
    "batch norm": (layers.BatchNormalization, {"epsilon": 1e-2}, IMAGES),
    "batch norm alone": (
        layers.BatchNormalization,
        {"center": False, "scale": False, "momentum": 0.7},
        IMAGES,
    ),
    "batch norm of few rows": (
        layers.BatchNormalization,
        {"axis": 3, "epsilon": 1e-5},
        (2, 1, 1, 5),
    ),
    "batch norm of one row": (layers.BatchNormalization, {}, (1, 1, 1, 2)),
    "1x1": (layers.Conv2D, {"activation": "tanh"}, IMAGES),
    "1x1 without bias": (layers.Conv2D, {"use_bias": False}, IMAGES),
    "1x1 with strides": (
        layers.Conv2D,
        {"strides": (2, 3), "padding": "same"},
        (2, 5, 7, 3),
    ),
    "1x1 of one channel": (layers.Conv2D, {}, (1, 2, 2, 1)),
    "rms norm": (layers.RMSNormalization, {"epsilon": 1e-3}, (4, 7, 9)),
    "rms norm of rows": (layers.RMSNormalization, {}, (5, 6)),
    "layer norm": (layers.LayerNormalization, {}, (4, 7, 9)),
    "layer norm alone": (
        layers.LayerNormalization,
        {"center": False, "scale": False, "epsilon": 1e-6},
        (5, 6),
    ),
    "layer norm of images": (layers.LayerNormalization, {}, IMAGES),
}


def make(name, policy, *, faster):
    """A layer of that case in a model, with weights that are not trivial."""
    cls, options, shape = CASES[name]
    if cls is layers.Conv2D:
        options = {"filters": 4, "kernel_size": 1} | options
    keras.utils.set_random_seed(0)
    layer = cls(**options, dtype=policy, name="layer")
    inputs = keras.Input(shape[1:], dtype=layer.compute_dtype)
    model = keras.Model(inputs, layer(inputs))
    random = np.random.default_rng(1)
    layer.set_weights(
        [random.uniform(0.5, 1.5, each.shape) for each in layer.weights]
    )
    if faster:
        (found,) = tfamp.optimize(model)
        assert found.changed
    return layer


def draw(name, policy):
    """An input and a gradient from above, which all dtypes hold exactly."""
    layer = make(name, policy, faster=False)
    shape = CASES[name][2]
    random = np.random.default_rng(2)
    x = random.normal(3.0, 2.0, shape)
    upstream = random.normal(size=layer.compute_output_shape(shape))
    dtype = layer.compute_dtype
    return [tf.cast(tf.cast(each, dtype), tf.float64) for each in (x, upstream)]


def passes(layer, x, upstream, training=True):
    """Values, gradients, second derivatives and what the layer's state is."""
    weights = [each.value for each in layer.trainable_variables]
    takes_training = isinstance(layer, layers.BatchNormalization)
    options = {"training": training} if takes_training else {}
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = layer(x, **options)
        x_gradient, *gradients = inner.gradient(
            y, [x, *weights], tf.cast(upstream, y.dtype)
        )
        penalty = tf.reduce_sum(
            tf.square(tf.cast(x_gradient, layer.variable_dtype))
        )
    seconds = outer.gradient(
        penalty, [x, *weights], unconnected_gradients="zero"
    )
    statistics = [each.value for each in layer.non_trainable_variables]
    return {
        "y": [y],
        "x_gradient": [x_gradient],
        "gradients": gradients,
        "second derivatives": seconds,
        "statistics": statistics,
    }


def results(name, policy, *, faster, training=True, run=passes):
    layer = make(name, policy, faster=faster)
    x, upstream = draw(name, "float32" if policy == "float64" else policy)
    return run(layer, tf.cast(x, layer.compute_dtype), upstream, training)


def error(actual, exact):
    """Distance relative to the size of what is right, both as one vector."""
    actual, exact = (
        np.concatenate(
            [tf.reshape(tf.cast(e, tf.float64), [-1]) for e in each]
            or [np.zeros(1)]
        )
        for each in (actual, exact)
    )
    assert actual.shape == exact.shape
    return np.linalg.norm(actual - exact) / max(np.linalg.norm(exact), 1e-3)


def exact_results(name, policy, training=True):
    layer = make(name, "float64", faster=False)
    return passes(layer, *draw(name, policy), training)


def assert_as_near(fast, stock, exact):
    """Each part of `fast` is as near to `exact` as that of `stock` is."""
    for part in exact:
        of_stock = error(stock[part], exact[part])
        of_fast = error(fast[part], exact[part])
        # Two orders of summation differ; more than that would be an error.
        slack = 2e-6
        if part == "second derivatives":
            # The parts of one gradient are 16-bit before they are added.
            slack += tfamp.FORMATS[fast["y"][0].dtype.name].epsilon / 8
        assert of_fast <= 1.25 * of_stock + slack, part


WITH_TWO_MODES = [name for name in CASES if name.startswith("batch norm")]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("name", "training"),
    first_always(
        [
            *((name, True) for name in list(CASES)[::2]),
            *((name, False) for name in WITH_TWO_MODES),
            *((name, True) for name in list(CASES)[1::2]),
        ],
        (len(CASES) + 1) // 2 + len(WITH_TWO_MODES),
    ),
)
def test_results_are_as_near_to_float64_as_those_of_keras(
    name, policy, training
):
    exact = exact_results(name, policy, training)
    stock = results(name, policy, faster=False, training=training)
    fast = results(name, policy, faster=True, training=training)
    for part in exact:
        dtypes = [[e.dtype for e in each[part]] for each in (fast, stock)]
        assert dtypes[0] == dtypes[1], part
    assert_as_near(fast, stock, exact)


def traced(jit):
    """`passes` in a graph that knows the number of channels alone."""

    def run(layer, x, upstream, training):
        sizes = [None] * (len(x.shape) - 1)
        function = tf.function(
            lambda x, upstream: passes(layer, x, upstream, training),
            input_signature=[
                tf.TensorSpec([*sizes, each.shape[-1]], each.dtype)
                for each in (x, upstream)
            ],
            jit_compile=jit,
        )
        return function(x, upstream)

    return run


@pytest.mark.parametrize(
    ("name", "jit", "policy"),
    mostly_long(
        itertools.product(
            ("batch norm", "1x1 with strides", "rms norm", "layer norm"),
            (False, True),
            ("float32", "mixed_bfloat16"),
        ),
        always=[
            ("batch norm", True, "mixed_bfloat16"),
            ("1x1 with strides", False, "mixed_bfloat16"),
            ("rms norm", False, "float32"),
            ("layer norm", True, "float32"),
        ],
    ),
)
def test_results_are_the_same_in_graphs_of_unknown_sizes(name, policy, jit):
    exact = exact_results(name, policy)
    stock = results(name, policy, faster=False)
    assert_as_near(
        results(name, policy, faster=True, run=traced(jit)), stock, exact
    )


@pytest.mark.parametrize("name", ["1x1", "rms norm", "layer norm"])
def test_results_are_the_same_where_products_are_not_faster(name, monkeypatch):
    monkeypatch.setattr(row_products, "is_faster", lambda: False)
    fast = results(name, "float32", faster=True)
    stock = results(name, "float32", faster=False)
    assert_as_near(fast, stock, exact_results(name, "float32"))


def operations(layer, x, **options):
    """The operations that a layer's call makes: dtypes of inputs by kind."""
    function = tf.function(lambda x: layer(x, **options))
    graph = function.get_concrete_function(x).graph
    return {
        op.type: [each.dtype for each in op.inputs]
        for op in graph.get_operations()
    }


def test_batch_norm_is_one_operation_that_reads_16_bits():
    layer = make("batch norm", "mixed_bfloat16", faster=True)
    x = tf.zeros(IMAGES, tf.bfloat16)
    for training in (True, False):
        found = operations(layer, x, training=training)
        images, *weights = found["FusedBatchNormV3"]
        assert images == tf.bfloat16
        assert set(weights) == {tf.float32}
        # Keras's layer is made of these.
        assert not set(found) & {"Mean", "Rsqrt", "SquaredDifference"}


def test_batch_norm_asks_no_gpu_for_an_epsilon_that_it_may_refuse(monkeypatch):
    layer = make("batch norm of few rows", "float32", faster=True)
    x = tf.random.normal((2, 1, 1, 5))
    assert "FusedBatchNormV3" in operations(layer, x)
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [kind])
    assert "FusedBatchNormV3" not in operations(layer, x)
    layer.epsilon = 1.001e-5
    assert "FusedBatchNormV3" in operations(layer, x)


def test_a_1x1_convolution_is_a_product_on_cpus_alone(monkeypatch):
    layer = make("1x1", "float32", faster=True)
    x = tf.zeros(IMAGES)
    assert "MatMul" in operations(layer, x)
    monkeypatch.setattr(row_products, "is_faster", lambda: False)
    assert "MatMul" not in operations(layer, x)
    assert "Conv2D" in operations(layer, x)


def test_a_frozen_batch_norm_keeps_its_statistics_and_uses_them():
    for_training, for_inference = (
        make("batch norm", "float32", faster=True) for _ in range(2)
    )
    for_training.trainable = False
    x = tf.random.normal(IMAGES)
    np.testing.assert_array_equal(
        for_training(x, training=True), for_inference(x, training=False)
    )
    for one, other in zip(
        for_training.weights, for_inference.weights, strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_batch_norm_leaves_masked_positions_out_as_keras_does():
    x = tf.random.normal(IMAGES, 3.0)
    mask = tf.constant([True, False, True, True])[:, None, None]
    mask = tf.broadcast_to(mask, IMAGES[:3])
    values = []
    for faster in (True, False):
        layer = make("batch norm", "float32", faster=faster)
        y = layer(x, training=True, mask=mask)
        values.append([y, layer.moving_mean, layer.moving_variance])
    for one, other in zip(*values, strict=True):
        np.testing.assert_array_equal(one, other)


def test_low_rank_weights_given_later_count():
    x = tf.random.normal(IMAGES)
    values = []
    for faster in (True, False):
        layer = make("1x1", "float32", faster=faster)
        layer.enable_lora(2)
        layer.lora_kernel_b.assign(tf.ones_like(layer.lora_kernel_b))
        layer.lora_kernel_a.assign(tf.ones_like(layer.lora_kernel_a))
        values.append(layer(x))
    np.testing.assert_array_equal(*values)


@pytest.mark.parametrize("name", ["rms norm", "layer norm"])
def test_a_norm_keeps_its_16_bit_input_and_a_float32_of_each_row(name):
    layer = make(name, "mixed_bfloat16", faster=True)
    shape = CASES[name][2]
    bounds = []

    @tf.function
    def step(x, upstream):
        graph = tf.compat.v1.get_default_graph()
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        bounds.append(len(graph.get_operations()))
        return tape.gradient(y, x, upstream)

    spec = tf.TensorSpec(shape, "bfloat16")
    operations = step.get_concrete_function(spec, spec).graph.get_operations()
    forward = operations[: bounds[-1]]
    kept = {
        tensor.name: tensor
        for op in operations[bounds[-1] :]
        for tensor in op.inputs
        if tensor.op in forward and tensor.shape.rank == len(shape)
    }
    large = [each for each in kept.values() if each.shape == shape]
    assert {each.dtype for each in large} == {tf.bfloat16}
    again = [
        op
        for op in operations[bounds[-1] :]
        if op.type == "Cast"
        and op.inputs[0].name in kept
        and not op.inputs[0].name.startswith("upstream")
    ]
    # Else it would be merged with the cast of the forward pass, and kept.
    assert again
    assert all(op.control_inputs for op in again)
    assert all(each.shape[-1] in (1, shape[-1]) for each in kept.values())


def small_network():
    inputs = keras.Input((4, 4, 3))
    x = layers.Conv2D(8, 1)(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.Conv2D(8, 1, strides=2, activation="gelu")(x)
    x = layers.LayerNormalization()(x)
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(3)(layers.RMSNormalization()(x))
    return keras.Model(inputs, outputs)


def trained(strategy, *, faster, **options):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = small_network()
        if faster:
            assert len(tfamp.optimize(model)) == 5
        model.compile(
            tfamp.wrap_optimizer(keras.optimizers.SGD(0.1, momentum=0.9)),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            auto_scale_loss=False,
        )
    random = np.random.default_rng(0)
    x = random.normal(size=(32, 4, 4, 3)).astype("float32")
    y = random.integers(0, 3, 32)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    tfamp.fit(model, dataset, verbose=0, **options)
    return model.get_weights()


@pytest.mark.slow
def test_training_on_two_replicas_ends_with_the_same_weights(mirrored):
    options = {"microbatches": 2}
    fast = trained(mirrored(2), faster=True, **options)
    stock = trained(mirrored(2), faster=False, **options)
    for one, other in zip(fast, stock, strict=True):
        np.testing.assert_allclose(one, other, **FLOAT32_ROUNDING)
