import dataclasses
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

import tfamp
from recipes import gan as recipe
from recipes.adversarial import logits_and_gradients
from recipes.data import pixels
from recipes.frechet import frechet_distance, known_distances
from tests.conftest import (
    FLOAT32_ROUNDING,
    first_always,
    mostly_long,
    mostly_slow,
)
from tests.recipes.published_data import EXAMPLES, write_metadata
from tfamp.precision.policy import PRECISIONS

NETWORKS = ("discriminator", "generator")


@pytest.fixture(scope="module")
def config(few_digits_dir):
    """Two steps of small networks."""
    return recipe.Config(
        precision="float32",
        data_dir=few_digits_dir,
        batch_size=32,
        epochs=1,
        steps_per_loop=1,
        latent_size=8,
        width=8,
    )


@pytest.fixture(scope="module")
def longer(config, digits_dir):
    """Enough to see a difference."""
    return dataclasses.replace(
        config,
        data_dir=digits_dir,
        batch_size=64,
        epochs=4,
        steps_per_loop=0,
        learning_rate=3e-3,
        ema_momentum=0.9,
    )


@pytest.fixture(scope="module")
def first_run(longer, tmp_path_factory):
    """The folder and the metrics of a run in float32."""
    folder = tmp_path_factory.mktemp("run")
    return folder, recipe.train(
        dataclasses.replace(longer, output_dir=str(folder))
    )


@pytest.fixture(scope="module")
def two_steps(config):
    """Metrics after two steps, of each precision and number of devices."""

    @functools.cache
    def run(precision, num_devices):
        return recipe.train(
            dataclasses.replace(
                config, precision=precision, num_devices=num_devices
            )
        )

    return run


@pytest.fixture
def batch(config):
    """Sixteen images and as much noise."""
    pairs = recipe.make_datasets(config)[0]
    return tuple(each[:16] for each in next(iter(pairs)))


def make(config, precision="mixed_float16", scale=2.0**8):
    """The same GAN each time, of which no loss scale overflows."""
    keras.utils.set_random_seed(0)
    with tfamp.precision_scope(precision):
        model = recipe.build_model(config)
    for name in NETWORKS:
        optimizer_of(model, name).dynamic_scale.assign(scale)
    return model


def optimizer_of(model, name):
    return getattr(model, f"{name}_optimizer")


def take_step(strategy, model, batch):
    """One step of a batch that the replicas share, not traced."""

    def share(context):
        replicas, replica = (
            context.num_replicas_in_sync,
            context.replica_id_in_sync_group,
        )
        return tuple(tf.split(each, replicas)[replica] for each in batch)

    shares = strategy.experimental_distribute_values_from_function(share)
    strategy.run(model.train_step, args=(shares,))


def state_of(model, name):
    """Weights of a network, and all that its optimizer holds."""
    variables = [
        *getattr(model, name).variables,
        *optimizer_of(model, name).variables,
    ]
    return [keras.ops.convert_to_numpy(variable) for variable in variables]


def assert_equal(states, others):
    for one, other in zip(states, others, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_training_comes_nearer_to_real_images(longer, first_run):
    train, real = pixels.load("digits", longer.data_dir, 0, 1).compared_images()
    known = known_distances(train, real)
    assert known["other real images"] < 1 < known["pixels of several"] / 5
    keras.utils.set_random_seed(longer.seed)
    untrained = recipe._samples(
        recipe.build_model(longer).generator, len(real), longer
    )
    _, results = first_run
    found = results["frechet_distance"]
    assert found < frechet_distance(untrained, real) / 2
    assert all(map(np.isfinite, results.values()))
    for name in NETWORKS:
        assert results[f"skipped_steps_{name}"] == 0
        assert results[f"loss_scale_{name}"] == 1


@pytest.mark.slow
def test_a_run_leaves_a_picture_of_samples(first_run):
    folder, _ = first_run
    picture = tf.io.decode_png((folder / "samples.png").read_bytes())
    # 64 images of 8 pixels with gaps of 2, 4 rows of 16, each pixel 4 by 4.
    assert picture.shape == (4 * (4 * 10 - 2), 4 * (16 * 10 - 2), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "num_devices"),
    mostly_long(
        [("mixed_bfloat16", 1), ("mixed_float16", 1), ("mixed_float16", 2)],
        always=[("mixed_bfloat16", 1)],
    ),
)
def test_two_steps_train_in_16_bits_and_on_two_replicas(
    two_steps, precision, num_devices
):
    results = two_steps(precision, num_devices)
    assert all(map(np.isfinite, results.values()))
    for name in NETWORKS:
        skips = results[f"skipped_steps_{name}"]
        is_scaled = precision == "mixed_float16"
        # Of two steps, one may find the first scale too large.
        assert skips <= is_scaled
        assert results[f"loss_scale_{name}"] == (
            2.0 ** (16 - skips) if is_scaled else 1
        )


