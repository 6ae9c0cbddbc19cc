import dataclasses
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

import tfamp
from recipes import ctc
from recipes import line_recognition as recipe
from recipes.data.glyphs import Glyphs
from recipes.data.lines import LineShape, compose, fit_glyphs
from tests.conftest import mostly_long
from tests.recipes.published_data import write_metadata


@pytest.fixture
def config(digits_dir, monkeypatch):
    """Two steps on short lines."""
    monkeypatch.setattr(recipe, "_TRAIN_LINES", 16)
    monkeypatch.setattr(recipe, "_EVAL_LINES", 12)
    return recipe.Config(
        precision="float32",
        data_dir=digits_dir,
        batch_size=8,
        epochs=1,
        line_height=8,
        line_width=32,
        max_characters=3,
        channels=(8, 8),
        num_layers=0,
        width=16,
        num_heads=2,
        dropout=0.0,
    )


def one_square(label):
    """A single glyph: a filled square."""
    return Glyphs(
        np.ones([1, 16, 16, 1], np.float32), np.array([label], np.int32), 10
    )


def texts(config):
    """The true texts of the lines that are evaluated on."""
    _, batches = recipe.make_datasets(config)
    return [
        "".join(str(label - 1) for label in line if label)
        for _, labels in batches
        for line in labels.numpy()
    ]


def levenshtein(one, other):
    """By its definition, from the ends of the texts."""
    if not (one and other):
        return len(one) + len(other)
    if one[-1] == other[-1]:
        return levenshtein(one[:-1], other[:-1])
    return 1 + min(
        levenshtein(one[:-1], other),
        levenshtein(one, other[:-1]),
        levenshtein(one[:-1], other[:-1]),
    )


def logits_of(paths, num_classes=5):
    """Logits whose best paths are these, one label or blank a frame."""
    return tf.one_hot(paths, num_classes, on_value=9.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "num_devices"),
    mostly_long(
        [("mixed_bfloat16", 1), ("mixed_float16", 1), ("mixed_float16", 2)],
        always=[("mixed_bfloat16", 1)],
    ),
)
def test_steps_leave_out_lines_that_are_too_short(
    config, precision, num_devices
):
    """In 16 bits and on two replicas: 4 frames, 1 to 6 characters."""
    config = dataclasses.replace(
        config,
        precision=precision,
        num_devices=num_devices,
        line_width=16,
        max_characters=6,
        # Of 6 steps the search for a loss scale may take some.
        epochs=3,
    )
    results = recipe.train(config)
    # Weights that are not finite would make it NaN.
    assert np.isfinite(results["loss"])
    assert results["character_error_rate"] > 0
    assert 0 <= results["exact_lines"] <= 1
    assert results["skipped_steps"] <= 4
    needed = [
        len(text) + sum(one == next_ for one, next_ in itertools.pairwise(text))
        for text in texts(config)
    ]
    assert results["lines_left_out"] == sum(n > 4 for n in needed) > 0
    assert min(needed) <= 4


