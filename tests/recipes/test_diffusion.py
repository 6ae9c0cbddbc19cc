import dataclasses
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

import tfamp
from recipes import diffusion as recipe
from recipes.data import pixels
from recipes.frechet import known_distances
from recipes.noise_schedule import add_noise, linear_loss, remove_noise
from tests.conftest import FLOAT32_ROUNDING, mostly_long, mostly_slow
from tests.recipes.published_data import EXAMPLES, write_metadata
from tfamp import keras_internals
from tfamp.precision.policy import PRECISIONS


@pytest.fixture(scope="module")
def config(few_digits_dir):
    """Two steps of a small network."""
    return recipe.Config(
        precision="float32",
        data_dir=few_digits_dir,
        batch_size=32,
        epochs=1,
        steps_per_loop=1,
        widths=(8,),
        attention=False,
        warmup_epochs=0.0,
        sample_steps=2,
    )


@pytest.fixture(autouse=True)
def quick_evaluations(monkeypatch):
    monkeypatch.setattr(recipe, "_EVAL_IMAGES", 32)


@pytest.fixture(scope="module")
def batch(config):
    """Sixteen noisy images and their velocities."""
    return keras.tree.map_structure(
        lambda each: each[:16], next(iter(recipe.make_datasets(config)[0]))
    )


def make(config, precision="mixed_float16", scale=2.0**8):
    """The same network each time, with a scale that overflows for none."""
    keras.utils.set_random_seed(0)
    with tfamp.precision_scope(precision):
        model = recipe.build_model(config)
    model.optimizer.build(model.trainable_variables)
    model.optimizer.dynamic_scale.assign(scale)
    return model


def averages_of(model):
    """Copies of the moving averages of the weights."""
    pairs = keras_internals.moving_averages(model.optimizer.inner_optimizer)
    return [average.numpy() for _, average in pairs]


def bfloat16(values):
    return tf.cast(values, tf.bfloat16).numpy()


def normals(*shape, seed=0):
    return tf.random.stateless_normal(shape, [seed, 0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "num_devices"),
    mostly_long(
        [("mixed_bfloat16", 1), ("mixed_float16", 1), ("mixed_float16", 2)],
        always=[("mixed_bfloat16", 1)],
    ),
)
def test_two_steps_train_in_16_bits_and_on_two_replicas(
    config, precision, num_devices
):
    results = recipe.train(
        dataclasses.replace(
            config, precision=precision, num_devices=num_devices
        )
    )
    assert all(map(np.isfinite, results.values()))
    # Two steps from what predicts nothing, whose loss is near 1.
    assert 0 < results["loss"] < 1.5
    assert results["skipped_steps"] <= (precision == "mixed_float16")


@pytest.mark.parametrize("time", [0.0, 0.25, 0.5, 1.0])
def test_noise_is_mixed_by_the_formula_of_the_angle(time):
    random = np.random.default_rng(0)
    images, noise = random.normal(size=(2, 3, 4, 4, 1))
    angle = time * math.pi / 2
    noisy, velocity = add_noise(images, noise, [time] * 3)
    assert noisy.dtype == velocity.dtype == tf.float32
    for found, expected in (
        (noisy, math.cos(angle) * images + math.sin(angle) * noise),
        (velocity, math.cos(angle) * noise - math.sin(angle) * images),
    ):
        np.testing.assert_allclose(found, expected, **FLOAT32_ROUNDING)


