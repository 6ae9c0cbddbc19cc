"""What is in a functional model, and what it takes, is found."""

import keras
import numpy as np
from keras import layers

from tfamp import keras_internals


def test_what_a_model_takes():
    a, b = keras.Input([2], name="one"), keras.Input([3], name="two")
    total = keras.ops.sum(a, -1) + keras.ops.sum(b, -1)
    model = keras.Model({"one": a, "two": b}, total)
    structure = keras_internals.input_structure(model)
    assert structure["one"].shape == (None, 2)
    assert keras_internals.input_name(structure["two"]) == "two"
    assert isinstance(model, keras_internals.Functional)
    operations = keras_internals.graph_operations(model)
    assert "Sum" in {type(each).__name__ for each in operations}
    assert keras_internals.input_structure(keras.Sequential()) is None
    assert keras_internals.graph_inputs(model)["one"] is structure["one"]
    steps = keras_internals.graph_steps(model)
    assert len(steps) == 3
    assert keras.tree.flatten(steps[-1][1])[0] is total

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x["rows"])

    own = Own()
    assert keras_internals.called_shapes(own) is None
    own({"rows": np.zeros([2, 3], "float32")})
    assert keras_internals.called_shapes(own)["rows"] == (2, 3)


def test_a_sequential_without_an_input_rounds_to_its_first_layers_dtype(
    tmp_path,
):
    keras.config.set_dtype_policy("mixed_bfloat16")
    x = np.array([[257.0]], "float32")
    model = keras.Sequential([layers.Identity(dtype="mixed_bfloat16")])
    assert keras_internals.input_dtype(model) is None
    model(x)
    assert keras_internals.input_dtype(model) == "bfloat16"
    model.layers[0].dtype_policy = "float32"
    np.testing.assert_array_equal(model(x), [[256.0]])
    keras_internals.set_input_dtype(model, "float32")
    np.testing.assert_array_equal(model(x), x)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert keras_internals.input_dtype(loaded) == "float32"
    own = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    assert keras_internals.input_dtype(own) == "float32"
    assert keras_internals.input_dtype(layers.Dense(1)) is None


def test_inputs_and_values_are_of_another_dtype_for_a_while():
    inputs = keras.Input([2], dtype="float16", name="x")
    dense = keras.layers.Dense(2, dtype="bfloat16")
    model = keras.Sequential([inputs, dense])
    kernel = np.float32(dense.kernel)

    with (
        keras_internals.input_dtypes_replaced([model], {"float16": "float32"}),
        keras_internals.values_replaced([dense.kernel], "float32"),
    ):
        assert keras_internals.input_structure(model).dtype == "float32"
        assert dense.kernel.value.dtype == "float32"
        np.testing.assert_array_equal(dense.kernel, kernel)

    assert keras_internals.input_structure(model).dtype == "float16"
    assert dense.kernel.value.dtype == "bfloat16"
