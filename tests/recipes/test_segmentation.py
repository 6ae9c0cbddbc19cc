import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

import tfamp
from recipes import segmentation as recipe
from recipes.data.glyphs import Glyphs, read_glyphs
from recipes.data.scenes import compose
from tests.conftest import mostly_long
from tests.recipes.published_data import write_metadata
from tfamp.precision.policy import PRECISIONS


@pytest.fixture
def config(digits_dir, monkeypatch):
    """Two steps on small scenes."""
    monkeypatch.setattr(recipe, "_TRAIN_SCENES", 32)
    monkeypatch.setattr(recipe, "_EVAL_SCENES", 16)
    return recipe.Config(
        precision="float32",
        data_dir=digits_dir,
        batch_size=16,
        epochs=1,
        image_size=16,
        widths=(8, 16),
    )


def one_square(label):
    """A single glyph: a filled square."""
    return Glyphs(
        np.ones([1, 4, 4, 1], np.float32), np.array([label], np.int32), 10
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "num_devices"),
    mostly_long(
        [*((precision, 1) for precision in PRECISIONS), ("mixed_float16", 2)],
        always=[("mixed_bfloat16", 1)],
    ),
)
def test_two_steps_train_in_every_precision_and_on_two_replicas(
    config, precision, num_devices
):
    results = recipe.train(
        dataclasses.replace(
            config, precision=precision, num_devices=num_devices
        )
    )
    assert 0 <= results["mean_iou"] <= 1
    assert np.isfinite(results["loss"])
    assert results["skipped_steps"] == 0


@pytest.mark.slow
def test_training_beats_the_background_and_draws_what_it_found(
    config, tmp_path
):
    config = dataclasses.replace(
        config,
        epochs=20,
        learning_rate=2e-2,
        widths=(16,),
        warmup_epochs=0.0,
        output_dir=str(tmp_path),
    )
    results = recipe.train(config)
    _, batches = recipe.make_datasets(config)
    assert results["mean_iou"] > recipe._background_iou(batches) + 0.01
    picture = tf.io.decode_png((tmp_path / "masks.png").read_bytes())
    # 8 images of 16 pixels with gaps of 2, over masks and predictions.
    assert picture.shape == (2 * (3 * 18 - 2), 2 * (8 * 18 - 2), 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_loss_is_that_of_its_formula_in_float32(dtype):
    random = np.random.default_rng(0)
    logits = random.normal(size=(2, 4, 4, 3)).astype("float32")
    logits = tf.cast(tf.cast(logits, dtype), "float32").numpy()
    labels = random.integers(3, size=(2, 4, 4))
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    hot = np.eye(3)[labels]
    entropy = -np.log((shares * hot).sum(-1)).mean()
    overlap = (shares * hot).sum((0, 1, 2))
    dice = 1 - 2 * overlap / (hot + shares).sum((0, 1, 2))
    loss = recipe.CrossEntropyDice()(labels, tf.cast(logits, dtype))
    assert loss.dtype == tf.float32
    np.testing.assert_allclose(loss, entropy + dice.mean(), rtol=1e-5)


def test_without_its_guard_the_loss_teaches_nothing_in_float16():
    # 32 images of 48x48 pixels are 73,728, and beyond float16.
    labels = tf.zeros([32, 48, 48], tf.int32)
    logits = tf.Variable(tf.zeros([32, 48, 48, 2], tf.float16))

    def loss_and_gradient(dtype):
        with tf.GradientTape() as tape:
            loss = recipe.CrossEntropyDice(dtype)(labels, logits)
        return loss.numpy(), tape.gradient(loss, logits).numpy()

    # Half of each pixel is right: ln 2, and Dice losses of 1/3 and of 1.
    loss, gradient = loss_and_gradient(None)
    np.testing.assert_allclose(loss, np.log(2) + 2 / 3, rtol=1e-3)
    assert gradient.any()
    # NaN where sums become inf, as on GPUs; 0 where they stop at 2048.
    loss, gradient = loss_and_gradient("float16")
    assert np.isnan(loss) or (loss == 0 and not gradient.any())


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [True, False])
def test_lint_misses_the_guard(config, guarded):
    tfamp.set_precision("mixed_float16")
    config = dataclasses.replace(config, dice_in_float32=guarded)
    findings = tfamp.lint(recipe.build_model(config))
    rules = {each.rule for each in findings if each.severity == "error"}
    assert ("rounded-loss" in rules) is not guarded
    assert bool(findings) is not guarded


@pytest.mark.slow
def test_an_evaluation_sees_the_same_scenes_with_every_seed(config):
    _, first = recipe.make_datasets(config)
    _, other = recipe.make_datasets(dataclasses.replace(config, seed=1))
    for (x, y), (x2, y2) in zip(first, other, strict=True):
        np.testing.assert_array_equal(x, x2)
        np.testing.assert_array_equal(y, y2)


