"""What is traced adds in float32, whatever kernel adds and wherever it is."""

import gc

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context

from tests.conftest import mostly_long, mostly_slow
from tfamp.accumulation import kernels, rewrite
from tfamp.accumulation.trace import summing_in_float32
from tfamp.accumulation.trials import KERNELS

# Above 2048, where float16 stalls, and 256, where bfloat16 does; a number of
# both formats.
ROWS = 3072
PIECE = 2.0**-4
DTYPES = ("bfloat16", "float16")


def in_graph(function, *args):
    """What a function gives in a graph that was changed."""
    return tf.function(summing_in_float32(function), autograph=False)(*args)


def pieces(dtype, *shape):
    return tf.fill(shape or (ROWS, 2), tf.cast(PIECE, dtype))


def zeros():
    return tf.zeros([ROWS], tf.int32)


def bias_gradient(x):
    bias = tf.zeros([2], x.dtype)
    with tf.GradientTape() as tape:
        tape.watch(bias)
        outputs = tf.nn.bias_add(tf.zeros_like(x), bias)
    return tape.gradient(outputs, bias, x)


def gradient_of_broadcast_sum(x):
    bias = tf.zeros([2], x.dtype)
    with tf.GradientTape() as tape:
        tape.watch(bias)
        outputs = keras.ops.add(tf.zeros_like(x), bias)
    return tape.gradient(outputs, bias, x)


def gradient_of_broadcast_to(x):
    bias = tf.zeros([2], x.dtype)
    with tf.GradientTape() as tape:
        tape.watch(bias)
        outputs = tf.broadcast_to(bias, tf.shape(x))
    return tape.gradient(outputs, bias, x)


def gradient_of_gather(x):
    table = tf.zeros([1, 2], x.dtype)
    with tf.GradientTape() as tape:
        tape.watch(table)
        outputs = tf.gather(tf.tile(table, [2, 1]), zeros())
    return tape.gradient(outputs, table, x)


def gradient_of_gather_nd(x):
    table = tf.zeros([1, 2], x.dtype)
    with tf.GradientTape() as tape:
        tape.watch(table)
        outputs = tf.gather_nd(table, zeros()[:, None])
    return tf.convert_to_tensor(tape.gradient(outputs, table, x))


SUMS = {
    "reduce_sum": lambda x: tf.reduce_sum(x, 0),
    "keras sum": lambda x: keras.ops.sum(x, axis=0),
    "mean": lambda x: tf.reduce_mean(x, 0) * ROWS,
    "cumsum": lambda x: tf.cumsum(x)[-1],
    "reverse cumsum": lambda x: tf.cumsum(x, reverse=True)[0],
    "keras cumsum": lambda x: keras.ops.cumsum(x, axis=0)[-1],
    "segment_sum": lambda x: tf.math.segment_sum(x, zeros()),
    "keras segment_sum": lambda x: keras.ops.segment_sum(
        x, zeros(), num_segments=1
    ),
    "unsorted_segment_sum": lambda x: tf.math.unsorted_segment_sum(
        x, zeros(), 1
    ),
    "unsorted_segment_mean": lambda x: (
        tf.math.unsorted_segment_mean(x, zeros(), 1) * ROWS
    ),
    "sparse segment_sum": lambda x: tf.sparse.segment_sum(
        x, tf.range(ROWS), zeros()
    ),
    "scatter_nd": lambda x: tf.scatter_nd(zeros()[:, None], x, [1, 2]),
    "keras scatter": lambda x: keras.ops.scatter(zeros()[:, None], x, (1, 2)),
    "tensor_scatter_add": lambda x: tf.tensor_scatter_nd_add(
        tf.zeros([1, 2], x.dtype), zeros()[:, None], x
    ),
    "tensor_scatter_sub": lambda x: (
        -tf.tensor_scatter_nd_sub(
            tf.zeros([1, 2], x.dtype), zeros()[:, None], x
        )
    ),
    "einsum": lambda x: tf.einsum("ab->b", x),
    "matmul": lambda x: tf.matmul(tf.ones([1, ROWS], x.dtype), x),
    "add_n": lambda x: tf.add_n([x[i] for i in range(0, ROWS, 6)]) * 6,
    "bias gradient": bias_gradient,
    "broadcast gradient": gradient_of_broadcast_sum,
    "broadcast_to gradient": gradient_of_broadcast_to,
    "gather gradient": gradient_of_gather,
    "gather_nd gradient": gradient_of_gather_nd,
}


