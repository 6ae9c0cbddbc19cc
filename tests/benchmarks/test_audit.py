"""A step's operations have kernels for GPUs, or are on the host on purpose."""

import keras
import pytest
import tensorflow as tf

from benchmarks import audit


class Planted(keras.layers.Layer):
    """Counts edits: an operation that only hosts have."""

    def call(self, x):
        words = tf.sparse.from_dense(tf.cast(x, tf.int64))
        return x + tf.reduce_sum(tf.edit_distance(words, words))


def missing(layer):
    model = keras.Sequential([keras.Input((3,)), layer, keras.layers.Dense(1)])
    model.compile("adam", "mse")
    data = tf.data.Dataset.from_tensors((tf.ones([4, 3]), tf.ones([4, 1])))
    graph = audit.training_graph(model, data)
    return {each.type for each in audit.without_kernel(graph)} - {
        "IteratorGetNext"
    }


def test_a_step_of_dense_layers_runs_on_a_gpu():
    assert missing(keras.layers.Dense(3)) == set()


def test_an_operation_without_a_kernel_is_found():
    assert missing(Planted()) == {"EditDistance"}


def test_a_kernel_for_another_dtype_is_none():
    @tf.function
    def diagonal(x):
        return tf.linalg.diag_part(x)

    def found(dtype):
        spec = tf.TensorSpec([2, 2], dtype)
        graph = diagonal.get_concrete_function(spec).graph.as_graph_def()
        return {each.type for each in audit.without_kernel(graph)}

    assert found(tf.float32) == set()
    assert found(tf.int64) == {"MatrixDiagPartV3"}


@pytest.mark.long
@pytest.mark.parametrize("precision", audit.PRECISIONS)
@pytest.mark.parametrize("name", audit.RECIPES)
def test_a_recipe_runs_on_a_gpu(name, precision):
    _, _, others = audit.audit(name, precision)
    assert others == []