def test_mixing_is_float32_also_of_16_bit_images():
    images = tf.cast(normals(2, 4, 4, 1), tf.bfloat16)
    noise = normals(2, 4, 4, 1, seed=1)
    for found, expected in zip(
        add_noise(images, noise, [0.1, 0.9]),
        add_noise(tf.cast(images, tf.float32), noise, [0.1, 0.9]),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_sampling_with_the_denoiser_of_one_image_makes_that_image(num_steps):
    image = normals(1, 4, 4, 1, seed=1)

    def velocity(noisy, time):
        cos, sin = (f(time * math.pi / 2) for f in (tf.cos, tf.sin))
        noise = (noisy - cos * image) / sin
        return cos * noise - sin * image

    made = remove_noise(velocity, normals(3, 4, 4, 1), num_steps)
    np.testing.assert_allclose(
        made, np.repeat(image, 3, axis=0), rtol=1e-4, atol=1e-4
    )


def test_sampling_with_the_denoiser_of_a_gaussian_makes_that_gaussian():
    """Images with one mean, and a deviation of 1 around it.

    Of these a noisy image tells as much as of its noise, and the expected
    velocity is minus sin times the mean: a step multiplies what is not mean by
    the cosine of its angle, and nothing else.
    """
    mean, num_steps = 0.7, 40
    noise = normals(500, 4, 4, 1)
    made = remove_noise(
        lambda noisy, time: -mean * tf.sin(time * math.pi / 2) * tf.ones([1]),
        noise,
        num_steps,
    )
    shrinks = math.cos(math.pi / 2 / num_steps) ** num_steps
    assert 0.96 < shrinks < 1
    np.testing.assert_allclose(
        made, mean + shrinks * noise, rtol=1e-4, atol=1e-4
    )


def test_more_steps_come_nearer_to_the_deviation_of_a_narrow_gaussian():
    mean, variance = -0.3, 0.2**2

    def velocity(noisy, time):
        cos, sin = (f(time * math.pi / 2) for f in (tf.cos, tf.sin))
        off = (noisy - cos * mean) / (cos**2 * variance + sin**2)
        return cos * sin * off - sin * (mean + cos * variance * off)

    noise = normals(8, 4, 4, 1)
    few, many = (
        # What each pixel's noise is left with of itself.
        (remove_noise(velocity, noise, steps) - mean) / noise
        for steps in (100, 200)
    )
    np.testing.assert_allclose(many, 0.2, atol=0.01)
    np.testing.assert_allclose((few - 0.2) / (many - 0.2), 2, atol=0.1)


def test_sampling_adds_up_in_float32_what_a_network_says_in_16_bits():
    seen = []

    def velocity(noisy, time):
        seen.extend([noisy.dtype, time.dtype])
        return tf.cast(tf.zeros_like(noisy) + 0.1, tf.bfloat16)

    noise = normals(2, 4, 4, 1)
    made = remove_noise(velocity, noise, 1000)
    assert {*seen, made.dtype} == {tf.float32}
    # Turned by minus a quarter, a bit at a time; 0.1 as bfloat16 has it.
    told = float(tf.cast(0.1, tf.bfloat16))
    np.testing.assert_allclose(
        made,
        math.cos(math.pi / 2000) ** 1000 * noise
        - told
        * sum(
            math.sin(math.pi / 2000) * math.cos(math.pi / 2000) ** i
            for i in range(1000)
        ),
        rtol=1e-3,
        atol=1e-4,
    )


def test_the_loss_of_the_best_linear_network_is_that_of_its_integral():
    random = np.random.default_rng(0)
    mix = random.normal(size=(3, 3)) / 2
    images = random.normal(size=(4000, 3)) @ mix
    covariance = np.cov(images, rowvar=False)
    losses = []
    for angle in (np.arange(2000) + 0.5) / 2000 * math.pi / 2:
        cos, sin = math.cos(angle), math.sin(angle)
        # Covariances of velocity and noisy image: of (e, x) turned.
        of_noisy = cos**2 * covariance + sin**2 * np.eye(3)
        of_velocity = cos**2 * np.eye(3) + sin**2 * covariance
        of_both = cos * sin * (np.eye(3) - covariance)
        left = of_velocity - of_both @ np.linalg.solve(of_noisy, of_both)
        losses.append(np.trace(left) / 3)
    assert linear_loss(images) == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision", mostly_long(PRECISIONS, always=["mixed_bfloat16"])
)
def test_times_are_embedded_in_float32_in_every_precision(config, precision):
    # A third of 1000 radians: float16 would be off by 0.1, bfloat16 by 1.
    times = np.array([0.0, 1 / 3, 0.7531, 1.0], np.float32)
    model = make(config, precision)
    embedding = keras.Model(
        model.inputs, model.get_layer("time_embedding").output
    )
    found = embedding(
        {
            "noisy": tf.zeros([4, 8, 8, 1]),
            "time": tf.constant(times),
            "label": tf.zeros([4], tf.int32),
        }
    )
    assert found.dtype == tf.float32
    half = found.shape[-1] // 2
    angles = (
        1000.0
        * times.astype(np.float64)[:, None]
        * 10_000.0 ** (-np.arange(half) / half)
    )
    # float32 holds 1000 radians to 0.00006.
    np.testing.assert_allclose(
        found,
        np.concatenate([np.sin(angles), np.cos(angles)], axis=1),
        atol=2e-4,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision", mostly_long(PRECISIONS, always=["mixed_float16"])
)
def test_averages_are_float32_and_keep_what_16_bits_would_lose(
    config, batch, precision
):
    momentum = 0.999
    config = dataclasses.replace(config, ema_momentum=momentum)
    model = make(config, precision)
    # The first step moves the last layer only, since that one begins at 0.
    model.train_step(batch)
    before = averages_of(model)
    model.train_step(batch)
    after = averages_of(model)

    for old, new, weight in zip(
        before, after, model.get_weights(), strict=True
    ):
        assert new.dtype == np.float32
        expected = momentum * old.astype(np.float64) + (1 - momentum) * weight
        np.testing.assert_allclose(new, expected, rtol=1e-6, atol=1e-9)
    # In bfloat16 most averages that moved would still be what they were.
    old, new = (
        np.concatenate([each.ravel() for each in averages])
        for averages in (before, after)
    )
    moved = (old != new) & (old != 0)
    assert np.sum(moved) > 50
    assert np.mean(bfloat16(old[moved]) == bfloat16(new[moved])) > 0.9


