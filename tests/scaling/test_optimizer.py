"""Every Keras optimizer trains under loss scaling as it does without."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import FLOAT32_ROUNDING, MUON_WORKS

SCALE = 2.0**16
ROWS = 8

OPTIMIZERS = {
    "sgd": lambda **o: keras.optimizers.SGD(0.1, momentum=0.9, **o),
    "nesterov": lambda **o: keras.optimizers.SGD(
        0.1, momentum=0.9, nesterov=True, **o
    ),
    "adam": lambda **o: keras.optimizers.Adam(0.05, **o),
    "adamw": lambda **o: keras.optimizers.AdamW(0.05, weight_decay=0.1, **o),
    "lion": lambda **o: keras.optimizers.Lion(0.01, **o),
    "adafactor": lambda **o: keras.optimizers.Adafactor(0.05, **o),
    "muon": lambda **o: keras.optimizers.Muon(0.05, **o),
}
if not MUON_WORKS:
    del OPTIMIZERS["muon"]
OPTIONS = {
    "plain": {},
    "clipnorm": {"clipnorm": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "clipvalue": {"clipvalue": 0.01},
    "ema": {"use_ema": True, "ema_momentum": 0.5},
    "ema_overwrite": {
        "use_ema": True,
        "ema_momentum": 0.5,
        "ema_overwrite_frequency": 2,
    },
}


def build_weights():
    """A matrix, a bias, one with a constraint, and one that nothing uses."""
    generator = np.random.default_rng(1)
    shapes = {"kernel": (3, 4), "bias": (4,), "bounded": (4, 2)}
    weights = [
        keras.Variable(
            generator.normal(size=shape).astype("float32"), name=name
        )
        for name, shape in shapes.items()
    ]
    weights[2].constraint = keras.constraints.MaxNorm(0.8)
    return weights


def mean_loss(weights, x):
    kernel, bias, bounded = (weight.value for weight in weights)
    return tf.reduce_mean((tf.nn.relu(x @ kernel + bias) @ bounded - 1.0) ** 2)


def inputs(steps=4):
    generator = np.random.default_rng(2)
    return generator.normal(size=(steps, ROWS, 3)).astype("float32")


def train_bare(make_optimizer, batches):
    """The truth: the inner optimizer alone, on the whole batch, one device."""
    weights = build_weights()
    optimizer = make_optimizer()
    optimizer.build(weights)
    for x in batches:
        with tf.GradientTape() as tape:
            loss = mean_loss(weights, tf.constant(x))
        optimizer.apply(
            tape.gradient(loss, [w.value for w in weights]), weights
        )
    return [weight.numpy() for weight in weights]


def train_scaled(make_optimizer, batches, strategy, compiled=tf.function):
    with strategy.scope():
        weights = build_weights()
        optimizer = tfamp.LossScaleOptimizer(make_optimizer(), SCALE)
        optimizer.build(weights)
    replicas = strategy.num_replicas_in_sync

    @compiled
    def run(x):
        def step():
            context = tf.distribute.get_replica_context()
            rows = ROWS // replicas
            mine = x[context.replica_id_in_sync_group * rows :][:rows]
            _, gradients = tfamp.value_and_gradients(
                lambda: mean_loss(weights, mine), weights, optimizer
            )
            optimizer.apply(gradients, weights)

        strategy.run(step)

    for x in batches:
        run(tf.constant(x))
    assert int(optimizer.skipped_steps.numpy()) == 0
    assert int(optimizer.iterations.numpy()) == len(batches)
    return [
        [v.numpy() for v in strategy.experimental_local_results(weight.value)]
        for weight in weights
    ]


def assert_trains_alike(make_optimizer, strategy, compiled=tf.function):
    expected = train_bare(make_optimizer, inputs())
    trained = train_scaled(make_optimizer, inputs(), strategy, compiled)
    for values, truth in zip(trained, expected, strict=True):
        for value in values:
            np.testing.assert_array_equal(value, values[0])
        # Adam's first steps divide a gradient by its own size.
        np.testing.assert_allclose(values[0], truth, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scaling_and_replicas_change_no_optimizers_weights(name, strategy):
    assert_trains_alike(OPTIMIZERS[name], strategy)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("replicas", [1, 2])
def test_clipping_and_averages_see_the_true_global_gradient(
    options, replicas, mirrored
):
    def make():
        return OPTIMIZERS["sgd"](**OPTIONS[options])

    assert_trains_alike(make, mirrored(replicas))


def test_options_hold_with_moments_too(mirrored):
    def make():
        optimizer = OPTIMIZERS["adamw"](
            global_clipnorm=0.1, **OPTIONS["ema_overwrite"]
        )
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        return optimizer

    assert_trains_alike(make, mirrored(2))


@pytest.mark.parametrize(
    "name", [name for name in ("adamw", "muon") if name in OPTIMIZERS]
)
def test_eager_steps_are_those_of_a_graph(name, mirrored):
    assert_trains_alike(
        OPTIMIZERS[name], mirrored(2), compiled=lambda function: function
    )


def multi_optimizer():
    return keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            OPTIMIZERS["sgd"](**OPTIONS["ema_overwrite"]),
            {
                "bias": OPTIMIZERS["adam"](use_ema=True, clipnorm=0.1),
                # Gets no variable, so that it is never built.
                "absent": OPTIMIZERS["adam"](use_ema=True),
            },
        )
    )


@pytest.mark.parametrize("name", ["get_scaled_loss", "get_unscaled_gradients"])
def test_methods_of_old_guides_say_what_to_write_instead(name):
    optimizer = tfamp.wrap_optimizer("sgd")
    with pytest.raises(tfamp.InputError, match=rf"{name} is gone.*write loss"):
        getattr(optimizer, name)(1.0)


@pytest.mark.parametrize("replicas", [1, 2])
def test_several_inner_optimizers_train_side_by_side(replicas, mirrored):
    assert_trains_alike(multi_optimizer, mirrored(replicas))


@pytest.mark.parametrize(
    "make",
    [lambda: OPTIMIZERS["sgd"](**OPTIONS["ema"]), multi_optimizer],
    ids=["one", "several"],
)
def test_finalizing_leaves_the_averages_as_weights(make):
    results = []
    for wrap in (lambda inner: inner, tfamp.LossScaleOptimizer):
        weights = build_weights()
        optimizer = wrap(make())
        optimizer.build(weights)
        for x in inputs():
            _, gradients = tfamp.value_and_gradients(
                lambda x=x, w=weights: mean_loss(w, tf.constant(x)),
                weights,
                optimizer,
            )
            optimizer.apply(gradients, weights)
        before = [weight.numpy() for weight in weights]
        optimizer.finalize_variable_values(weights)
        after = [weight.numpy() for weight in weights]
        assert not all(map(np.array_equal, before, after))
        results.append(after)
    for bare, scaled in zip(*results, strict=True):
        np.testing.assert_allclose(scaled, bare, **FLOAT32_ROUNDING)


def test_variables_without_gradient_stay_as_they_were(strategy):
    with strategy.scope():
        used, unused = keras.Variable([1.0]), keras.Variable([1.0])
        optimizer = tfamp.LossScaleOptimizer(keras.optimizers.SGD(0.5))
        optimizer.build([used, unused])

    @tf.function
    def run():
        strategy.run(
            lambda: optimizer.apply(
                [tf.constant([SCALE]), None], [used, unused]
            )
        )

    with pytest.warns(UserWarning, match="Gradients do not exist"):
        run()
    replicas = strategy.num_replicas_in_sync
    np.testing.assert_array_equal(used.numpy(), [1 - 0.5 * replicas])
    np.testing.assert_array_equal(unused.numpy(), [1.0])


def test_some_of_the_variables_may_be_trained_alone():
    first, second = keras.Variable([1.0]), keras.Variable([1.0])
    optimizer = tfamp.LossScaleOptimizer(keras.optimizers.Adam(0.5))
    optimizer.build([first, second])
    optimizer.apply([tf.constant([SCALE])], [second])
    assert float(first.numpy()[0]) == 1.0
    assert float(second.numpy()[0]) == pytest.approx(0.5, rel=1e-4)


def test_a_variable_it_was_not_built_with_is_refused():
    optimizer = tfamp.LossScaleOptimizer(keras.optimizers.SGD())
    optimizer.build([keras.Variable([1.0])])
    with pytest.raises(ValueError, match="Unknown variable"):
        optimizer.apply([tf.constant([1.0])], [keras.Variable([1.0])])


class SeesGradients(keras.optimizers.SGD):
    """SGD that remembers what it was given."""

    def update_step(self, gradient, variable, learning_rate):
        self.seen = gradient
        super().update_step(gradient, variable, learning_rate)


@pytest.mark.parametrize("replicas", [1, 2])
def test_sparse_gradients_train_as_dense_ones_and_stay_sparse(
    replicas, mirrored
):
    strategy = mirrored(replicas)
    start = np.arange(20, dtype="float32").reshape(-1, 2) / 1000
    with strategy.scope():
        table = keras.Variable(start)
        optimizer = tfamp.LossScaleOptimizer(
            SeesGradients(1.0, clipnorm=1e9), SCALE
        )
        optimizer.build([table])
    # Row 3 occurs twice on a replica, and on every replica.
    rows = tf.constant([3, 5, 3, 9])

    @tf.function
    def run():
        def step():
            _, gradients = tfamp.value_and_gradients(
                lambda: tf.reduce_sum(tf.gather(table.value, rows) ** 2),
                [table],
                optimizer,
                reduction="sum",
            )
            assert isinstance(gradients[0], tf.IndexedSlices)
            optimizer.apply(gradients, [table])

        strategy.run(step)

    run()
    # What was dense once cannot have become sparse again.
    assert isinstance(optimizer.inner_optimizer.seen, tf.IndexedSlices)
    expected = start.copy()
    for row, times in {3: 2, 5: 1, 9: 1}.items():
        expected[row] -= times * replicas * 2 * start[row]
    np.testing.assert_array_equal(table.numpy(), expected)


@pytest.mark.parametrize("option", ["clipnorm", "global_clipnorm"])
def test_norms_of_sparse_gradients_are_those_of_dense_ones(option):
    results = []
    for is_sparse in (True, False):
        table = keras.Variable(np.ones((4, 2), "float32"))
        optimizer = tfamp.LossScaleOptimizer(
            keras.optimizers.SGD(1.0, **{option: 1.0}), SCALE
        )
        optimizer.build([table])
        gradient = tf.IndexedSlices(
            tf.fill([3, 2], SCALE), tf.constant([1, 1, 2]), tf.constant([4, 2])
        )
        if not is_sparse:
            gradient = tf.convert_to_tensor(gradient)
        optimizer.apply([gradient], [table])
        results.append(table.numpy())
    np.testing.assert_allclose(*results, **FLOAT32_ROUNDING)
    # Rows of 2 and 1, twice: the norm is the root of 10.
    assert results[0][1, 0] == pytest.approx(1 - 2 / 10**0.5)


@pytest.mark.parametrize("name", ["adam", "adafactor", "lion"])
def test_moments_of_sparse_gradients_are_those_of_dense_ones(name):
    results = []
    for is_sparse in (True, False):
        table = keras.Variable(np.ones((4, 2), "float32"))
        optimizer = tfamp.LossScaleOptimizer(OPTIMIZERS[name](), SCALE)
        optimizer.build([table])
        for _ in range(3):
            gradient = tf.IndexedSlices(
                tf.fill([3, 2], SCALE),
                tf.constant([1, 1, 2]),
                tf.constant([4, 2]),
            )
            if not is_sparse:
                gradient = tf.convert_to_tensor(gradient)
            optimizer.apply([gradient], [table])
        results.append(table.numpy())
    np.testing.assert_allclose(*results, **FLOAT32_ROUNDING)


def float8_model(strategy):
    keras.config.set_dtype_policy("mixed_bfloat16")
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(8)]
        )
        # All at once would warn of the input layer.
        for layer in model.layers:
            layer.quantize("float8")
        model.compile(
            tfamp.LossScaleOptimizer(keras.optimizers.SGD(2.0**-20), SCALE),
            loss="mse",
        )
    return model


def float8_state(model):
    """Per variable that is overwritten with its gradient: all replicas'."""
    local = model.distribute_strategy.experimental_local_results
    return {
        variable.path: [value.numpy() for value in local(variable.value)]
        for variable in model.trainable_variables
        if getattr(variable, "overwrite_with_gradient", False)
    }


