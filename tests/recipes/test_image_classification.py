import dataclasses
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

import tfamp
from recipes import image_classification as recipe
from recipes.data import loading
from tests.conftest import first_always, mostly_long
from tfamp.precision.policy import PRECISIONS


@pytest.fixture
def config(digits_dir):
    """Two steps on the digits."""
    return recipe.Config(
        precision="float32", data_dir=digits_dir, batch_size=716, epochs=1
    )


@pytest.fixture
def tiny_model(monkeypatch):
    """A network that is traced in no time, in place of ResNet-20."""

    def net(x, num_classes):
        for width in (16, 32):
            x = recipe._normalize(recipe._conv(x, width, 3, 2), relu=True)
        return recipe._head(x, num_classes)

    monkeypatch.setattr(recipe, "resnet_small", net)


def first_batches(config, count=1):
    train, _ = recipe.make_datasets(config)
    return [tuple(t.numpy() for t in batch) for batch in train.take(count)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "num_devices"),
    mostly_long(
        itertools.product(PRECISIONS, (1, 2)),
        always=[("mixed_float16", 2)],
    ),
)
def test_two_steps_train_in_every_precision_on_one_and_two_replicas(
    config, tiny_model, precision, num_devices
):
    config = dataclasses.replace(
        config, precision=precision, num_devices=num_devices
    )
    results = recipe.train(config)
    assert set(results) == {"accuracy", "loss", "skipped_steps", "loss_scale"}
    assert 0 <= results["accuracy"] <= 1
    assert np.isfinite(results["loss"])
    assert results["skipped_steps"] == 0
    scale = 2.0**16 if precision == "mixed_float16" else 1.0
    assert results["loss_scale"] == scale


@pytest.mark.slow
def test_training_learns_and_ends_with_the_averaged_weights(
    config, tiny_model, monkeypatch
):
    models = []
    build = recipe.build_model

    def build_and_keep(config):
        models.append(build(config))
        return models[-1]

    monkeypatch.setattr(recipe, "build_model", build_and_keep)
    config = dataclasses.replace(config, batch_size=64, epochs=6)
    results = recipe.train(config)
    assert results["accuracy"] > 0.5

    (model,) = models
    averages = [
        v
        for v in model.optimizer.inner_optimizer.variables
        if v.path.endswith("average")
    ]
    weights = model.trainable_variables
    assert len(averages) == len(weights)
    for average, weight in zip(averages, weights, strict=True):
        np.testing.assert_array_equal(average, weight)


@pytest.mark.slow
def test_one_seed_gives_one_result_and_another_seed_another(config, tiny_model):
    first, again = recipe.train(config), recipe.train(config)
    assert first == again
    other = recipe.train(dataclasses.replace(config, seed=1))
    assert other["loss"] != first["loss"]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    first_always(
        [
            ("float32", "float32"),
            ("mixed_bfloat16", "bfloat16"),
            ("mixed_float16", "float16"),
        ],
        1,
    ),
)
def test_images_come_in_the_compute_dtype_and_labels_one_hot(
    config, precision, dtype
):
    tfamp.set_precision(precision)
    ((pixels, labels),) = first_batches(config)
    assert pixels.shape == (716, 8, 8, 1)
    assert pixels.dtype == np.dtype(dtype)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    assert labels.shape == (716, 10)
    np.testing.assert_array_equal(labels.sum(axis=1), 1.0)


def test_evaluation_covers_every_test_image_unchanged(config):
    _, batches = recipe.make_datasets(config)
    pixels = np.concatenate([x for x, _ in batches])
    labels = np.concatenate([y for _, y in batches]).argmax(axis=1)
    data = loading.load("digits", config.data_dir)
    stored = [(data.decode(e).numpy(), int(y)) for e, y in data.read("test")]
    np.testing.assert_array_equal(labels, [y for _, y in stored])
    np.testing.assert_allclose(
        (pixels + 1) / 2 * 255, [x for x, _ in stored], atol=1e-3
    )