@pytest.mark.slow
def test_training_beats_every_constant_text_and_shows_what_was_read(
    config, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(recipe, "_TRAIN_LINES", 2048)
    config = dataclasses.replace(
        config,
        epochs=2,
        warmup_epochs=0.1,
        learning_rate=1e-2,
        max_characters=2,
        channels=(16, 32),
        width=32,
        output_dir=str(tmp_path),
    )
    results = recipe.train(config)
    rows = (tmp_path / "lines.txt").read_text().splitlines()
    true, read = zip(*(row.split("\t") for row in rows), strict=True)
    assert list(true) == texts(config)
    assert f"{true[0]}  ->  {read[0]}" in capsys.readouterr().out
    picture = tf.io.decode_png((tmp_path / "lines.png").read_bytes())
    # 12 lines of 8x32 pixels with gaps of 2.
    assert picture.shape == (3 * (12 * 10 - 2), 3 * 32, 1)

    # Of 12 lines, the second batch of 8 has but 4.
    edits = sum(map(levenshtein, true, read))
    characters = sum(map(len, true))
    np.testing.assert_allclose(
        results["character_error_rate"], edits / characters, rtol=1e-6
    )
    np.testing.assert_allclose(
        results["exact_lines"], np.mean(np.equal(true, read)), rtol=1e-6
    )
    _, batches = recipe.make_datasets(config)
    labels = np.concatenate([y for _, y in batches])
    assert edits / characters < recipe._constant_error_rate(labels) - 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_loss_is_that_of_its_formula_in_float32(dtype):
    random = np.random.default_rng(0)
    logits = tf.cast(random.normal(size=(1, 2, 3)), dtype)
    odds = np.exp(tf.cast(logits, "float64").numpy()[0])
    p = odds / odds.sum(-1, keepdims=True)
    # The paths of two frames that spell a 1: 11, 01 and 10.
    likelihood = p[0, 1] * p[1, 1] + p[0, 0] * p[1, 1] + p[0, 1] * p[1, 0]
    loss = ctc.LineCTC()(np.array([[1, 0]]), logits)
    assert loss.dtype == tf.float32
    np.testing.assert_allclose(loss, -np.log(likelihood), rtol=1e-5)


def test_lines_need_a_frame_for_each_character_and_between_equal_ones():
    labels = np.array(
        [[1, 2, 3, 0], [1, 2, 2, 0], [1, 1, 0, 0], [1, 2, 3, 4], [0, 0, 0, 0]]
    )
    frames = tf.zeros([5, 3, 5])
    np.testing.assert_array_equal(
        ctc.is_too_short(labels, frames), [False, True, False, True, False]
    )


def test_a_line_that_is_too_short_gives_neither_loss_nor_gradient():
    logits = tf.random.stateless_normal([2, 3, 5], [0, 0])
    fits, too_short = [1, 2, 3, 0, 0], [1, 1, 1, 1, 2]
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = ctc.LineCTC()(np.array([fits, too_short]), logits)
    gradient = tape.gradient(loss, logits).numpy()
    alone = ctc.LineCTC()(np.array([fits]), logits[:1])
    np.testing.assert_allclose(loss, alone / 2, rtol=1e-6)
    assert gradient[0].any()
    assert not gradient[1].any()
    left_out = ctc.LinesLeftOut()
    left_out.update_state(np.array([fits, too_short]), logits)
    assert left_out.result() == 1


def test_what_is_read_is_the_best_path_without_repeats_and_blanks():
    paths = [[1, 1, 0, 1, 2], [0, 3, 3, 0, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(
        ctc.greedy_decode(logits_of(paths)),
        [[1, 1, 2, 0, 0], [3, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
    )


@pytest.mark.parametrize("is_traced", [False, True])
def test_decoding_and_distances_are_those_of_tensorflow_s_kernels(is_traced):
    random = np.random.default_rng(0)
    spec = [[None, None], [None, None, 4]]
    distances = tf.function(
        ctc.edit_distances,
        input_signature=[tf.TensorSpec(shape) for shape in spec],
    )
    for length, frames in ((1, 1), (3, 9), (7, 4), (5, 17)):
        logits = random.normal(size=(40, frames, 4)).astype("float32")
        true = random.integers(1, 4, (40, length)).astype("float32")
        true *= np.arange(length) < random.integers(0, length + 1, (40, 1))
        (decoded,), _ = tf.nn.ctc_greedy_decoder(
            logits.swapaxes(0, 1), [frames] * 40, blank_index=0
        )
        expected = tf.edit_distance(
            decoded,
            tf.sparse.from_dense(tf.cast(true, tf.int64)),
            normalize=False,
        )
        found = (distances if is_traced else ctc.edit_distances)(true, logits)

        np.testing.assert_array_equal(found, expected)
        read = tf.sparse.to_dense(decoded).numpy()
        np.testing.assert_array_equal(
            ctc.greedy_decode(logits)[:, : read.shape[1]], read
        )


def test_error_rates_are_edits_by_characters_over_batches_of_any_size():
    rate = ctc.CharacterErrorRate()
    exact = keras.metrics.MeanMetricWrapper(ctc.exact_lines)
    batches = [
        # Read 12, 3 and 4444: no edit, one inserted, one replaced and two
        # deleted, of 2 + 2 + 2 characters.
        (
            [[1, 2, 0], [3, 1, 0], [4, 3, 0]],
            [
                [1, 2, 2, 0, 0, 0, 0],
                [3, 3, 0, 0, 0, 0, 0],
                [4, 0, 4, 0, 4, 0, 4],
            ],
        ),
        # A smaller one: nothing read of 3 characters.
        ([[1, 1, 1]], [[0, 0, 0, 0, 0, 0, 0]]),
    ]
    assert rate.result() == 0
    for labels, paths in batches:
        for metric in (rate, exact):
            metric.update_state(np.array(labels), logits_of(paths))
    np.testing.assert_allclose(rate.result(), (0 + 1 + 3 + 3) / 9)
    np.testing.assert_allclose(exact.result(), 1 / 4)
    rate.reset_state()
    labels, paths = batches[0]
    rate.update_state(np.array(labels), logits_of(paths), [1, 1, 0])
    np.testing.assert_allclose(rate.result(), 1 / 4)


def test_the_baseline_is_the_best_of_all_constant_texts():
    # 1 and 1 are one and two edits from 1; 1 and 2 one each from nothing.
    assert recipe._constant_error_rate(np.array([[1, 0], [1, 2]])) == 1 / 3
    assert recipe._constant_error_rate(np.array([[1, 1], [1, 2]])) == 1 / 4


@pytest.mark.slow
def test_lint_finds_nothing(config):
    tfamp.set_precision("mixed_float16")
    # Of blocks that are alike one will do.
    default = recipe.Config(
        data_dir=config.data_dir, batch_size=8, num_layers=1
    )
    train, _ = recipe.make_datasets(default)
    assert tfamp.lint(recipe.build_model(default), next(iter(train))) == []


@pytest.mark.slow
def test_training_lines_follow_seed_and_epoch_and_those_evaluated_neither(
    config,
):
    def epochs(seed):
        train, evaluation = recipe.make_datasets(
            dataclasses.replace(config, seed=seed)
        )
        lines = [next(iter(train))[0].numpy() for _ in range(2)]
        return lines, np.concatenate([x for x, _ in evaluation])

    (first, first_eval), (again, _), (other, other_eval) = map(
        epochs, (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], other[0])
    np.testing.assert_array_equal(first_eval, other_eval)


def test_lines_hold_as_many_characters_as_their_labels_say():
    shape = LineShape(height=16, width=200, max_characters=5)
    seeds = tf.stack([tf.range(40, dtype=tf.int64)] * 2, axis=1)
    lines, labels = compose(one_square(6), shape, seeds)
    assert lines.shape == (40, 16, 200, 1)
    lengths = np.count_nonzero(labels, axis=1)
    assert set(lengths) == {1, 2, 3, 4, 5}
    is_written = np.arange(5) < lengths[:, None]
    np.testing.assert_array_equal(labels, np.where(is_written, 7, 0))
    # Contrast begins at 0.5, the ground ends at 0.3. Squares are 0.6 to 0.95
    # of 16 pixels high, 0.5 to 0.9 wide, and overlap by 0.15 at most.
    ink = np.sum(lines.numpy() > 0.4, axis=(1, 2, 3))
    assert np.all(ink <= lengths * 0.95 * 0.9 * 16**2 * 1.15)
    assert np.all(ink >= lengths * 0.6 * (0.5 - 0.15) * 16**2 * 0.85)


def test_characters_are_where_the_label_has_them():
    """Bright 0s and dark 1s: their order in the picture is the text's."""
    pixels = np.ones([2, 16, 16, 1], np.float32)
    pixels[1, 8:] = 0
    glyphs = Glyphs(pixels, np.array([0, 1], np.int32), 2)
    shape = LineShape(height=16, width=64, max_characters=2)
    seeds = tf.stack([tf.range(60, dtype=tf.int64)] * 2, axis=1)
    lines, labels = compose(glyphs, shape, seeds)
    ink = np.sum(lines.numpy()[..., 0] > 0.4, axis=1)
    center = np.sum(ink * np.arange(64), 1) / ink.sum(1)
    for line, text, at in zip(ink, labels.numpy(), center, strict=True):
        if sorted(text) == [1, 2]:
            columns = np.flatnonzero(line)
            half = (columns[0] + columns[-1]) / 2
            # The full square is the heavier one.
            assert (at < half) == (text[0] == 1)


def test_a_line_is_squeezed_to_its_picture():
    shape = LineShape(height=16, width=24, max_characters=8)
    seeds = tf.stack([tf.range(40, dtype=tf.int64)] * 2, axis=1)
    lines, labels = compose(one_square(0), shape, seeds)
    is_long = np.count_nonzero(labels, axis=1) >= 6
    columns = np.any(lines.numpy()[is_long, ..., 0] > 0.4, axis=1)
    # At least 6 * 16 * (0.5 - 0.15) = 34 pixels wide without squeezing.
    assert columns[:, -6:].any(axis=1).all()
    assert columns[:, :6].any(axis=1).all()


def test_a_line_is_a_function_of_its_own_seed():
    shape = LineShape(height=16, width=64, max_characters=4)
    glyphs = one_square(0)
    both = compose(glyphs, shape, tf.constant([[1, 2], [1, 3]], tf.int64))
    alone = compose(glyphs, shape, tf.constant([[1, 3]], tf.int64))
    np.testing.assert_allclose(both[0][1], alone[0][0], atol=1e-6)
    np.testing.assert_array_equal(both[1][1], alone[1][0])
    assert not np.array_equal(both[0][0], both[0][1])


def test_glyphs_become_squares_of_the_height_and_stay_within_0_and_1():
    pixels = np.zeros([2, 28, 28, 1], np.float32)
    pixels[:, ::2] = 1
    glyphs = fit_glyphs(Glyphs(pixels, np.array([3, 4], np.int32), 10), 14)
    assert glyphs.pixels.shape == (2, 14, 14, 1)
    # Every other row is ink: antialiased, they are all half gray.
    np.testing.assert_allclose(glyphs.pixels[:, 2:-2], 0.5, atol=0.1)
    np.testing.assert_array_equal(glyphs.labels, [3, 4])


@pytest.mark.slow
def test_emnist_is_set_upright_and_all_its_classes_have_logits(
    config, tmp_path
):
    write_metadata("emnist/balanced", str(tmp_path), ["train", "test"])
    config = dataclasses.replace(
        config, dataset="emnist/balanced", data_dir=str(tmp_path)
    )

    def as_dataset(self, *args, **kwargs):
        # As stored: ink in the first columns, so upright in the first rows.
        image = tf.repeat(tf.range(28)[None] < 9, 28, axis=0)
        image = tf.cast(image[..., None], tf.uint8) * 255
        encoded = tf.io.encode_png(image)
        return tf.data.Dataset.range(12).map(
            lambda i: {"image": encoded, "label": 46 - i}
        )

    with tfds.testing.mock_data(
        as_dataset_fn=as_dataset, data_dir=str(tmp_path)
    ):
        for glyphs in recipe._read_glyphs(config):
            assert glyphs.pixels.shape == (12, 8, 8, 1)
            assert glyphs.pixels[:, :2].min() > 0.9
            assert glyphs.pixels[:, 4:].max() < 0.1
        train, _ = recipe.make_datasets(config)
        labels = np.concatenate([y for _, y in train])
        assert 36 <= labels[labels > 0].min() <= labels.max() <= 47
        assert recipe.build_model(config).output_shape == (None, 8, 48)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"line_height": 10}, "line_height=10; expected a multiple of 4"),
        ({"line_height": 4}, "line_height=4 is out of range"),
        ({"line_width": 30}, "line_width=30; expected a multiple of 4"),
        ({"line_width": 0}, "line_width=0 is out of range"),
        ({"max_characters": 0}, "max_characters=0 is out of range"),
        ({"channels": (8,)}, "two or more"),
        ({"width": 10, "num_heads": 4}, "width=10"),
        ({"dataset": "emnst"}, "Unknown data set"),
        ({"dataset": "cifar10"}, "grayscale"),
    ],
)
def test_bad_input_is_one_line(config, tmp_path, flags, message):
    write_metadata("cifar10", str(tmp_path), ["train", "test"])
    with pytest.raises(tfamp.InputError, match=message) as caught:
        recipe.make_datasets(
            dataclasses.replace(config, data_dir=str(tmp_path), **flags)
        )
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_saved_model_is_loaded_with_its_loss_and_metrics(config, tmp_path):
    model = recipe.build_model(config)
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "reader.keras")
    loaded = tfamp.load_model(tmp_path / "reader.keras")
    assert isinstance(loaded.loss, ctc.LineCTC)
    _, batches = recipe.make_datasets(config)
    lines, labels = next(iter(batches))
    loaded.compute_metrics(lines, labels, loaded(lines))
    model.compute_metrics(lines, labels, model(lines))
    assert loaded.get_metrics_result() == model.get_metrics_result()