@pytest.mark.slow
def test_float8_scales_agree_by_the_largest_and_a_skip_keeps_them(mirrored):
    # The rows of the second replica hold the largest input.
    x = np.ones((4, 4), "float32")
    x[3, 0] = 7.0
    y = np.zeros((4, 8), "float32")
    states = []
    for replicas in (1, 2):
        keras.utils.set_random_seed(0)
        model = float8_model(mirrored(replicas))
        dataset = tf.data.Dataset.from_tensors((x, y))
        tfamp.fit(model, dataset, verbose=0)
        assert int(model.optimizer.skipped_steps.numpy()) == 0
        states.append(float8_state(model))
    assert len(states[0]) == 12
    for (path, one), two in zip(
        states[0].items(), states[1].values(), strict=True
    ):
        np.testing.assert_array_equal(two[0], two[1], err_msg=path)
        if "inputs" in path or "kernel" in path:
            # What the forward pass saw is the same; never times the scale.
            np.testing.assert_array_equal(two[0], one[0], err_msg=path)
    histories = [v for path, v in states[1].items() if "inputs_amax" in path]
    assert float(histories[0][0].max()) == 7.0

    x[3, 0] = np.inf
    tfamp.fit(
        model,
        tf.data.Dataset.from_tensors((x, y)),
        verbose=0,
        on_overflow="ignore",
    )
    assert int(model.optimizer.skipped_steps.numpy()) == 1
    for path, values in float8_state(model).items():
        for value, before in zip(values, states[1][path], strict=True):
            np.testing.assert_array_equal(value, before, err_msg=path)


def test_arrays_are_gradients_as_for_keras():
    optimizer = tfamp.LossScaleOptimizer(
        keras.optimizers.SGD(1.0), initial_scale=4.0
    )
    weight = keras.Variable([1.0])
    optimizer.apply([np.array([2.0], "float32")], [weight])
    np.testing.assert_array_equal(weight, [1 - 2 / 4])