@pytest.mark.slow
def test_training_scenes_follow_the_seed_and_change_by_epoch(config):
    def epochs(seed):
        train, _ = recipe.make_datasets(dataclasses.replace(config, seed=seed))
        return [next(iter(train))[0].numpy() for _ in range(2)]

    first, again = epochs(0), epochs(0)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], epochs(1)[0])


def test_each_inked_pixel_has_the_label_of_its_character():
    scenes, labels = compose(one_square(4), 20, 1, 50, tf.constant([1, 2]))
    scenes, is_inked = scenes.numpy()[..., 0], labels.numpy() == 5
    assert set(np.unique(labels)) == {0, 5}
    # The ground ends at 0.3, and contrast begins at 0.5.
    assert scenes[~is_inked].max() < 0.3
    assert scenes[is_inked].mean() > 0.5
    # The sides are 0.2 to 0.4 of the scene, 4 to 8 pixels, to one pixel.
    areas = is_inked.sum(axis=(1, 2))
    assert areas.min() >= 9
    assert areas.max() <= 81
    assert len(np.unique(areas)) > 5


def test_a_later_character_covers_an_earlier_one():
    one = compose(one_square(4), 20, 1, 50, tf.constant([1, 2]))[1]
    many = compose(one_square(4), 20, 9, 50, tf.constant([1, 2]))[1]
    assert np.mean(many != 0) > 3 * np.mean(one != 0)


def test_scenes_are_a_function_of_their_seed():
    first, again, other = (
        compose(one_square(0), 20, 2, 3, tf.constant(seed))[0]
        for seed in ([1, 2], [1, 2], [1, 3])
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1])


def test_glyphs_of_train_and_test_are_the_stored_ones(digits_dir):
    train, test = read_glyphs("digits", digits_dir)
    assert train.pixels.shape == (1437, 8, 8, 1)
    assert test.pixels.shape == (360, 8, 8, 1)
    assert (train.pixels.min(), train.pixels.max()) == (0, 1)
    assert train.num_classes == 10


def test_color_images_are_no_glyphs(tmp_path):
    write_metadata("cifar10", str(tmp_path), ["train", "test"])
    with pytest.raises(tfamp.InputError, match="grayscale"):
        read_glyphs("cifar10", str(tmp_path))


@pytest.fixture
def pets(tmp_path):
    write_metadata("oxford_iiit_pet", str(tmp_path), ["train", "test"])
    return recipe.Config(
        dataset="oxford_iiit_pet",
        data_dir=str(tmp_path),
        image_size=16,
        widths=(8, 16),
        batch_size=4,
    )


def mocked(config, mask_values):
    """Pictures of two sizes whose masks hold these values."""

    def as_dataset(self, *args, **kwargs):
        def example(i):
            shape = tf.where(i % 2 == 0, [20, 30, 1], [24, 18, 1])
            mask = tf.gather(mask_values, tf.range(tf.reduce_prod(shape)) % 3)
            return {
                "image": tf.ones(tf.where(shape == 1, 3, shape), tf.uint8),
                "segmentation_mask": tf.cast(tf.reshape(mask, shape), tf.uint8),
            }

        return tf.data.Dataset.range(12).map(example)

    return tfds.testing.mock_data(
        as_dataset_fn=as_dataset, data_dir=config.data_dir
    )


@pytest.mark.slow
def test_photographs_with_masks_become_squares_with_labels_from_0(pets):
    with mocked(pets, [1, 2, 3]):
        train, evaluation = recipe.make_datasets(pets)
        for batches in (train, evaluation):
            for x, y in batches:
                assert x.shape == (4, 16, 16, 3)
                assert set(np.unique(y)) <= {0, 1, 2}
    assert recipe.build_model(pets).output_shape == (None, 16, 16, 3)


def test_a_label_that_the_model_does_not_know_is_named(pets):
    with mocked(pets, [1, 2, 4]):
        train, _ = recipe.make_datasets(pets)
        with pytest.raises(
            tf.errors.InvalidArgumentError, match="holds labels 1 to 4"
        ):
            next(iter(train))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"image_size": 15}, "multiple of 2"),
        ({"widths": ()}, "widths"),
        ({"dataset": "mnist"}, "segmentation_mask"),
        ({"dataset": "pet"}, "Unknown data set"),
        ({"eval_split": "dev", "dataset": "oxford_iiit_pet"}, "'dev'"),
    ],
)
def test_bad_input_is_one_line(config, tmp_path, flags, message):
    write_metadata("mnist", str(tmp_path), ["train", "test"])
    write_metadata("oxford_iiit_pet", str(tmp_path), ["train", "test"])
    with pytest.raises(tfamp.InputError, match=message) as caught:
        recipe.make_datasets(
            dataclasses.replace(config, data_dir=str(tmp_path), **flags)
        )
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_saved_model_is_loaded_with_its_loss(config, tmp_path):
    model = recipe.build_model(config)
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "unet.keras")
    loaded = tfamp.load_model(tmp_path / "unet.keras")
    assert isinstance(loaded.loss, recipe.CrossEntropyDice)
    assert isinstance(loaded, keras.Model)