@pytest.mark.slow
def test_a_skipped_step_leaves_weights_and_averages_alone(
    config, batch, mirrored
):
    strategy = mirrored(2)
    with strategy.scope():
        model = make(config)
    inputs, velocity = batch

    def step(first):
        """One in which the first velocity is `first`: a single replica's."""
        is_first = tf.range(16)[:, None, None, None] == 0
        data = (inputs, tf.where(is_first, first, velocity))

        def share(context):
            replica = context.replica_id_in_sync_group
            return keras.tree.map_structure(
                lambda each: tf.split(each, 2)[replica], data
            )

        strategy.run(
            model.train_step,
            args=(
                strategy.experimental_distribute_values_from_function(share),
            ),
        )

    step(0.0)
    weights, averages = model.get_weights(), averages_of(model)
    step(np.inf)
    assert int(model.optimizer.skipped_steps.numpy()) == 1
    assert int(model.optimizer.iterations.numpy()) == 1
    for old, new in (
        (weights, model.get_weights()),
        (averages, averages_of(model)),
    ):
        for one, other in zip(old, new, strict=True):
            np.testing.assert_array_equal(one, other)
    step(0.0)
    assert not np.array_equal(averages[-1], averages_of(model)[-1])


@pytest.mark.slow
def test_training_beats_guesses_and_shows_samples(
    config, digits_dir, tmp_path, monkeypatch
):
    """And what samples, and is evaluated, are the averaged weights."""
    models = []
    build_model = recipe.build_model

    def build_and_note(config):
        models.append(build_model(config))
        return models[0]

    monkeypatch.setattr(recipe, "build_model", build_and_note)
    config = dataclasses.replace(
        config,
        data_dir=digits_dir,
        batch_size=64,
        epochs=6,
        steps_per_loop=0,
        widths=(8,),
        learning_rate=4e-3,
        ema_momentum=0.9,
        sample_steps=10,
        output_dir=str(tmp_path),
    )
    results = recipe.train(config)
    train, real = pixels.load("digits", digits_dir, 0, 64).compared_images()
    known = known_distances(train, real)
    assert known["other real images"] < results["frechet_distance"]
    assert results["frechet_distance"] < known["pixels of several"]
    # That of knowing each pixel's mean and deviation, and no other pixel.
    assert results["loss"] < np.mean(np.std(train, axis=0))
    for weight, average in zip(
        models[0].trainable_variables, averages_of(models[0]), strict=True
    ):
        assert weight.dtype == "float32"
        np.testing.assert_array_equal(weight, average)
    picture = tf.io.decode_png((tmp_path / "samples.png").read_bytes())
    # 80 images of 8 pixels with gaps of 2, 8 rows of 10, each pixel 4 by 4.
    assert picture.shape == (4 * (8 * 10 - 2), 4 * (10 * 10 - 2), 1)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guidance_leads_from_no_class_to_the_class_and_beyond(config, guidance):
    data = pixels.load("digits", config.data_dir, 0, 1)
    seen = []

    def model(inputs, training):
        seen.append(inputs["label"])
        assert not training
        assert inputs["time"].shape == [12]
        # Velocities that tell the class, and 0.5 without one.
        label = tf.cast(inputs["label"], tf.float32)
        told = tf.where(label == 10, 0.5, label / 20)
        return tf.ones_like(inputs["noisy"]) * told[:, None, None, None]

    config = dataclasses.replace(config, guidance=guidance, sample_steps=1)
    samples = recipe.sample(model, data, 12, config)
    classes = np.arange(12) % 10 / 20
    # The only step is a quarter turn, from noise to minus the velocity.
    expected = -(0.5 + guidance * (classes - 0.5)).clip(-1, 1)
    np.testing.assert_allclose(
        samples, np.tile(expected[:, None, None, None], (8, 8, 1)), atol=1e-5
    )
    assert len(seen) == (1 if guidance == 1 else 2)


