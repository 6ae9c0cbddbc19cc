"""A `.keras` file where commands expect a recipe."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfamp import cli


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With model.keras, saved in float32, and data.npz of 6 rows."""
    monkeypatch.chdir(tmp_path)
    model = keras.Sequential(
        [
            keras.Input([3], name="features"),
            keras.layers.Dense(4, "relu", name="hidden"),
            keras.layers.Dense(2, "softmax", name="probabilities"),
        ]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.save("model.keras")
    x = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")
    np.savez("data.npz", x=x, y=np.arange(6) % 2)
    return tmp_path


def run(capsys, *argv):
    status = cli.main(argv)
    out, err = capsys.readouterr()
    return status, out, err


def test_lint_looks_at_a_model_without_data_as_it_was_saved(folder, capsys):
    status, out, _ = run(capsys, "lint", "model.keras", "--json")
    report = json.loads(out)
    assert (status, report["precision"]) == (0, "float32")
    assert report["recipe"] == "model.keras"


def test_lint_loads_it_in_another_precision(folder, capsys):
    argv = ["lint", "model.keras", "--precision=bf16", "--json"]
    _, out, _ = run(capsys, *argv)
    assert json.loads(out)["precision"] == "mixed_bfloat16"


def test_compare_runs_a_step_of_its_rows(folder, capsys):
    argv = ["compare", "model.keras", "--precision=mixed_float16"]
    status, out, _ = run(capsys, *argv, "--data=data.npz", "--json")
    report = json.loads(out)
    assert (status, report["schema"]) == (0, "tfamp.compare/1")
    assert report["operations"] > 2


def test_export_runs_its_files_on_the_rows(folder, capsys):
    argv = ["export", "model.keras", "--data=data.npz", "--formats=keras"]
    argv += ["--output_dir=out"]
    status, out, err = run(capsys, *argv, "--json")
    report = json.loads(out)
    assert (status, report["recipe"]) == (0, "model.keras")
    (row,) = report["files"]
    assert (row["rows"], row["problem"], row["verdict"]) == (6, None, "inside")
    assert (report["metric"], report["examples"]) == ("loss", 6)
    assert "not trained" not in err
    assert (folder / "out" / "keras-none.keras").exists()


@pytest.mark.slow
def test_probe_measures_it_and_leaves_a_report(folder, capsys):
    argv = ["probe", "model.keras", "--data=data.npz", "--batch_size=3"]
    argv += ["--steps=2", "--output_dir=out", "--json", "--tensorboard"]
    status, out, err = run(capsys, *argv)
    assert status == 0
    report = json.loads(out)
    assert report["steps"] == 2
    assert {t["layer"] for t in report["tensors"]} >= {"hidden"}
    assert "measuring 2 steps" in err
    page = (folder / "out" / "report.html").read_text()
    assert "model.keras" in page.partition("</h1>")[0]
    (events,) = (folder / "out" / "tensorboard").iterdir()
    found = {}
    for line in tf.data.TFRecordDataset([str(events)]):
        event = tf.compat.v1.Event.FromString(line.numpy())
        for value in event.summary.value:
            assert value.metadata.plugin_data.plugin_name == "histograms"
            found[value.tag] = tf.make_ndarray(value.tensor)
    kernel = found["gradient/hidden/kernel"]
    (tensor,) = (
        t
        for t in report["tensors"]
        if (t["kind"], t["layer"], t["name"])
        == ("gradient", "hidden", "kernel")
    )
    # From, to, how many: 2 steps of 3 x 4 weights, less exact zeros.
    assert (kernel[:, 1] - kernel[:, 0] == 1).all()
    assert kernel[0, 0] == tensor["histogram"]["first_exponent"]
    assert kernel[:, 2].sum() == 24 - tensor["zeros"]


def test_several_inputs_are_found_by_their_names(folder, capsys):
    left, right = keras.Input([2], name="left"), keras.Input([2], name="right")
    y = keras.layers.Dense(1)(keras.layers.Concatenate()([left, right]))
    model = keras.Model({"left": left, "right": right}, y)
    model.compile("sgd", "mse")
    model.save("two.keras")
    ones = np.ones((4, 2), "float32")
    rows = {"x/left": ones, "x/right": ones, "y": ones[:, :1]}
    np.savez("two.npz", sample_weight=ones[:, 0], **rows)
    argv = ["compare", "two.keras", "--precision=mixed_bfloat16"]
    assert run(capsys, *argv, "--data=two.npz")[0] == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["compare", "model.keras"], "--data=FILE.npz"),
        (["probe", "model.keras", "--output_dir=o"], "--data=FILE.npz"),
        (["lint", "model.keras", "--run"], "--data=FILE.npz"),
        (["export", "model.keras", "--output_dir=o"], "--data=FILE.npz"),
        (["lint", "modle.keras"], "Did you mean model.keras?"),
        (["lint", "model.keras", "--data=none.npz"], "cannot be read"),
        (["lint", "model.keras", "--data=array.npy"], "without a name"),
        (["lint", "model.keras", "--data=other.npz"], "holds images, y"),
        (["lint", "model.keras", "--data=uneven.npz"], "x 2, y 3"),
        (["lint", "model.keras", "--modules=no_such"], "no_such"),
        (["lint", "model.keras", "--dat=x"], "Did you mean --data?"),
        (["lint", "own.keras"], "--modules names the modules"),
        (["bench", "model.keras", "--output_dir=o"], "tfamp new my_model"),
        (["parity", "model.keras", "--output_dir=o"], "tfamp new my_model"),
        (["memory", "model.keras"], "tfamp new my_model"),
    ],
)
def test_what_is_missing_is_one_line(folder, capsys, argv, words):
    np.save("array.npy", np.ones(3))
    np.savez("other.npz", images=np.ones(3), y=np.ones(3))
    np.savez("uneven.npz", x=np.ones((2, 3)), y=np.ones(3))

    class Own(keras.layers.Layer):
        pass

    keras.Sequential([keras.Input([3]), Own()]).save("own.keras")
    status, _, err = run(capsys, *argv)
    last = err.splitlines()[-1]
    assert (status, last[:7]) == (2, "tfamp: ")
    assert words in last
