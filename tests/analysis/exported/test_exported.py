"""The metric of files, by pieces of the data."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tfamp import cli
from tfamp.analysis.exported import measure, pieces, verdict

RECIPE = '''
"""A tiny one."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

import tfamp


@dataclasses.dataclass(frozen=True)
class Config(tfamp.recipe.RunConfig):
    """Flags."""

    dataset: str = tfamp.recipe.flag("signs", "the only one")
    size: float = tfamp.recipe.flag(1.0, "of the outputs")


def make_datasets(config):
    x = np.random.default_rng(0).normal(size=(48, 4)).astype("float32")
    y = (x[:, 0] > 0).astype("int32")
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    return data, data


def build_model(config):
    model = keras.Sequential(
        [
            keras.Input([4]),
            keras.layers.Dense(2, use_bias=False, name="head"),
        ]
    )
    model.set_weights([np.float32([[-1, 1], [0, 0], [0, 0], [0, 0]])])
    model.layers[0].kernel.assign(model.layers[0].kernel * config.size)
    model.compile(
        tfamp.wrap_optimizer(keras.optimizers.SGD(0.1)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        auto_scale_loss=False,
    )
    return model


def train(config):
    return {}
'''


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(RECIPE)
    return str(path)


def test_pieces_are_the_metrics_of_their_rows():
    inputs = keras.Input([1])
    model = keras.Model(inputs, keras.layers.Activation("linear")(inputs))
    model.compile(loss="mae", metrics=["mse"])
    x = np.float32([[0], [1], [2], [3]])
    data = pieces.read(
        tf.data.Dataset.from_tensor_slices((x, np.zeros_like(x))).batch(4), None
    )

    found = pieces.values(model, data, [[x]])

    assert found["loss"] == [0, 1, 2, 3]
    assert found["mse"] == [0, 1, 4, 9]


def test_verdicts_are_those_of_an_equivalence_test():
    reference = [0.5 + i / 100 for i in range(20)]
    near = [x + (-1) ** i * 0.001 for i, x in enumerate(reference)]
    far = [x + 0.1 + (-1) ** i * 0.001 for i, x in enumerate(reference)]
    wild = [x + (-1) ** i * 0.1 for i, x in enumerate(reference)]

    def word(found):
        return verdict.judged(found, reference, 0.01, 0.05).word

    assert word(reference) == "inside"
    assert word(near) == "inside"
    assert word(far) == "outside"
    assert word(wild) == "not shown"
    assert word([float("nan"), *near[1:]]) == "outside"


def test_the_command_writes_files_that_run(recipe, tmp_path, fits_schema):
    folder = tmp_path / "out"

    status = cli.main(
        [
            "export",
            recipe,
            "--formats=saved_model,keras",
            f"--output_dir={folder}",
            "--strategy=one_device",
            "--config.precision=mixed_bfloat16",
        ]
    )

    record = json.loads((folder / "export.json").read_text())
    fits_schema(record)
    assert status == 0
    assert record["passed"]
    assert record["metric"] == "accuracy"
    for row in record["files"]:
        assert (folder / row["path"]).exists()
        assert row["metric"] == 1.0
        assert row["verdict"] == "inside"
    assert (folder / "report.html").exists()


def test_what_is_outside_of_the_margin_ends_with_1(
    recipe, tmp_path, monkeypatch
):
    right = measure.exporting.opened

    def wrong(report, model):
        run = right(report, model)
        return lambda batch: [-x for x in run(batch)]

    monkeypatch.setattr(measure.exporting, "opened", wrong)
    folder = tmp_path / "out"
    arguments = [f"--output_dir={folder}", "--strategy=one_device"]

    assert cli.main(["export", recipe, *arguments]) == 1

    (row,) = json.loads((folder / "export.json").read_text())["files"]
    assert row["metric"] == 0.0
    assert row["verdict"] == "outside"


def test_a_format_that_cannot_be_is_a_row_and_ends_with_1(recipe, tmp_path):
    folder = tmp_path / "out"
    status = cli.main(
        [
            "export",
            recipe,
            "--quantize=int8",
            f"--output_dir={folder}",
            "--strategy=one_device",
        ]
    )
    plain, quantized = json.loads((folder / "export.json").read_text())["files"]
    assert status == 1
    assert plain["problem"] is None
    assert "no quantizer" in quantized["problem"]


def test_a_trained_file_gives_its_weights(recipe, tmp_path):
    model = keras.Sequential(
        [keras.Input([4]), keras.layers.Dense(2, use_bias=False)]
    )
    model.set_weights([np.float32([[1, -1], [0, 0], [0, 0], [0, 0]])])
    model.save(tmp_path / "trained.keras")
    folder = tmp_path / "out"
    cli.main(
        [
            "export",
            recipe,
            f"--checkpoint={tmp_path / 'trained.keras'}",
            f"--output_dir={folder}",
            "--strategy=one_device",
        ]
    )
    record = json.loads((folder / "export.json").read_text())
    # Of the recipe's own weights it would be 1.
    assert record["files"][0]["metric"] == 0.0
    assert record["files"][0]["reference"] == 0.0


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--formats=onxx", "unknown 'onxx'"),
        ("--quantize=int3", "unknown 'int3'"),
        ("--checkpoint=missing.keras", "is not there"),
        ("--margin=0", "margin"),
        ("--steps=0", "--steps"),
    ],
)
def test_bad_arguments_are_one_line(argument, said, recipe, tmp_path, capsys):
    status = cli.main(
        [
            "export",
            recipe,
            argument,
            f"--output_dir={tmp_path / 'out'}",
            "--strategy=one_device",
        ]
    )
    assert status == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_hardly_anything_quantized_is_said(tmp_path):
    model = keras.Sequential(
        [
            keras.Input([6, 6, 2]),
            keras.layers.Conv2D(8, 3),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2),
        ]
    )
    model.compile(loss="mse")
    x = np.random.default_rng(0).normal(size=(8, 6, 6, 2)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, x[:, 0, 0])).batch(4)

    record = measure.measure(
        model,
        data,
        data,
        tmp_path,
        measure.Question(["keras"], kinds=["int8"], margin=10.0),
        say=lambda text: None,
    )

    row = record["files"][1]
    assert row["quantized_share"] == pytest.approx(16 / (16 + 144 + 8 + 2))
    assert "only 9%" in row["note"]


def test_public_name():
    assert tfamp.export.__name__ == "export"