@pytest.mark.slow
def test_batches_follow_seed_and_epoch_and_those_evaluated_neither(config):
    def epochs(seed):
        train, evaluation = recipe.make_datasets(
            dataclasses.replace(config, seed=seed)
        )
        return [next(iter(train)) for _ in range(2)], next(iter(evaluation))

    (first, first_eval), (again, _), (other, other_eval) = map(
        epochs, (0, 0, 1)
    )
    for name in ("noisy", "time", "label"):
        np.testing.assert_array_equal(first[0][0][name], again[0][0][name])
        assert not np.array_equal(first[0][0][name], first[1][0][name])
        assert not np.array_equal(first[0][0][name], other[0][0][name])
        np.testing.assert_array_equal(first_eval[0][name], other_eval[0][name])


@pytest.mark.slow
def test_each_image_has_noise_and_time_of_its_own(config):
    """So have replicas, which share a batch out by rows."""
    inputs, velocity = next(iter(recipe.make_datasets(config)[0]))
    assert {inputs["noisy"].dtype, velocity.dtype} == {tf.float32}
    # A batch of 32 has a time in each 32nd part, whatever the order.
    times = np.sort(inputs["time"])
    np.testing.assert_array_equal(np.floor(times * 32), np.arange(32))
    noisy, velocity = inputs["noisy"].numpy(), velocity.numpy()
    angle = (math.pi / 2 * inputs["time"].numpy())[:, None, None, None]
    noise = np.sin(angle) * noisy + np.cos(angle) * velocity
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.05
    likeness = np.corrcoef(noise.reshape(32, -1)) - np.eye(32)
    assert np.abs(likeness).max() < 0.6
    images = np.cos(angle) * noisy - np.sin(angle) * velocity
    assert -1.001 < images.min() < -0.99 < 0.8 < images.max() < 1.001


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_share_of_the_images_is_shown_without_its_class(config, share):
    config = dataclasses.replace(config, class_dropout=share)
    train, evaluation = recipe.make_datasets(config)
    labels = np.concatenate([x["label"] for x, _ in train.repeat(4)])
    assert labels.dtype == np.int32
    # 5 deviations of 256 throws of a coin.
    assert abs(np.mean(labels == 10) - share) <= share * 2 * 0.16
    assert set(labels) >= set(range(10))
    assert max(np.max(x["label"]) for x, _ in evaluation) == 9


