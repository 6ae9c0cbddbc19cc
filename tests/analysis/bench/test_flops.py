"""Operations of a step, against what a reader counts by hand."""

import keras
import pytest
import tensorflow as tf
from keras import layers

import tfamp
from tfamp.analysis.bench import flops


def count(layers_, inputs, outputs, rows=4, strategy=None, **compile_options):
    """The products of a step of a model on `rows` rows."""
    strategy = strategy or tf.distribute.get_strategy()
    with strategy.scope():
        model = keras.Sequential([keras.Input(inputs), *layers_])
        model.compile(
            optimizer=tfamp.wrap_optimizer(keras.optimizers.SGD()),
            loss="mse",
            auto_scale_loss=False,
        )
        model.optimizer.build(model.trainable_variables)
    spec = tf.TensorSpec([None, *inputs]), tf.TensorSpec([None, *outputs])
    return flops.products_of_step(model, spec, rows)


def products_of(function, *shapes):
    """The products in the graph of a function."""
    traced = tf.function(function, autograph=False)
    specs = [tf.TensorSpec(shape) for shape in shapes]
    return flops.products_of_graph(traced.get_concrete_function(*specs).graph)


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_a_dense_layer_costs_2mnk_forward_and_twice_that_backward(precision):
    keras.config.set_dtype_policy(precision)
    products = count([layers.Dense(5), layers.Dense(7)], [3], [7])
    first, second = 2 * 4 * 3 * 5, 2 * 4 * 5 * 7
    # The first layer has no one to give a gradient of its input.
    assert flops.total(products) == 2 * first + 3 * second


def test_a_convolution_costs_a_product_for_each_pixel_it_gives():
    convolutions = [
        layers.Conv2D(4, 3, padding="same"),
        layers.Conv2D(6, 3, strides=2, padding="same"),
    ]
    products = count(convolutions, [8, 8, 2], [4, 4, 6])
    first = 2 * (4 * 8 * 8) * (3 * 3 * 2) * 4
    second = 2 * (4 * 4 * 4) * (3 * 3 * 4) * 6
    assert flops.total(products) == 2 * first + 3 * second


def test_groups_and_depthwise_convolutions_see_fewer_channels():
    convolutions = [
        layers.Conv2D(8, 1),
        layers.Conv2D(8, 3, groups=4, padding="same"),
        layers.DepthwiseConv2D(3, padding="same"),
    ]
    products = count(convolutions, [4, 4, 1], [4, 4, 8])
    pixels = 4 * 4 * 4
    first, grouped = 2 * pixels * 1 * 8, 2 * pixels * (3 * 3 * 2) * 8
    depthwise = 2 * pixels * (3 * 3) * 8
    assert flops.total(products) == 2 * first + 3 * grouped + 3 * depthwise


def test_replicas_share_the_work_of_a_batch(mirrored):
    alone = count([layers.Dense(5), layers.Dense(7)], [3], [7])
    shared = count(
        [layers.Dense(5), layers.Dense(7)], [3], [7], strategy=mirrored(2)
    )
    assert flops.total(shared) == flops.total(alone)
    assert len(shared) == 2 * len(alone)


@pytest.mark.parametrize(
    ("equation", "shapes", "operations"),
    [
        (
            "BTNH,BSNH->BNTS",
            ([2, 3, 4, 5], [2, 7, 4, 5]),
            2 * 2 * 3 * 4 * 5 * 7,
        ),
        ("...ab,...bc->...ac", ([6, 2, 3], [1, 3, 5]), 2 * 6 * 2 * 3 * 5),
        ("ab->ba", ([2, 3],), 0),
    ],
)
def test_einsum_costs_the_product_of_all_its_sizes(
    equation, shapes, operations
):
    products = products_of(
        lambda *x: tf.raw_ops.Einsum(inputs=x, equation=equation), *shapes
    )
    assert flops.total(products) == operations


def test_a_transposed_operand_is_summed_over_its_other_dimension():
    def transposed(a, b):
        return tf.matmul(a, b, transpose_a=True), tf.matmul(
            b, a, adjoint_a=True
        )

    both = products_of(transposed, [3, 2], [3, 5])
    assert [product.flops for product in both] == [2 * 2 * 3 * 5] * 2


def test_of_two_branches_the_dearer_one_counts():
    def branches(a):
        return tf.cond(
            tf.reduce_sum(a) > 0,
            lambda: a @ a,
            lambda: a @ a @ a,
        )

    assert flops.total(products_of(branches, [4, 4])) == 2 * 2 * 4**3


def test_functions_count_as_often_as_they_are_called():
    square = tf.function(lambda a: a @ a, autograph=False)
    products = products_of(lambda a: square(square(a)), [4, 4])
    assert flops.total(products) == 2 * 2 * 4**3


def test_products_in_a_loop_are_not_guessed():
    def loop(a):
        return tf.while_loop(lambda x: tf.norm(x) < 9, lambda x: (x @ x,), [a])

    with pytest.raises(flops.UncountableError, match="loops over matrix"):
        products_of(loop, [4, 4])


def test_a_loop_without_products_does_not_matter():
    def loop(a):
        return tf.while_loop(lambda x: tf.norm(x) < 9, lambda x: (x + 1,), [a])

    assert products_of(loop, [4, 4]) == []


def test_an_unknown_size_is_not_guessed():
    with pytest.raises(flops.UncountableError, match="not known"):
        products_of(lambda a, b: a @ b, [None, 4], [4, 4])


def test_a_width_counts_by_the_operations_it_holds_up():
    products = products_of(lambda a, b: (a @ a, b @ b), [16, 16], [24, 24])
    on, off = 16**3, 24**3
    assert flops.share_off_multiple(products, 16) == off / (on + off)
    assert flops.share_off_multiple(products, 8) == 0


def test_products_that_cost_nothing_have_no_share():
    assert flops.share_off_multiple([], 8) == 0