@pytest.mark.parametrize("dtype", mostly_slow(DTYPES, always=["bfloat16"]))
def test_every_sum_of_3072_equal_pieces_is_right(dtype):
    def all_sums(x):
        return {name: function(x) for name, function in SUMS.items()}

    for name, value in in_graph(all_sums, pieces(dtype)).items():
        assert value.dtype == dtype, name
        # Powers of two times 3: no rounding anywhere.
        right = np.full(value.shape, ROWS * PIECE)
        np.testing.assert_array_equal(tf.cast(value, "float64"), right, name)


def test_the_same_sums_stall_as_tensorflow_makes_them():
    stalled = SUMS["cumsum"](pieces("bfloat16"))
    assert float(stalled[0]) == 256 * PIECE


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_many_factors(dtype):
    # (1 + 2^-7)^256 by repeated multiplication.
    x = tf.fill([256], tf.cast(1 + 2**-7, dtype))

    def products(x):
        return tf.reduce_prod(x), tf.math.cumprod(x)[-1]

    for value in in_graph(products, x):
        assert float(value) == pytest.approx((1 + 2**-7) ** 256, rel=0.005)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_pooling_and_of_depthwise_filters(dtype):
    images = pieces(dtype, 4, 32, 32, 2)
    filters = tf.zeros([1, 1, 2, 1], dtype)

    def gradients(images, filters):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch([images, filters])
            pooled = tf.nn.avg_pool2d(images, 31, 1, "VALID")
            filtered = tf.nn.depthwise_conv2d(images, filters, [1] * 4, "SAME")
        return (
            tape.gradient(pooled, images),
            tape.gradient(filtered, filters),
        )

    of_images, of_filters = in_graph(gradients, images, filters)
    # An inner pixel is in all four windows, of 31 x 31 pixels each.
    assert float(of_images[0, 16, 16, 0]) == pytest.approx(4 / 961, rel=0.01)
    assert float(of_filters[0, 0, 0, 0]) == 4 * 32 * 32 * PIECE


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "strides", "overlaps"),
    [
        ((2, 2), (2, 2), False),
        ((2, 3), (3, 3), False),
        ((1, 2), (1, 2), False),
        ((3, 3), (2, 2), True),
        ((2, 2), (2, 1), True),
        ((2, 2, 2), (2, 2, 2), False),
        ((2, 1, 2), (2, 2, 1), True),
    ],
)
def test_the_gradient_of_pooling_is_widened_where_windows_overlap(
    size, strides, overlaps, dtype, padding
):
    random = tf.random.Generator.from_seed(1)
    images = tf.cast(random.normal([2, *[7] * len(size), 3]), dtype)
    layout = {2: "NHWC", 3: "NDHWC"}

    def gradient(images):
        with tf.GradientTape() as tape:
            tape.watch(images)
            pooled = tf.nn.max_pool(
                images, size, strides, padding, layout[len(size)]
            )
            total = tf.reduce_sum(tf.cast(pooled, "float32") ** 2)
        return tape.gradient(total, images)

    traced = tf.function(gradient, autograph=False).get_concrete_function(
        images
    )
    graph = traced.graph.as_graph_def()
    changed = rewrite.sums_in_float32(
        graph, lambda name, *_: "Pool" in name, "CPU"
    )
    assert bool(changed) == overlaps
    # CPUs do not pool volumes in float16.
    if not overlaps and (len(size), dtype) != (3, "float16"):
        # Nothing is added: float32 has the same numbers.
        wide = gradient(tf.cast(images, "float32"))
        np.testing.assert_array_equal(
            tf.cast(traced(images), "float32"),
            tf.cast(tf.cast(wide, dtype), "float32"),
        )


# Of upsampled, pooled and cropped images; one of each mechanism.
OF_IMAGES = [
    ("ResizeNearestNeighborGrad", "bfloat16"),
    ("MaxPool3DGrad", "bfloat16"),
    ("CropAndResizeGradImage", "float16"),
    ("UnsortedSegmentProd", "bfloat16"),
]
OTHERS = sorted({(k, d) for k in KERNELS for d in DTYPES} - {*OF_IMAGES})


