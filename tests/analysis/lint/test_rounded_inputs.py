"""A Sequential without an Input rounds what it takes."""

import keras
import numpy as np
import pytest
from keras import layers

import tfamp


def built(*parts):
    model = keras.Sequential(parts)
    model(np.zeros((2, 4), "float32"))
    return model


def found(model):
    findings = tfamp.lint(model)
    return {
        (each.severity, each.layer)
        for each in findings
        if each.rule == "rounded-inputs"
    }


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_ids_and_raw_columns_are_named_and_mended(precision):
    keras.config.set_dtype_policy(precision)
    ids = built(layers.Embedding(3000, 4), layers.Flatten(), layers.Dense(2))
    columns = built(layers.BatchNormalization(), layers.Dense(2))
    inputs = keras.Input((4,))
    tower = keras.Sequential([layers.Embedding(3000, 4)])
    outputs = layers.Dense(2)(layers.Flatten()(tower(inputs)))
    nested = keras.Model(inputs, outputs)
    assert found(ids) == {("error", ids.name)}
    assert found(columns) == {("warning", columns.name)}
    assert found(nested) == {("error", tower.name)}
    for model in (ids, columns, nested):
        tfamp.keep_float32(model)
        assert not found(model)


def test_what_loses_nothing_by_it_is_not_named():
    keras.config.set_dtype_policy("mixed_bfloat16")
    assert not found(built(layers.Dense(2)))
    own = built(keras.Input((4,)), layers.Embedding(3000, 4), layers.Flatten())
    assert not found(own)
    inputs = keras.Input((4,))
    block = keras.Sequential([layers.BatchNormalization(), layers.Dense(4)])
    assert not found(keras.Model(inputs, block(layers.Dense(4)(inputs))))