@pytest.mark.slow
def test_a_seed_reproduces(config, two_steps):
    precision = "mixed_bfloat16"
    again = dataclasses.replace(config, precision=precision, num_devices=1)
    assert recipe.train(again) == two_steps(precision, 1)


@pytest.mark.parametrize(
    ("victim", "other"),
    mostly_slow([NETWORKS, NETWORKS[::-1]], always=[NETWORKS]),
)
def test_what_overflows_in_one_network_leaves_the_other_alone(
    config, batch, victim, other
):
    model = make(config)
    # Beyond what float16 holds of gradients that are means over 16 images.
    optimizer_of(model, victim).dynamic_scale.assign(2.0**24)
    before = getattr(model, victim).get_weights()
    # Where the victim does not move either, and for no reason of scales.
    reference = make(config)
    optimizer_of(reference, victim).learning_rate = 0.0

    for each in (model, reference):
        each.train_step(batch)

    optimizer = optimizer_of(model, victim)
    assert_equal(getattr(model, victim).get_weights(), before)
    assert float(optimizer.dynamic_scale.numpy()) == 2.0**23
    assert int(optimizer.skipped_steps.numpy()) == 1
    assert int(optimizer.iterations.numpy()) == 0
    # Of the other one every bit: weights, moments, averages, scale, counters.
    assert int(optimizer_of(reference, victim).skipped_steps.numpy()) == 0
    assert int(optimizer_of(model, other).iterations.numpy()) == 1
    assert_equal(state_of(model, other), state_of(reference, other))


@pytest.mark.slow
def test_an_overflow_on_one_replica_stops_the_discriminator_alone(
    config, batch, mirrored
):
    strategy = mirrored(2)
    with strategy.scope():
        model = make(config)
    before = model.discriminator.get_weights()
    untouched = model.generator.get_weights()[0]
    real, noise = batch
    # The first image alone: a single replica's.
    is_first = tf.range(16)[:, None, None, None] == 0
    take_step(strategy, model, (tf.where(is_first, np.inf, real), noise))

    assert_equal(model.discriminator.get_weights(), before)
    assert not np.array_equal(model.generator.get_weights()[0], untouched)
    for name, scale, skips in (
        ("discriminator", 2.0**7, 1),
        ("generator", 2.0**8, 0),
    ):
        optimizer = optimizer_of(model, name)
        assert float(optimizer.dynamic_scale.numpy()) == scale
        assert int(optimizer.skipped_steps.numpy()) == skips
    # The loss was inf, and no mean of losses is.
    assert all(map(np.isfinite, model.get_metrics_result().values()))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_penalty_of_a_linear_discriminator_is_that_of_its_weights(
    precision,
):
    with tfamp.precision_scope(precision):
        layer = keras.layers.Dense(1, use_bias=False)
        linear = keras.Sequential(
            [keras.Input([2, 2, 1]), keras.layers.Flatten(), layer]
        )
        # 2 * 4 * 65536 would be inf in float16.
        optimizer = tfamp.wrap_optimizer("sgd", initial_scale=2.0**8)
        optimizer.build(linear.trainable_variables)
    layer.kernel.assign([[1.0], [2.0], [-2.0], [4.0]])

    def mean_square():
        logits, squares = logits_and_gradients(linear, tf.ones([3, 2, 2, 1]))
        assert logits.dtype == squares.dtype == tf.float32
        np.testing.assert_array_equal(logits, np.full([3, 1], 5.0))
        return tf.reduce_mean(squares)

    loss, (gradient,) = tfamp.value_and_gradients(
        mean_square, linear.trainable_variables, optimizer
    )
    # The square knows nothing of the scale, and its gradient carries it once.
    assert float(loss) == 1 + 4 + 4 + 16
    scale = float(optimizer.dynamic_scale.numpy())
    np.testing.assert_array_equal(
        gradient / scale, [[2.0], [4.0], [-4.0], [8.0]]
    )


@pytest.mark.slow
def test_two_replicas_train_as_one(config, batch, mirrored):
    states = []
    for replicas in (1, 2):
        strategy = mirrored(replicas)
        with strategy.scope():
            model = make(config, "float32", scale=1.0)
        take_step(strategy, model, batch)
        states.append([state_of(model, name) for name in NETWORKS])
    # Adam's moments among them, which tell twice a gradient from a gradient.
    for one, two in zip(
        keras.tree.flatten(states[0]),
        keras.tree.flatten(states[1]),
        strict=True,
    ):
        np.testing.assert_allclose(one, two, **FLOAT32_ROUNDING)


def test_the_distance_of_gaussians_is_that_of_the_formula():
    random = np.random.default_rng(0)
    one = random.normal(size=(50, 2, 1, 1))
    # Same covariance: the distance of the means, 3 and 4.
    shifted = one + np.array([3.0, 4.0]).reshape(2, 1, 1)
    assert frechet_distance(one, shifted) == pytest.approx(25)
    # Twice as wide: the sum of the variances.
    centered = one - one.mean(axis=0)
    assert frechet_distance(centered, 2 * centered) == pytest.approx(
        centered.var(axis=0, ddof=1).sum()
    )
    # Uncorrelated pixels against correlated ones have another covariance.
    mixed = np.concatenate([centered[:, :1], centered[:, :1]], axis=1)
    assert frechet_distance(mixed, centered) > 0.1


