"""A model in what other hardware computes in."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.analysis.exported.test_exported import recipe  # noqa: F401
from tfamp import cli
from tfamp.analysis.portability import measure

# 17 * 2**12, which bfloat16 holds exactly.
LARGE = 69632.0


def large(precision):
    with tfamp.precision_scope(precision):
        model = keras.Sequential(
            [keras.Input([2]), keras.layers.Dense(1, use_bias=False)]
        )
    model.set_weights([np.float32([[LARGE], [0]])])
    model.compile(loss="mae")
    return model


def data():
    x = np.float32([[1, i] for i in range(8)])
    y = np.full([8, 1], LARGE, "float32")
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(4)


def test_an_output_beyond_float16_fails_a_t4_and_passes_an_h100():
    record = measure.measure(
        large,
        data(),
        measure.devices(["T4", "H100", "tpu v5e", "cpu"]),
        margin=1.0,
        say=lambda text: None,
    )

    found = {row["device"]: row for row in record["devices"]}
    assert not record["passed"]
    assert found["T4"]["precision"] == "mixed_float16"
    assert found["T4"]["verdict"] == "outside"
    assert found["T4"]["not_finite"] == 8
    for device in ("H100", "tpu v5e", "cpu"):
        assert found[device]["verdict"] == "inside"
        assert found[device]["largest_difference"] == 0.0


def test_without_a_metric_the_outputs_are_judged():
    def plain(precision):
        model = large(precision)
        model.compile()
        return model

    def own(precision):
        class Own(keras.Model):
            def test_step(self, batch):
                return {}

        inner = plain(precision)
        model = Own(inner.inputs, inner.outputs)
        model.compile()
        return model

    record = measure.measure(
        own, data(), measure.devices(["H100"]), say=lambda text: None
    )
    assert record["metric"] is None
    assert record["passed"]


def test_unknown_hardware_is_named():
    with pytest.raises(tfamp.InputError, match="'Z80'"):
        measure.devices(["Z80"])


@pytest.mark.slow
def test_the_command_ends_with_1_where_a_device_fails(
    recipe,  # noqa: F811
    tmp_path,
    fits_schema,
):
    folder = tmp_path / "out"
    arguments = [
        recipe,
        "--assume=T4,H100",
        f"--output_dir={folder}",
        "--strategy=one_device",
    ]

    assert cli.main(["portability", *arguments]) == 0
    fits_schema(json.loads((folder / "portability.json").read_text()))
    assert cli.main(["portability", *arguments, "--size=1e6"]) == 1

    record = json.loads((folder / "portability.json").read_text())
    fits_schema(record)
    assert [row["verdict"] for row in record["devices"]] == [
        "outside",
        "inside",
    ]
    assert (folder / "report.html").exists()