@pytest.mark.slow
def test_lint_finds_nothing(config):
    tfamp.set_precision("mixed_float16")
    default = recipe.Config(data_dir=config.data_dir)
    train, _ = recipe.make_datasets(default)
    assert tfamp.lint(recipe.build_model(default), next(iter(train))) == []


@pytest.mark.slow
def test_a_saved_denoiser_is_loaded_and_predicts_the_same(
    config, batch, tmp_path
):
    model = make(dataclasses.replace(config, attention=True))
    model.train_step(batch)
    model.save(tmp_path / "denoiser.keras")
    loaded = tfamp.load_model(tmp_path / "denoiser.keras")
    np.testing.assert_array_equal(loaded(batch[0]), model(batch[0]))
    assert np.any(model(batch[0]) != 0)


PUBLISHED = [
    ("mnist", ["train", "test"], (28, 28, 1), 10),
    ("cifar10", ["train", "test"], (32, 32, 3), 10),
    # Cut and made smaller; without labels.
    ("celeb_a", ["train", "validation", "test"], (64, 64, 3), 0),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "splits", "shape", "num_classes"),
    mostly_slow(PUBLISHED, always=PUBLISHED[-1:]),
)
def test_published_images_are_read_with_their_classes_if_any(
    config, tmp_path, monkeypatch, name, splits, shape, num_classes
):
    monkeypatch.setattr(recipe, "_EVAL_IMAGES", 4 * EXAMPLES)
    write_metadata(name, str(tmp_path), splits)
    config = dataclasses.replace(
        config,
        dataset=name,
        data_dir=str(tmp_path),
        batch_size=4,
        widths=(8, 16, 8),
        sample_steps=1,
    )
    with tfds.testing.mock_data(num_examples=EXAMPLES, data_dir=str(tmp_path)):
        train, evaluation = recipe.make_datasets(config)
        model = recipe.build_model(config)
        # Images that are evaluated on come with several noises.
        for batches, count in ((train, 3), (evaluation, 3 * 4)):
            seen = [(x["noisy"].shape, y.shape) for x, y in batches]
            assert seen == [((4, *shape), (4, *shape))] * count
            for x, _ in batches:
                assert np.max(x["label"]) <= num_classes
        data = recipe._load(config)
        for compared in data.compared_images():
            assert compared.shape == (EXAMPLES, *shape)
    assert recipe.sample(model, data, 3, config).shape == (3, *shape)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": 65}, "exceeds the 64 training images"),
        ({"image_size": 9, "widths": (8, 8)}, "expected a multiple of 2"),
        ({"image_size": -8}, "image_size=-8 is out of range"),
        ({"widths": ()}, "widths"),
        ({"widths": (12,)}, "multiples of 8"),
        ({"ema_momentum": 1.0}, "ema_momentum=1.0 is out of range"),
        ({"ema_momentum": -0.5}, "ema_momentum=-0.5 is out of range"),
        ({"class_dropout": 0.0, "guidance": 2.0}, "class_dropout above 0"),
        ({"guidance": 2.0, "dataset": "celeb_a"}, "has no classes"),
        ({"sample_steps": 0}, "sample_steps=0 is out of range"),
        ({"dataset": "cifar1O"}, "Unknown data set"),
        ({"dataset": "imdb_reviews"}, "has no image; its features"),
        ({"dataset": "mnist"}, "has 0 images; expected 2 or more"),
    ],
)
def test_bad_input_is_one_line(config, tmp_path, flags, message):
    if "dataset" in flags:
        write_metadata("imdb_reviews", str(tmp_path), ["train", "test"])
        write_metadata("celeb_a", str(tmp_path), ["train", "test"])
        write_metadata("mnist", str(tmp_path), ["train", "test"], examples=0)
        flags = {"batch_size": 4, "data_dir": str(tmp_path)} | flags
    with pytest.raises(tfamp.InputError, match=message) as caught:
        recipe.make_datasets(dataclasses.replace(config, **flags))
    assert "\n" not in str(caught.value)