@pytest.mark.slow
def test_the_training_data_repeat_with_the_seed_and_change_by_epoch(config):
    def epochs():
        keras.utils.set_random_seed(0)
        train, _ = recipe.make_datasets(config)
        return [next(iter(train))[0].numpy() for _ in range(2)]

    first, again = epochs(), epochs()
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])


def test_grayscale_images_are_never_mirrored_and_color_images_are(config):
    data = loading.load("digits", config.data_dir)
    assert recipe._augmentation(config, data) == recipe.AFFINE
    assert not recipe.AFFINE.flip
    color = dataclasses.replace(data, image_shape=(32, 32, 3))
    assert recipe._augmentation(config, color) == recipe.CROP_FLIP


def test_weight_decay_spares_norms_and_biases(config, tiny_model):
    config = dataclasses.replace(config, warmup_epochs=0.0, weight_decay=0.5)
    model = recipe.build_model(config)
    for variable in model.trainable_variables:
        variable.assign(np.ones(variable.shape))
    optimizer = model.optimizer
    zeros = [tf.zeros(v.shape) for v in model.trainable_variables]
    optimizer.apply(zeros, model.trainable_variables)
    for variable in model.trainable_variables:
        # A learning rate of 0.1 times a decay of 0.5 takes 5%.
        expected = 0.95 if variable.name == "kernel" else 1.0
        np.testing.assert_allclose(variable, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("warmup_epochs", "rates"),
    # At 0, 1, 2 and 5 epochs. Without warm-up 0.1 (1 + cos(pi t / 5)) / 2.
    [(2.0, [0, 0.05, 0.1, 0]), (0.0, [0.1, 0.0904508, 0.0654508, 0])],
)
def test_the_learning_rate_warms_up_to_its_peak_and_decays_to_zero(
    config, tiny_model, warmup_epochs, rates
):
    config = dataclasses.replace(
        config, batch_size=143, epochs=5, warmup_epochs=warmup_epochs
    )
    optimizer = recipe.build_model(config).optimizer.inner_optimizer
    schedule = keras.optimizers.schedules.deserialize(
        optimizer.get_config()["learning_rate"]
    )
    # 10 steps an epoch.
    np.testing.assert_allclose(
        [float(schedule(step)) for step in (0, 10, 20, 50)], rates, atol=1e-7
    )


@pytest.mark.slow
def test_resnet50_has_the_parameters_of_the_paper(config):
    built = recipe.build_model(
        dataclasses.replace(config, model="resnet50", image_size=64)
    )
    # 25,557,032 for 1000 classes (a head of 2049 each) and 3 input channels.
    parameters = 25_557_032 - 990 * 2049 - 2 * 49 * 64
    trainable = sum(int(np.prod(v.shape)) for v in built.trainable_variables)
    assert trainable == parameters
    assert built.output_shape == (None, 10)


@pytest.mark.slow
def test_all_channels_but_those_of_input_and_output_are_multiples_of_8(config):
    for name in ("resnet_small", "resnet50"):
        model = recipe.build_model(dataclasses.replace(config, model=name))
        for layer in model.layers:
            if isinstance(layer, keras.layers.Conv2D):
                assert layer.filters % 8 == 0


def test_photographs_of_all_sizes_become_crops_of_one_size(
    tmp_path, monkeypatch
):
    data = loading.ImageData(
        builder=tfds.builder("imagenet2012", data_dir=str(tmp_path)),
        image_key="image",
        label_key="label",
        image_shape=(None, None, 3),
        num_classes=1000,
        train_split="train",
        eval_split="validation",
    )
    monkeypatch.setattr(loading.ImageData, "num_examples", lambda *_: 6)
    monkeypatch.setattr(loading.ImageData, "num_bytes", lambda *_: 6)
    monkeypatch.setattr(recipe, "_load", lambda _: data)
    with tfds.testing.mock_data(num_examples=6):
        train, evaluation = recipe.make_datasets(
            recipe.Config(dataset="imagenet2012", batch_size=3, image_size=32)
        )
        for batches in (train, evaluation):
            shapes = [(x.shape, y.shape) for x, y in batches]
            assert shapes == [((3, 32, 32, 3), (3, 1000))] * 2