@pytest.mark.slow
def test_images_and_noise_follow_the_seed_and_change_by_epoch(config):
    def epochs(seed):
        train, _ = recipe.make_datasets(dataclasses.replace(config, seed=seed))
        return [next(iter(train)) for _ in range(2)]

    first, again, others = epochs(0), epochs(0), epochs(1)
    for part in (0, 1):
        np.testing.assert_array_equal(first[0][part], again[0][part])
        assert not np.array_equal(first[0][part], first[1][part])
        assert not np.array_equal(first[0][part], others[0][part])


@pytest.mark.slow
def test_samples_are_made_by_averaged_weights(config, batch, monkeypatch):
    model = make(config, "float32", scale=1.0)
    sampled = []

    def fit(*_):
        for _ in range(2):
            model.train_step(batch)
            sampled.append(model.generator.get_weights()[0])

    def samples(network, count, config):
        sampled.append(network.get_weights()[0])
        return np.ones([count, 8, 8, 1])

    monkeypatch.setattr(recipe, "build_model", lambda _: model)
    monkeypatch.setattr(tfamp.recipe, "fit", fit)
    monkeypatch.setattr(recipe, "_samples", samples)
    recipe.train(config)
    first, second, average = sampled
    momentum = config.ema_momentum
    np.testing.assert_allclose(
        average, momentum * first + (1 - momentum) * second, rtol=1e-4
    )


@pytest.mark.slow
def test_lint_finds_nothing(config):
    tfamp.set_precision("mixed_float16")
    train, _ = recipe.make_datasets(config)
    model = recipe.build_model(config)
    assert tfamp.lint(model, next(iter(train))) == []


@pytest.mark.slow
def test_a_saved_gan_is_loaded_and_trains_on(config, batch, tmp_path):
    model = make(config)
    model.train_step(batch)
    model.save(tmp_path / "gan.keras")
    loaded = tfamp.load_model(tmp_path / "gan.keras")
    assert loaded.compiled
    for each in (model, loaded):
        each.train_step(batch)
    for name in NETWORKS:
        assert int(optimizer_of(loaded, name).iterations.numpy()) == 2
        assert_equal(state_of(loaded, name), state_of(model, name))


@pytest.mark.parametrize(
    ("name", "splits", "image_size", "shape", "coarsest"),
    first_always(
        [
            # Down to 7 pixels a side, with four times the channels.
            ("mnist", ["train", "test"], 0, (28, 28, 1), (7, 4)),
            # Of 218 x 178 pixels the middle, made smaller; and no labels.
            (
                "celeb_a",
                ["train", "validation", "test"],
                32,
                (32, 32, 3),
                (4, 8),
            ),
        ],
        1,
    ),
)
def test_published_images_are_read_at_their_size_or_another(
    config, tmp_path, name, splits, image_size, shape, coarsest
):
    write_metadata(name, str(tmp_path), splits)
    config = dataclasses.replace(
        config,
        dataset=name,
        data_dir=str(tmp_path),
        image_size=image_size,
        batch_size=4,
    )
    with tfds.testing.mock_data(num_examples=EXAMPLES, data_dir=str(tmp_path)):
        train, evaluation = recipe.make_datasets(config)
        model = recipe.build_model(config)
    for batches in (train, evaluation):
        shapes = [(image.shape, noise.shape) for image, noise in batches]
        assert shapes == [((4, *shape), (4, 8))] * 3
        image, _ = next(iter(batches))
        assert -1 <= np.min(image) < -0.1 < 0.1 < np.max(image) <= 1
    assert model.generator.output_shape == (None, *shape)
    side, times = coarsest
    assert model.generator.layers[1].units == side**2 * times * config.width


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": 65}, "exceeds the 64 training images"),
        ({"latent_size": 0}, "latent_size"),
        ({"penalty": -1.0}, "penalty"),
        ({"ema_momentum": 1.0}, "ema_momentum"),
        ({"dataset": "digit"}, "Unknown data set"),
        ({"dataset": "imdb_reviews"}, "has no image; its features"),
        ({"dataset": "imagenet2012"}, "must be downloaded by hand; put the"),
        ({"image_size": -1}, "image_size"),
    ],
)
def test_bad_input_is_one_line(config, tmp_path, flags, message):
    write_metadata("imdb_reviews", str(tmp_path), ["train", "test"])
    if "dataset" in flags:
        flags = {**flags, "data_dir": str(tmp_path)}
    with pytest.raises(tfamp.InputError, match=message) as caught:
        recipe.make_datasets(dataclasses.replace(config, **flags))
    assert "\n" not in str(caught.value)
