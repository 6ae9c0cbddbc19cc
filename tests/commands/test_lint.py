"""`tfamp lint` as a user types it: text, JSON, SARIF, exit statuses."""

import json
import pathlib
import re

import pytest

from tfamp import cli
from tfamp.analysis.lint.check import RULES
from tfamp.analysis.lint.findings import Finding
from tfamp.analysis.lint.sarif import sarif_log
from tfamp.analysis.shadow.report import MADE_ERROR

RECIPE = """
import dataclasses

import keras
import tensorflow as tf
from keras import layers

import tfamp


@dataclasses.dataclass(frozen=True)
class Config(tfamp.recipe.RunConfig):
    dataset: str = "none"
    strategy: str = "one_device"
    precision: str = "mixed_float16"
    is_mended: bool = False


class Gate(layers.Layer):
    def call(self, x):
        return x * keras.ops.softmax(x)


def make_datasets(config):
    print("makes data")
    examples = tf.ones((8, 8)), tf.zeros((8,), tf.int32)
    batches = tf.data.Dataset.from_tensor_slices(examples).batch(4)
    return batches, batches


def build_model(config):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8)])
    if not config.is_mended:
        model.add(Gate(name="gate"))
        model.add(
            layers.Dense(
                10, activation="softmax", name="classes"
            )
        )
        model.add(layers.Flatten(dtype="float32"))
    else:
        model.add(layers.Dense(10))
        tfamp.keep_float32(model)
    model.compile(
        optimizer=tfamp.wrap_optimizer("sgd"),
        loss=keras.losses.SparseCategoricalCrossentropy(config.is_mended),
        metrics=["accuracy"],
        auto_scale_loss=False,
    )
    return model


def train(config):
    return {}
"""


def line_of(text):
    lines = RECIPE.splitlines()
    return 1 + next(i for i, line in enumerate(lines) if text in line)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("planted.py").write_text(RECIPE)
    return "planted.py"


def run(capsys, *argv):
    status = cli.main(argv)
    out, err = capsys.readouterr()
    return status, out, err


def test_findings_are_told_by_rule_with_layer_and_fix(capsys, recipe):
    status, out, err = run(capsys, "lint", recipe)
    assert status == 1
    blocks = out.split("\n\n")
    assert [block.split("\n")[0] for block in blocks] == [
        "error  sensitive-output",
        "warning  hidden-softmax",
        "1 error, 1 warning",
    ]
    assert "classes" in blocks[0]
    assert "tfamp.keep_float32(model)" in blocks[0]
    # The line of the recipe on which the softmax is.
    assert re.search(r"gate  \S+\.py:21\n", blocks[1])
    assert "tfamp.keep_float32(model)" in blocks[1]
    assert "makes data" in err


def test_a_clean_recipe_exits_with_0(capsys, recipe):
    status, out, _ = run(
        capsys, "lint", recipe, "--run", "--config.is_mended=true"
    )
    assert (status, out) == (0, "nothing found\n")


def test_warnings_alone_exit_with_0_and_json_is_strict(capsys, recipe):
    text = RECIPE.replace('activation="softmax", ', 'dtype="float32", ')
    pathlib.Path(recipe).write_text(text)
    status, out, _ = run(capsys, "lint", recipe, "--json")
    report = json.loads(out)
    assert status == 0
    assert report["schema"] == "tfamp.lint/1"
    assert report["recipe"] == recipe
    assert report["precision"] == "mixed_float16"
    assert report["replicas"] == 1
    assert report["counts"] == {"error": 0, "warning": 1, "info": 0}
    (finding,) = report["findings"]
    assert set(finding) == {
        "rule",
        "severity",
        "layer",
        "message",
        "fix",
        "line",
    }
    assert (finding["rule"], finding["layer"]) == ("hidden-softmax", "gate")


def test_sarif_points_at_the_lines_that_make_the_layers(capsys, recipe):
    status, out, _ = run(capsys, "lint", recipe, "--sarif=out.sarif")
    assert status == 1
    assert "sensitive-output" in out
    log = json.loads(pathlib.Path("out.sarif").read_text())
    assert log["version"] == "2.1.0"
    (found,) = log["runs"]
    driver = found["tool"]["driver"]
    assert driver["name"] == "tfamp lint"
    assert [r["id"] for r in driver["rules"]] == [
        r.name for r in (*RULES, MADE_ERROR)
    ]
    first, second = found["results"]
    for result, rule, level, line in (
        # The call begins on the line before its arguments.
        (first, "sensitive-output", "error", line_of('"classes"') - 1),
        (second, "hidden-softmax", "warning", line_of('Gate(name="gate")')),
    ):
        assert (result["ruleId"], result["level"]) == (rule, level)
        assert driver["rules"][result["ruleIndex"]]["id"] == rule
        assert result["message"]["text"]
        (location,) = result["locations"]
        place = location["physicalLocation"]
        assert place["artifactLocation"]["uri"] == recipe
        assert place["region"]["startLine"] == line
    assert not list(pathlib.Path().glob("*.tmp"))


@pytest.mark.parametrize(
    ("layer", "layer_type", "text"),
    [
        ("", "", "model.compile("),
        ("outer/gate/inner", "Dense", 'Gate(name="gate")'),
        ("flatten", "Flatten", "layers.Flatten("),
        ("dense", "Dense", "def build_model"),
        ("other", "Unknown", "def build_model"),
        ("gate_1", "Config", "class Config"),
    ],
)
def test_a_finding_without_a_name_is_as_near_as_can_be(
    recipe, layer, layer_type, text
):
    finding = Finding("not-traced", "info", layer, "message", "fix")
    source = pathlib.Path(recipe)
    log = sarif_log([finding], RULES, source, {layer: layer_type})
    (result,) = log["runs"][0]["results"]
    assert result["level"] == "note"
    region = result["locations"][0]["physicalLocation"]["region"]
    assert region["startLine"] == line_of(text)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["lint"], ["RECIPE"]),
        (["lint", "absent.py"], ["absent.py"]),
        (["lint", "planted.py", "--sarif=no/out.sarif"], ["no/out.sarif"]),
        (["lint", "planted.py", "--sarif=."], ["--sarif=."]),
        (["lint", "planted.py", "--config.nonsense=1"], ["nonsense"]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, recipe, argv, words):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
