"""The kernels update weights as Keras does, and are used where they can be."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import FLOAT32_ROUNDING

FUSED = {
    "adam": lambda **o: keras.optimizers.Adam(0.05, beta_2=0.9, **o),
    "adamw": lambda **o: keras.optimizers.AdamW(0.05, weight_decay=0.5, **o),
    "sgd": lambda **o: keras.optimizers.SGD(0.1, **o),
    "sgd with decay": lambda **o: keras.optimizers.SGD(
        0.1, weight_decay=0.5, **o
    ),
    "momentum": lambda **o: keras.optimizers.SGD(0.1, momentum=0.9, **o),
    "nesterov": lambda **o: keras.optimizers.SGD(
        0.1, momentum=0.9, nesterov=True, **o
    ),
}
KERNELS = {
    "ResourceApplyAdam",
    "ResourceApplyKerasMomentum",
    "ResourceApplyGradientDescent",
}


class OwnUpdate(keras.optimizers.SGD):
    """Moves each weight by 1, whatever the gradient."""

    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, tf.ones_like(gradient))


def variable(values, dtype="float32", name="kernel"):
    return keras.Variable(np.array(values), dtype=dtype, name=name)


def kernels(optimizer, variables, gradients):
    """How many fused kernels the update of these variables takes."""

    @tf.function
    def apply():
        optimizer.apply(gradients, variables)

    optimizer.build(variables)
    graph = apply.get_concrete_function().graph.as_graph_def()
    nodes = [node for each in graph.library.function for node in each.node_def]
    return sum(node.op in KERNELS for node in nodes)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FUSED)
def test_a_fused_update_is_kerass_own_to_rounding(name, dtype):
    generator = np.random.default_rng(0)
    start = generator.normal(size=[5, 3])
    bare, fused = variable(start, dtype), variable(start, dtype)
    keras_optimizer = FUSED[name]()
    keras_optimizer.build([bare])
    optimizer = tfamp.LossScaleOptimizer(
        FUSED[name](), initial_scale=1.0, dynamic=False
    )
    assert kernels(optimizer, [fused], [tf.zeros([5, 3], dtype)]) == 1
    fused.assign(start)
    for _ in range(4):
        gradient = tf.constant(generator.normal(size=[5, 3]), dtype)
        keras_optimizer.apply([gradient], [bare])
        optimizer.apply([gradient], [fused])
        np.testing.assert_allclose(
            fused.numpy(), bare.numpy(), **FLOAT32_ROUNDING
        )
    for ours, theirs in zip(
        optimizer.inner_optimizer.variables,
        keras_optimizer.variables,
        strict=True,
    ):
        np.testing.assert_allclose(
            ours.numpy(), theirs.numpy(), **FLOAT32_ROUNDING
        )


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_a_fused_step_of_adam_is_as_long_as_kerass(kind):
    bare, fused = variable([0.0]), variable([0.0])
    make = getattr(keras.optimizers, kind)
    optimizers = [make(1.0), tfamp.LossScaleOptimizer(make(1.0))]
    for optimizer, each in zip(optimizers, (bare, fused), strict=True):
        optimizer.build([each])

    @tf.function
    def apply(gradient):
        optimizers[0].apply([gradient], [bare])
        optimizers[1].apply([gradient * 2.0**16], [fused])

    generator = np.random.default_rng(0)
    before = np.zeros([1]), np.zeros([1])
    for _ in range(40):
        apply(tf.constant(generator.normal(size=[1]), tf.float32))
        now = bare.numpy(), fused.numpy()
        # With 1 - 0.999 in float32 the first would differ by 2e-5.
        steps = np.subtract(now, before)
        np.testing.assert_allclose(steps[1], steps[0], rtol=2e-6, atol=1e-6)
        before = now


def test_the_learning_rate_follows_its_schedule():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [1], [1.0, 0.25]
    )
    weight = variable([8.0])
    optimizer = tfamp.LossScaleOptimizer(keras.optimizers.SGD(schedule))
    optimizer.build([weight])

    @tf.function
    def apply():
        optimizer.apply([tf.constant([65536.0])], [weight])

    values = []
    for _ in range(3):
        apply()
        values.append(weight.numpy().item())
    assert values == [7.0, 6.0, 5.75]


def test_weights_that_are_spared_decay_not_at_all():
    kernel, bias = variable([8.0]), variable([8.0], name="bias")
    inner = keras.optimizers.AdamW(0.5, weight_decay=0.5)
    inner.exclude_from_weight_decay(var_names=["bias"])
    optimizer = tfamp.LossScaleOptimizer(inner)
    optimizer.build([kernel, bias])
    zero = tf.zeros([1])
    optimizer.apply([zero, zero], [kernel, bias])
    assert kernel.numpy() == 6.0
    assert bias.numpy() == 8.0


@pytest.mark.parametrize(
    "inner",
    [
        keras.optimizers.Adam(amsgrad=True),
        keras.optimizers.Lion(),
        OwnUpdate(0.5),
    ],
    ids=["amsgrad", "Lion", "an update of its own"],
)
def test_optimizers_without_a_kernel_update_as_they_do(inner):
    optimizer = tfamp.LossScaleOptimizer(inner)
    weight = variable([8.0, 4.0])
    assert kernels(optimizer, [weight], [tf.constant([65536.0, 0.0])]) == 0
    optimizer.apply([tf.constant([65536.0, 0.0])], [weight])
    if isinstance(inner, OwnUpdate):
        np.testing.assert_array_equal(weight.numpy(), [7.0, 3.0])
    else:
        assert weight.numpy()[0] < 8.0


def test_sparse_gradients_and_16_bit_weights_are_left_to_keras():
    table, narrow, kernel = (
        variable([[1.0], [2.0], [4.0]]),
        variable([1.0], "bfloat16"),
        variable([1.0]),
    )
    optimizer = tfamp.LossScaleOptimizer(
        keras.optimizers.SGD(1.0), initial_scale=1.0, dynamic=False
    )
    variables = [table, narrow, kernel]
    row = tf.IndexedSlices(tf.constant([[1.0]]), tf.constant([1]), [3, 1])
    gradients = [row, tf.ones([1], tf.bfloat16), tf.ones([1])]
    assert kernels(optimizer, variables, gradients) == 1
    optimizer.apply(gradients, variables)
    np.testing.assert_array_equal(table.numpy(), [[1.0], [1.0], [4.0]])
    assert float(narrow.numpy()[0]) == 0.0
    assert kernel.numpy() == 0.0


def test_each_optimizer_of_several_has_its_kernels():
    inner = keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            keras.optimizers.SGD(1.0), {"moved": keras.optimizers.Adam(0.5)}
        )
    )
    optimizer = tfamp.LossScaleOptimizer(inner)
    variables = [variable([8.0]), variable([8.0], name="moved")]
    ones = [tf.constant([65536.0])] * 2
    assert kernels(optimizer, variables, ones) == 2
    optimizer.apply(ones, variables)
    assert variables[0].numpy() == 7.0
    np.testing.assert_allclose(variables[1].numpy(), 7.5, rtol=1e-6)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_gradients_with_no_finite_norm_are_skipped(clip_norm):
    weight = variable([0.0])
    optimizer = tfamp.LossScaleOptimizer(
        keras.optimizers.SGD(1.0, global_clipnorm=clip_norm),
        initial_scale=1.0,
        dynamic=False,
    )
    optimizer.build([weight])
    optimizer.apply([tf.constant([1e25])], [weight])
    assert weight.numpy() == 0.0
    assert int(optimizer.skipped_steps.numpy()) == 1


def test_a_norm_below_the_threshold_changes_no_bit():
    gradient = np.float32([0.1, 0.2, 0.3])
    weight = variable([0.0, 0.0, 0.0])
    optimizer = tfamp.LossScaleOptimizer(
        keras.optimizers.SGD(1.0, global_clipnorm=3.0)
    )
    optimizer.build([weight])
    optimizer.apply([tf.constant(gradient * 65536)], [weight])
    np.testing.assert_array_equal(weight.numpy(), -gradient)


@pytest.mark.parametrize(("size", "count"), [(8, 1), (1280, 0), (65536, 1)])
def test_on_a_cpu_adams_kernel_is_not_used_where_it_is_slow(size, count):
    optimizer = tfamp.LossScaleOptimizer(keras.optimizers.Adam(0.5))
    weight = variable(np.full([size], 8.0))
    assert kernels(optimizer, [weight], [tf.fill([size], 65536.0)]) == count
    optimizer.apply([tf.fill([size], 65536.0)], [weight])
    np.testing.assert_allclose(weight.numpy(), 7.5, rtol=1e-6)