class FlawedPhotographs(
    tfds.core.GeneratorBasedBuilder, skip_registration=True
):
    """Eight float32 images; the last has the flaw that `flaw` names."""

    VERSION = tfds.core.Version("1.0.0")
    flaw = ""

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(8, 8, 1), dtype=np.float32
                    ),
                    "label": tfds.features.ClassLabel(num_classes=4),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(),
            "test": self._generate_examples(),
        }

    def _generate_examples(self):
        for i in range(8):
            is_bad = i == 7
            image = np.zeros([8, 8, 1], np.float32)
            image[0, 0] = np.nan if is_bad and self.flaw == "nan" else 0.5
            label = -1 if is_bad and self.flaw == "label" else i % 4
            yield i, {"image": image, "label": label}


def run(*flags):
    """The recipe as a program; its exit status."""
    with pytest.raises(SystemExit) as stopped:
        tfamp.recipe.main(
            recipe.train, recipe.Config, ["image_classification", *flags]
        )
    return stopped.value.code


@pytest.mark.parametrize(
    ("flaw", "message"),
    first_always(
        [
            ("nan", "an image with label 3 has 1 pixels"),
            ("label", "label -1 is out of range"),
        ],
        1,
    ),
)
def test_flawed_examples_end_in_one_line_and_status_2(
    tmp_path, tiny_model, monkeypatch, capsys, flaw, message
):
    monkeypatch.setattr(FlawedPhotographs, "flaw", flaw)
    monkeypatch.setitem(loading.EMBEDDED, "flawed", FlawedPhotographs)
    status = run(
        "--dataset=flawed",
        f"--data_dir={tmp_path}",
        "--batch_size=4",
        "--precision=float32",
        "--epochs=1",
    )
    error = capsys.readouterr().err
    assert status == 2
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--dataset=digit", "digits"),
        ("--precision=float12", "mixed_bfloat16"),
        ("--strategy=parameter_server", "mirrored"),
        ("--batch_size=2000", "1437"),
        ("--batch_size=0", "batch_size=0"),
        ("--microbatches=3", "microbatches"),
        ("--label_smoothing=1", "label_smoothing=1"),
        ("--learning_rate=nan", "learning_rate=nan"),
        ("--model=resnet51", "resnet50"),
        ("--epoch=3", "epochs"),
        ("--output_dir=/dev/null/out", "/dev/null/out"),
        ("--eval_split=dev", "'dev'"),
    ],
)
def test_a_bad_flag_ends_in_one_line_and_status_2(
    digits_dir, tiny_model, capsys, flag, message
):
    assert run(f"--data_dir={digits_dir}", "--precision=float32", flag) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.slow
def test_a_run_writes_its_logs_and_prints_what_stays_in_float32(
    digits_dir, tmp_path, tiny_model, capsys
):
    output = tmp_path / "out"
    status = run(
        f"--data_dir={digits_dir}",
        f"--output_dir={output}",
        "--precision=mixed_bfloat16",
        "--batch_size=716",
        "--epochs=1",
    )
    assert status == 0
    printed = capsys.readouterr().out
    assert "precision mixed_bfloat16" in printed
    assert "float32 in 2 layers: normalization" in printed
    assert "final" in printed
    assert (output / "run.json").exists()
    assert (output / "metrics.jsonl").read_text().count("\n") == 1


@pytest.mark.slow
def test_make_datasets_and_build_model_fit_stock_keras(config, tiny_model):
    train, evaluation = recipe.make_datasets(config)
    model = recipe.build_model(config)
    model.fit(train, epochs=1, shuffle=False, verbose=0)
    assert tf.math.is_finite(model.evaluate(evaluation, verbose=0)[0])
