"""Every kind of Keras model trains with `tfamp.fit` as with `Model.fit`."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfamp
from tests.conftest import first_always, mostly_slow
from tfamp.step import build

ROWS, BATCH = 22, 8
OURS = {
    "loss_scale",
    "skipped_steps",
    "examples_per_second",
    "step_milliseconds",
}


def data(rows=ROWS):
    generator = np.random.default_rng(3)
    x = generator.normal(size=(rows, 4)).astype("float32")
    return x, generator.integers(0, 3, rows)


def batched(*parts, batch_size=BATCH):
    parts = parts or data()
    return tf.data.Dataset.from_tensor_slices(parts).batch(batch_size)


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def functional(**options):
    inputs = keras.Input((4,))
    hidden = layers.Dense(5, activation="tanh")(inputs)
    model = keras.Model(inputs, layers.Dense(3, dtype="float32")(hidden))
    compile_classifier(model, **options)
    return model, batched()


def compile_classifier(model, **options):
    options = {"optimizer": keras.optimizers.Adam(0.02)} | options
    model.compile(loss=cross_entropy(), metrics=["accuracy"], **options)


def sequential_never_built():
    model = keras.Sequential(
        [layers.Dense(5, activation="tanh"), layers.Dense(3)]
    )
    compile_classifier(model)
    return model, batched()


class WithoutTrainingArgument(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(5, activation="tanh")
        self.head = layers.Dense(3)

    def call(self, x):
        return self.head(self.hidden(x))


def subclassed_never_built():
    model = WithoutTrainingArgument()
    compile_classifier(model)
    return model, batched()


def several_inputs_and_outputs():
    inputs = {
        "a": keras.Input((4,), name="a"),
        "b": keras.Input((4,), name="b"),
    }
    hidden = layers.Concatenate()([inputs["a"], inputs["b"]])
    outputs = {
        "kind": layers.Dense(3, name="kind")(hidden),
        "size": layers.Dense(1, name="size")(hidden),
    }
    model = keras.Model(inputs, outputs)
    model.compile(
        keras.optimizers.Adam(0.02),
        loss={"kind": cross_entropy(), "size": "mse"},
        loss_weights={"kind": 1.0, "size": 0.25},
        metrics={"kind": ["accuracy"], "size": ["mae"]},
    )
    x, y = data()
    return model, batched(
        {"a": x, "b": -x}, {"kind": y, "size": x[:, :1].copy()}
    )


class AddsLoss(layers.Layer):
    def call(self, x):
        self.add_loss(1e-2 * keras.ops.mean(keras.ops.square(x)))
        return x


def additional_losses():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, kernel_regularizer="l2", activity_regularizer="l1"),
            AddsLoss(),
            layers.Dense(3),
        ]
    )
    compile_classifier(model)
    return model, batched()


def masked_sequences():
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(7, 3, mask_zero=True),
            layers.LSTM(4, return_sequences=True),
            layers.Dense(3),
        ]
    )
    # SGD: the second moments of Keras's Adam are not those of the gradient
    # where rows of an embedding occur twice in a batch. Those of tfamp are.
    compile_classifier(model, optimizer=keras.optimizers.SGD(0.5))
    generator = np.random.default_rng(5)
    tokens = generator.integers(0, 7, (ROWS, 5)).astype("int32")
    return model, batched(tokens, generator.integers(0, 3, (ROWS, 5)))


def weighted_samples():
    model, _ = functional()
    model.compile("sgd", cross_entropy(), weighted_metrics=["accuracy"])
    return model, batched(*data(), np.linspace(0, 2, ROWS, dtype="float32"))


class OwnLossAndMetrics(keras.Model):
    def compute_loss(self, x, y, y_pred, sample_weight=None):
        return keras.ops.mean(keras.ops.square(y_pred - x[:, :3]))

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        results = super().compute_metrics(x, y, y_pred, sample_weight)
        return results | {"largest": keras.ops.max(y_pred)}


def overridden_loss_and_metrics():
    inputs = keras.Input((4,))
    model = OwnLossAndMetrics(inputs, layers.Dense(3)(inputs))
    model.compile(keras.optimizers.Adam(0.02))
    return model, batched()


def targets_of_none():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), AddsLoss()])
    model.compile("sgd")
    return model, batched(data()[0]).map(lambda x: (x, None))


def ragged_inputs():
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            layers.Embedding(5, 3),
            layers.GlobalAveragePooling1D(),
            layers.Dense(3),
        ]
    )
    compile_classifier(model, optimizer=keras.optimizers.SGD(0.5))
    rows = tf.ragged.range(tf.constant([1, 3, 2, 4] * 4))
    return model, batched(tf.cast(rows, tf.int32), data(16)[1])


def random_layers():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.GaussianNoise(0.5, seed=1),
            layers.BatchNormalization(),
            layers.Dropout(0.5, seed=2),
            layers.Dense(3),
        ]
    )
    compile_classifier(model)
    return model, batched()


BUILDERS = [
    functional,
    sequential_never_built,
    subclassed_never_built,
    several_inputs_and_outputs,
    additional_losses,
    masked_sequences,
    weighted_samples,
    overridden_loss_and_metrics,
    targets_of_none,
    ragged_inputs,
    random_layers,
]


def train_as_keras(builder, **options):
    keras.utils.set_random_seed(1)
    model, dataset = builder()
    history = model.fit(dataset, verbose=0, shuffle=False, **options)
    return model, history.history


@pytest.mark.parametrize(
    "builder",
    mostly_slow(
        BUILDERS,
        always=[
            *(several_inputs_and_outputs, weighted_samples),
        ],
    ),
)
def test_history_and_weights_are_those_of_keras(builder):
    reference, expected = train_as_keras(builder, epochs=2)
    keras.utils.set_random_seed(1)
    model, dataset = builder()
    history = tfamp.fit(model, dataset, epochs=2, verbose=0).history
    assert set(history) == set(expected) | OURS
    for name, values in expected.items():
        np.testing.assert_allclose(
            history[name], values, rtol=2e-5, atol=1e-6, err_msg=name
        )
    for one, other in zip(
        model.get_weights(), reference.get_weights(), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "builder",
    first_always(
        [
            functional,
            several_inputs_and_outputs,
            weighted_samples,
            ragged_inputs,
        ],
        2,
    ),
)
def test_evaluation_is_that_of_keras_on_two_replicas_too(builder, mirrored):
    model, dataset = builder()
    expected = model.evaluate(dataset, verbose=0, return_dict=True)
    with mirrored(2).scope():
        twin, _ = builder()
    twin.set_weights(model.get_weights())
    for results in (
        tfamp.evaluate(model, dataset),
        tfamp.evaluate(twin, dataset),
    ):
        assert set(results) == set(expected)
        for name in expected:
            # Keras averages the losses of single outputs over batches.
            if name.endswith("_loss"):
                continue
            assert results[name] == pytest.approx(expected[name], rel=1e-4), (
                name
            )


@pytest.mark.slow
@pytest.mark.parametrize("rows", mostly_slow([1, 3, 9], always=[9]))
def test_evaluation_counts_every_row_once(rows, strategy):
    x = np.arange(1, rows + 1, dtype="float32")[:, None]
    with strategy.scope():
        model = keras.Sequential([keras.Input((1,)), layers.Identity()])
        model.compile(loss="mae", metrics=["mae"])
    for batch_size in (1, 4, 16):
        dataset = batched(x, np.zeros_like(x), batch_size=batch_size)
        results = tfamp.evaluate(model, dataset)
        assert results["loss"] == pytest.approx((rows + 1) / 2)
        assert results["mae"] == pytest.approx((rows + 1) / 2)


def test_evaluation_stops_after_so_many_batches():
    model, dataset = functional()
    assert tfamp.evaluate(model, dataset.repeat(), steps=2) == pytest.approx(
        tfamp.evaluate(model, dataset.take(2))
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision",
    mostly_slow(["mixed_float16", "mixed_bfloat16"], always=["mixed_float16"]),
)
def test_losses_of_16_bit_layers_are_added_in_float32(precision, mirrored):
    with tfamp.precision_scope(precision), mirrored(2).scope():
        model, dataset = additional_losses()
    history = tfamp.fit(model, dataset, validation_data=dataset, verbose=0)
    assert np.isfinite(history.history["loss"][0])
    assert np.isfinite(history.history["val_loss"][0])


@pytest.mark.slow
def test_statistics_of_replicas_become_their_mean(mirrored):
    x, y = data(8)
    with mirrored(2).scope():
        model = keras.Sequential(
            [keras.Input((4,)), layers.BatchNormalization(), layers.Dense(3)]
        )
        compile_classifier(model)
    tfamp.fit(model, batched(x, y), verbose=0)
    means = [
        value.numpy()
        for value in mirrored(2).experimental_local_results(
            model.layers[0].moving_mean.value
        )
    ]
    np.testing.assert_array_equal(*means)
    # Halves of one batch: the mean of their means is the batch's.
    np.testing.assert_allclose(means[0], 0.01 * x.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("replicas", mostly_slow([1, 2], always=[1]))
def test_a_batch_of_nan_is_skipped_and_leaves_no_trace(replicas, mirrored):
    x, y = data(24)
    poisoned = x.copy()
    poisoned[9, 1] = np.nan
    models = []
    # Without the batch, and with it made NaN.
    for dataset in (
        batched(np.delete(x, slice(8, 16), 0), np.delete(y, slice(8, 16))),
        batched(poisoned, y),
    ):
        keras.utils.set_random_seed(1)
        with mirrored(replicas).scope():
            model = keras.Sequential(
                [
                    keras.Input((4,)),
                    layers.BatchNormalization(),
                    layers.Dense(3),
                ]
            )
            compile_classifier(model)
        history = tfamp.fit(model, dataset, epochs=2, verbose=0).history
        models.append(model)
    assert history["skipped_steps"] == [1, 1]
    assert np.isfinite(history["loss"]).all()
    for clean, skipped in zip(
        models[0].get_weights(), models[1].get_weights(), strict=True
    ):
        np.testing.assert_array_equal(clean, skipped)


def test_losses_of_single_outputs_leave_out_a_batch_of_nan():
    model, dataset = several_inputs_and_outputs()

    def poison(i, batch):
        x, y = batch
        return {"a": x["a"] * (np.nan if i == 1 else 1.0), "b": x["b"]}, y

    batches = [poison(i, batch) for i, batch in enumerate(dataset)]
    spoiled = tf.data.Dataset.from_generator(
        lambda: iter(batches), output_signature=dataset.element_spec
    )
    history = tfamp.fit(model, spoiled, verbose=0).history
    assert history["skipped_steps"] == [1]
    assert np.isfinite([values[0] for values in history.values()]).all()


def test_nothing_but_nan_ends_training_and_says_why():
    model, _ = functional()
    x, y = data()
    dataset = batched(x * np.nan, y).repeat()
    seen = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(logs["loss"])
    )
    with pytest.raises(tfamp.LossScaleError, match="inputs hold inf or NaN"):
        tfamp.fit(
            model,
            dataset,
            epochs=9,
            steps_per_epoch=5,
            callbacks=[watch],
            verbose=0,
        )
    assert len(seen) in (3, 4)
    assert np.isnan(seen).all()


class GAN(keras.Model):
    """Two networks, two optimizers, and no `call`."""

    def __init__(self, **options):
        super().__init__()
        with_input = [keras.Input((4,))]
        self.generator = keras.Sequential([*with_input, layers.Dense(4)])
        self.critic = keras.Sequential([*with_input, layers.Dense(1)])
        self.generator_loss = keras.metrics.Mean(name="generator_loss")
        self.compile(optimizer=None)
        self.generator_optimizer = tfamp.LossScaleOptimizer(
            keras.optimizers.Adam(0.01), initial_scale=2.0**4
        )
        self.critic_optimizer = tfamp.LossScaleOptimizer(
            keras.optimizers.Adam(0.01), initial_scale=2.0**8
        )
        self.generator_optimizer.build(self.generator.trainable_variables)
        self.critic_optimizer.build(self.critic.trainable_variables)

    def train_step(self, data):
        x, noise = data

        def generator_loss():
            return keras.ops.mean(-self.critic(self.generator(noise)))

        def critic_loss():
            made = keras.ops.mean(self.critic(self.generator(noise)))
            return made - keras.ops.mean(self.critic(x))

        losses = []
        for loss_fn, part, optimizer in (
            (generator_loss, self.generator, self.generator_optimizer),
            (critic_loss, self.critic, self.critic_optimizer),
        ):
            weights = part.trainable_variables
            loss, gradients = tfamp.value_and_gradients(
                loss_fn, weights, optimizer
            )
            optimizer.apply(gradients, weights)
            losses.append(loss)
        self.generator_loss.update_state(losses[0])
        return {
            "generator_loss": self.generator_loss.result(),
            "critic_loss": losses[1],
        }


@pytest.mark.parametrize("replicas", mostly_slow([1, 2], always=[1]))
def test_two_optimizers_of_a_gan_overflow_apart(replicas, mirrored):
    with mirrored(replicas).scope():
        model = GAN()
    x, _ = data(8)
    before = model.critic.get_weights(), model.generator.get_weights()
    x[5] = np.inf
    history = tfamp.fit(
        model, batched(x, np.ones_like(x)), verbose=0, on_overflow="ignore"
    ).history
    # Real rows reach the critic's loss alone.
    for one, other in zip(model.critic.get_weights(), before[0], strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(model.generator.get_weights()[0], before[1][0])
    assert history["loss_scale_critic_optimizer"] == [2.0**7]
    assert history["loss_scale_generator_optimizer"] == [2.0**4]
    assert history["skipped_steps_critic_optimizer"] == [1]
    assert history["skipped_steps_generator_optimizer"] == [0]
    assert np.isfinite(history["generator_loss"][0])
    assert "critic_loss" in history
    assert "loss" not in history


@pytest.mark.slow
@pytest.mark.parametrize("replicas", mostly_slow([1, 2], always=[1]))
def test_models_run_eagerly_too(replicas, mirrored):
    histories = []
    for run_eagerly in (False, True):
        keras.utils.set_random_seed(1)
        with mirrored(replicas).scope():
            model, dataset = functional(run_eagerly=run_eagerly)
        histories.append(
            tfamp.fit(
                model, dataset, validation_data=dataset, verbose=0
            ).history
        )
    for name in ("loss", "accuracy", "val_loss"):
        assert histories[0][name] == pytest.approx(histories[1][name])


@pytest.mark.slow
def test_a_plain_or_stock_scaled_optimizer_is_made_safe(mirrored):
    for optimizer, auto_scale_loss in (
        (lambda: keras.optimizers.Adam(0.02), True),
        (
            lambda: keras.optimizers.LossScaleOptimizer(
                keras.optimizers.Adam(0.02)
            ),
            False,
        ),
    ):
        with tfamp.precision_scope("mixed_float16"), mirrored(2).scope():
            model, dataset = functional(
                optimizer=optimizer(), auto_scale_loss=auto_scale_loss
            )
        tfamp.fit(model, dataset, verbose=0)
        assert isinstance(model.optimizer, tfamp.LossScaleOptimizer)
        assert isinstance(
            model.optimizer.inner_optimizer, keras.optimizers.Adam
        )
        assert int(model.optimizer.iterations.numpy()) > 0
        assert model.optimizer.dynamic


def test_frozen_weights_are_not_reduced_at_the_end_of_an_epoch(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        frozen = keras.layers.Dense(8, dtype="bfloat16", trainable=False)
        # As Keras's own low-rank weights freeze a kernel: not the layer.
        adapted = keras.layers.Dense(8, use_bias=False)
        norm = keras.layers.BatchNormalization()
        model = keras.Sequential(
            [keras.Input((4,)), frozen, adapted, norm, keras.layers.Dense(1)]
        )
        adapted.kernel.trainable = False
        model.compile(tfamp.wrap_optimizer("sgd"), "mse")

    moved = build._statistics(model)

    expected = [norm.moving_mean.value, norm.moving_variance.value]
    assert [id(v) for v in moved] == [id(v) for v in expected]