@pytest.mark.parametrize(
    ("name", "dtype"), mostly_long([*OF_IMAGES, *OTHERS], always=OF_IMAGES)
)
def test_what_a_kernel_adds_in_16_bits_is_added_in_float32(name, dtype):
    def values(dtype):
        return lambda *shape, value=2.0**-3: tf.fill(
            shape, tf.cast(value, dtype)
        )

    trial = KERNELS[name].trial
    is_wanting = kernels.adds_in_16_bits(name, dtype, "CPU", False)
    if not is_wanting and (name, dtype) not in OF_IMAGES:
        pytest.skip("exact enough, or no such kernel")
    right = tf.cast(trial(values("float32")), dtype)
    largest = float(tf.reduce_max(tf.abs(tf.cast(right, "float32"))))
    made = in_graph(lambda: trial(values(dtype)))
    # What goes in is rounded too, where it is no power of two.
    np.testing.assert_allclose(
        tf.cast(made, "float32"), tf.cast(right, "float32"), atol=largest / 200
    )
    assert is_wanting


def nodes_of(x, judge):
    """The operations of a bias gradient after the change, and what it is."""
    function = tf.function(
        lambda x: tf.raw_ops.BiasAddGrad(out_backprop=x), autograph=False
    )
    spec = tf.TensorSpec(None, x.dtype)
    traced = function.get_concrete_function(spec)
    graph = traced.graph.as_graph_def()
    rewrite.sums_in_float32(graph, judge, "CPU")
    with tf.Graph().as_default() as made:
        x = tf.constant(x.numpy())
        (result,) = tf.graph_util.import_graph_def(
            graph,
            {traced.inputs[0].name: x},
            [traced.outputs[0].name],
        )
        with tf.compat.v1.Session() as session:
            value = session.run(result)
    return {each.type for each in made.get_operations()}, value


@pytest.mark.parametrize("shape", [(96, 2), (8, 12, 2), (3, 4, 8, 2), (0, 2)])
def test_a_bias_gradient_is_a_product_of_16_bits_in_any_rank(shape):
    x = tf.cast(tf.reshape(tf.range(np.prod(shape)), shape), "bfloat16")
    operations, value = nodes_of(x, lambda name, *_: name == "BiasAddGrad")
    assert "MatMul" in operations
    assert not operations & {"BiasAddGrad", "Cast"}
    sums = np.asarray(x, "float64").reshape(-1, 2).sum(0)
    np.testing.assert_array_equal(value, sums.astype(value.dtype))


