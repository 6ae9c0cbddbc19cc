"""The table of bytes says what the variables of a training take."""

import json

import keras
import numpy as np
import pytest

import tfamp
from tfamp import cli, keras_internals
from tfamp.analysis.memory import arithmetic
from tfamp.training.narrow_weights import in_16_bits

RECIPE = """
import dataclasses
import numpy as np
import keras
import tensorflow as tf
import tfamp


@dataclasses.dataclass(frozen=True)
class Config(tfamp.recipe.RunConfig):
    dataset: str = "none"
    batch_size: int = 4


def make_datasets(config):
    rows = np.zeros((8, 6), "float32"), np.zeros(8, "int32")
    data = tf.data.Dataset.from_tensor_slices(rows).batch(config.batch_size)
    return data, data


def build_model(config):
    model = keras.Sequential(
        [
            keras.Input([6]),
            keras.layers.Dense(9, activation="relu"),
            keras.layers.Dense(3, dtype="float32"),
        ]
    )
    model.compile(
        tfamp.wrap_optimizer("adam", shard=config.shard == "on"),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        auto_scale_loss=False,
    )
    return model


def train(config):
    return {}
"""
# Two kernels with biases: 54, 9, 27 and 3 weights, the first two in 16 bits.
NARROW, WIDE = 54 + 9, 27 + 3
# Stretches of a fourth: 14, 3, 7 and 1.
STRETCHES = 14 + 3 + 7 + 1


def test_the_table_is_right(tmp_path, capsys):
    path = tmp_path / "tiny.py"
    path.write_text(RECIPE)
    arguments = ["--replicas=1,4", "--precisions=mixed_bfloat16", "--json"]
    assert cli.main(["memory", str(path), *arguments]) == 0
    rows = json.loads(capsys.readouterr().out)["devices"]
    by_row = {(row["shard"], row["replicas"]): row for row in rows}
    assert len(by_row) == 4
    whole, shared = by_row[False, 4], by_row[True, 4]
    assert whole["weights_bytes"] == 4 * (NARROW + WIDE)
    assert whole["masters_bytes"] == 0
    assert whole["moments_bytes"] == 8 * (NARROW + WIDE)
    assert shared["weights_bytes"] == 2 * NARROW + 4 * WIDE
    assert shared["masters_bytes"] == 4 * STRETCHES
    assert shared["moments_bytes"] == 8 * STRETCHES
    # The 16-bit copy of a kernel is the kernel.
    assert whole["kept_bytes"] - shared["kept_bytes"] in (0, 2 * 54, 2 * NARROW)
    assert by_row[False, 1]["total_bytes"] == whole["total_bytes"]


def test_seven_billion_weights_fit_eight_devices_in_shards_only():
    for shard, fits in ((False, False), (True, True)):
        counted = arithmetic.of_size("mixed_bfloat16", shard, 7e9, moments=2)
        found = arithmetic.on_device(counted, 8)
        assert (found.total < 80e9) == fits
    # 2 + 12 / 8 bytes a weight, and a gradient of 4.
    assert found.total == pytest.approx(7e9 * (2 + 12 / 8 + 4))


@pytest.mark.slow
def test_the_variables_of_a_training_take_that(mirrored):
    tfamp.set_precision("mixed_bfloat16")
    strategy = mirrored(4)
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([6]), keras.layers.Dense(9), keras.layers.Dense(3)]
        )
        optimizer = tfamp.wrap_optimizer("adam", shard=True)
        model.compile(optimizer, "mse", auto_scale_loss=False)
        optimizer.build(model.trainable_variables)
    spec = (keras.KerasTensor((4, 6)), keras.KerasTensor((4, 3)))
    with in_16_bits(model, spec):
        held = [
            component
            for variable in (
                *map(keras_internals.stored, model.trainable_variables),
                *(v.value for v in optimizer.shards.masters),
                *(
                    v.value
                    for v in optimizer.inner_optimizer.variables
                    if v.shape.rank
                ),
            )
            for component in strategy.experimental_local_results(variable)
            if component.device.endswith("CPU:3")
        ]
        measured = sum(int(np.prod(c.shape)) * c.dtype.size for c in held)
    assert measured == 2 * (NARROW + WIDE) + 12 * STRETCHES
