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


def reads_of(function, *shapes):
    specs = [tf.TensorSpec(shape) for shape in shapes]
    traced = tf.function(function, autograph=False)
    graph = traced.get_concrete_function(*specs).graph.as_graph_def()
    return audit.host_reads(graph)


def test_branches_and_loops_on_what_a_gpu_computed_are_reads_of_the_host():
    def branch(x):
        return tf.cond(tf.reduce_sum(x) > 0, lambda: x, lambda: -x)

    def loop(x):
        return tf.while_loop(lambda y: tf.reduce_sum(y) < 9, tf.exp, [x])

    (found,) = reads_of(branch, [3])
    assert found == "Greater -> StatelessIf.cond"
    (found,) = reads_of(loop, [3])
    assert found == "Less -> StatelessWhile.cond"


def test_what_the_host_has_anyway_is_no_read():
    def branch(x):
        return tf.cond(tf.shape(x)[0] > 2, lambda: x, lambda: -x)

    def loop(x):
        return tf.while_loop(
            lambda i, _: i < 3, lambda i, y: (i + 1, tf.exp(y)), [0, x]
        )

    assert reads_of(branch, [None]) == []
    assert reads_of(loop, [3]) == []


class Branching(keras.layers.Layer):
    """Asks the device which way to go."""

    def call(self, x):
        return tf.cond(tf.reduce_sum(x) > 0, lambda: x, lambda: 2 * x)


def test_a_step_s_own_reads_are_two_and_a_layer_s_are_counted():
    def reads(layer):
        model = keras.Sequential(
            [keras.Input((3,)), layer, keras.layers.Dense(1)]
        )
        model.compile("adam", "mse")
        data = tf.data.Dataset.from_tensors((tf.ones([4, 3]), tf.ones([4, 1])))
        return audit.host_reads(audit.training_graph(model, data))

    own = reads(keras.layers.Dense(3))
    assert len(own) == 2, own
    planted = reads(Branching())
    assert len(planted) == 3, planted


@pytest.mark.long
@pytest.mark.parametrize("precision", audit.PRECISIONS)
@pytest.mark.parametrize("name", audit.RECIPES)
def test_a_recipe_runs_on_a_gpu(name, precision):
    _, _, others, _ = audit.audit(name, precision)
    assert others == []