def test_where_products_add_in_16_bits_the_bias_gradient_is_widened():
    operations, value = nodes_of(pieces("bfloat16"), lambda *_: True)
    assert "MatMul" not in operations
    np.testing.assert_array_equal(np.asarray(value, "float32"), ROWS * PIECE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_custom_gradients_and_recomputed_ones(dtype):
    @tf.custom_gradient
    def identity(x):
        # Whatever arrives goes on as the sum over rows, to each of them.
        return tf.identity(x), lambda g: tf.broadcast_to(
            SUMS["unsorted_segment_sum"](g), tf.shape(x)
        )

    def gradients(x):
        bias = tf.zeros([2], x.dtype)
        with tf.GradientTape(persistent=True) as tape:
            tape.watch([x, bias])
            own = identity(x)
            recomputed = tf.recompute_grad(tf.nn.bias_add)(x, bias)
        ones = tf.ones_like(x)
        return (
            tape.gradient(own, x, ones),
            tape.gradient(recomputed, bias, ones),
        )

    for sums in in_graph(gradients, pieces(dtype)):
        np.testing.assert_array_equal(tf.cast(sums, "float32"), ROWS)


@pytest.mark.parametrize("jit", [False, True], ids=["", "XLA"])
def test_functions_loops_branches_and_their_gradients(jit):
    def total(x):
        return tf.math.unsorted_segment_sum(x, zeros(), 1)[0]

    inner = tf.function(total, autograph=False, jit_compile=jit)

    def work(x):
        with tf.GradientTape() as tape:
            bias = tf.zeros([2], x.dtype)
            tape.watch(bias)
            _, looped = tf.while_loop(
                lambda i, _: i < 2,
                lambda i, sums: (i + 1, sums + total(x + bias)),
                [0, tf.zeros([2], x.dtype)],
                maximum_iterations=2,
            )
            branched = tf.cond(
                x[0, 0] > 0, lambda: total(x + bias), lambda: x[0]
            )
            called = inner(x + bias)
        values = [looped, branched, called]
        return [*values, tape.gradient(values, bias)]

    sums = in_graph(work, pieces("bfloat16"))
    # The last is what each row of the four sums passes on to the bias.
    right = [2 * ROWS * PIECE, ROWS * PIECE, ROWS * PIECE, 4 * ROWS]
    assert [float(value[0]) for value in sums] == right


def test_gradients_through_a_loop():
    def gradient(x):
        bias = tf.zeros([2], x.dtype)
        with tf.GradientTape() as tape:
            tape.watch(bias)
            _, sums = tf.while_loop(
                lambda i, _: i < 2,
                lambda i, sums: (i + 1, sums + tf.nn.bias_add(x, bias)),
                [0, tf.zeros_like(x)],
                maximum_iterations=2,
            )
        return tape.gradient(sums, bias, x)

    value = in_graph(gradient, pieces("bfloat16"))
    assert float(value[0]) == 2 * ROWS * PIECE


def test_a_cast_to_float32_takes_the_sum_unrounded():
    ones = tf.ones([1001], "bfloat16")
    total, rounded = in_graph(
        lambda x: (tf.cast(tf.cumsum(x)[-1:], "float32"), tf.cumsum(x)[-1]),
        ones,
    )
    assert float(rounded) == 1000
    direct = in_graph(lambda x: tf.cast(tf.cumsum(x), "float32"), ones)
    assert float(direct[-1]) == 1001
    assert float(total[0]) == 1000


def test_structures_side_effects_and_python_functions_are_kept():
    count = tf.Variable(0)

    def work(x):
        count.assign_add(1)
        doubled = tf.numpy_function(lambda v: v * 2, [x], x.dtype)
        count.assign_add(tf.cast(count > 0, "int32"))
        slices = tf.IndexedSlices(tf.cumsum(x), tf.constant([0, 1]))
        return {"a": (doubled, None), "b": slices}

    function = tf.function(summing_in_float32(work), autograph=False)
    result = function(tf.ones([2], "float16"))
    gc.collect()
    result = function(tf.ones([2], "float16"))
    assert result["a"][1] is None
    assert float(result["a"][0][0]) == 2
    assert isinstance(result["b"], tf.IndexedSlices)
    assert int(count) == 4


def test_a_graph_with_nothing_to_change_keeps_its_functions():
    @tf.function
    def function(x):
        return tf.cond(x[0] > 0, lambda: tf.cumsum(x), lambda: x)

    graph = function.get_concrete_function(tf.ones([2])).graph.as_graph_def()
    before = graph.SerializeToString(deterministic=True)
    changed = rewrite.sums_in_float32(graph, lambda *_: True, "CPU")
    assert not changed
    assert graph.SerializeToString(deterministic=True) == before


def test_a_kernel_is_judged_by_device_and_compiler():
    compiled = tf.function(tf.cumsum, jit_compile=True, autograph=False)
    asked = set()

    def work(x):
        with tf.device("CPU:0"):
            here = compiled(x)
        return here, tf.cumsum(x)

    def judge(*place):
        asked.add(place)
        return False

    function = tf.function(work, autograph=False)
    graph = function.get_concrete_function(tf.ones([2], "float16")).graph
    rewrite.sums_in_float32(graph.as_graph_def(), judge, "GPU")
    assert asked == {
        ("Cumsum", "float16", "CPU", True),
        ("Cumsum", "float16", "GPU", False),
    }


def test_what_was_registered_goes_with_the_function():
    before = set(context.context().list_function_names())
    function = tf.function(
        summing_in_float32(
            lambda x: tf.cond(x[0] > 0, lambda: tf.cumsum(x), lambda: x)
        ),
        autograph=False,
    )
    function(tf.ones([2], "bfloat16"))
    assert set(context.context().list_function_names()) > before
    del function
    gc.collect()
    after = set(context.context().list_function_names())
    assert not {name for name in after - before if "float32_sums" in str(name)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sound_kernel_is_left_alone(dtype):
    assert not kernels.adds_in_16_bits("MatMul", dtype, "CPU", False)
    assert not kernels.adds_in_16_bits("Conv2D", dtype, "CPU", False)


def test_nothing_that_other_threads_see_is_replaced():
    eager = SUMS["cumsum"](pieces("bfloat16"))
    in_graph(SUMS["cumsum"], pieces("bfloat16"))
    np.testing.assert_array_equal(
        tf.cast(SUMS["cumsum"](pieces("bfloat16")), "float32"),
        tf.cast(eager, "float32"),
    )
