"""What crosses between replicas, and that pieces add up to the whole."""

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import FLOAT32_ROUNDING, first_always, mostly_slow
from tests.resumable_run import build_model, make_dataset
from tfamp.distribute.strategy import distribute_batches
from tfamp.scaling.gradients import all_reduce
from tfamp.step import build

# The most that rounding to it changes a number, relative to that.
BFLOAT16_ROUNDING = tfamp.FORMATS["bfloat16"].epsilon / 2


def traced_step(strategy, all_reduce_dtype):
    """The graph of one training step, and the model's number of weights."""
    with strategy.scope():
        model = build_model()
    model.optimizer.all_reduce_dtype = all_reduce_dtype
    step = build.train_step(model, strategy, microbatches=1, jit=False)
    iterator = iter(distribute_batches(strategy, make_dataset()))

    @tf.function(autograph=False)
    def one_step(iterator):
        strategy.run(step, args=(iterator.get_next(),))

    graph = one_step.get_concrete_function(iterator).graph
    return graph, model.count_params() - 16  # Moving means and variances.


def sent(graph):
    """Of each tensor that one replica gives to a sum over replicas: bytes."""
    sizes = []
    for op in graph.get_operations():
        if op.type == "CollectiveReduceV2":
            inputs = op.inputs[:1]
        elif op.type == "AddN" and _devices(op.inputs) > 1:
            inputs = op.inputs
        else:
            # Nothing else that replicas could talk by.
            assert not op.type.startswith(
                ("Nccl", "CollectiveG", "CollectiveB")
            )
            continue
        sizes += [
            each.shape.num_elements() * each.dtype.size for each in inputs
        ]
    return sizes


def _devices(tensors):
    return len({tensor.op.device for tensor in tensors})


@pytest.mark.slow
@pytest.mark.parametrize("replicas", mostly_slow([2, 4], always=[2]))
def test_sixteen_bits_halve_what_each_step_sends(replicas, mirrored):
    whole, weights = traced_step(mirrored(replicas), None)
    half, _ = traced_step(mirrored(replicas), "bfloat16")
    assert sum(sent(whole)) == replicas * weights * 4
    assert sum(sent(half)) == replicas * weights * 2
    assert len(sent(half)) == len(sent(whole))


@pytest.mark.parametrize("replicas", [2, 4])
def test_each_gradient_and_each_addition_is_rounded_once(replicas, mirrored):
    strategy = mirrored(replicas)
    values = np.random.default_rng(0).normal(size=(replicas, 4096))
    values = values.astype("float32")

    @tf.function
    def reduce():
        def on_replica():
            replica = tf.distribute.get_replica_context()
            mine = tf.gather(values, replica.replica_id_in_sync_group)
            return all_reduce([mine], [False], "bfloat16")[0]

        return strategy.run(on_replica)

    exact = values.astype("float64").sum(axis=0)
    bound = replicas * BFLOAT16_ROUNDING * np.abs(values).sum(axis=0) * 1.01
    bfloat16 = ml_dtypes.bfloat16
    for result in strategy.experimental_local_results(reduce()):
        assert result.dtype == tf.float32
        assert (np.abs(result.numpy() - exact) <= bound).all()
        if replicas == 2:
            rounded = values.astype(bfloat16).astype("float32").sum(axis=0)
            np.testing.assert_array_equal(result, rounded.astype(bfloat16))


@pytest.mark.parametrize(
    ("dtype", "skipped", "scale", "weight"),
    first_always(
        [
            (None, 0, 2.0**16, -2.0),
            # Has the range of float32.
            ("bfloat16", 0, 2.0**16, -2.0),
            # 2**15 on each of two replicas, and 65504 is the largest.
            ("float16", 1, 2.0**15, -1.0),
        ],
        1,
    ),
)
def test_an_overflow_of_the_sum_alone_is_skipped(
    dtype, skipped, scale, weight, mirrored
):
    strategy = mirrored(2)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((1,)),
                keras.layers.Dense(
                    1, use_bias=False, kernel_initializer="zeros"
                ),
            ]
        )
        model.compile(
            tfamp.wrap_optimizer(keras.optimizers.SGD(1.0), "mixed_float16"),
            # Its gradient is 1, of which each replica has a half.
            loss=lambda y, prediction: prediction,
            auto_scale_loss=False,
        )
    ones = np.ones((8, 1), "float32")
    history = tfamp.fit(
        model,
        tf.data.Dataset.from_tensor_slices((ones, ones)).batch(4),
        all_reduce_dtype=dtype,
        on_overflow="ignore",
        verbose=0,
    )
    assert history.history["skipped_steps"] == [skipped]
    assert float(model.optimizer.dynamic_scale.numpy()) == scale
    kernels = strategy.experimental_local_results(model.weights[0].value)
    assert [float(each.numpy().item()) for each in kernels] == [weight] * 2


def test_eight_microbatches_of_512_rows_equal_them_at_once():
    generator = np.random.default_rng(1)
    x = generator.normal(size=(5 * 512, 16)).astype("float32")
    y = generator.integers(0, 4, len(x))
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(512)

    def trained(microbatches):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((16,)),
                keras.layers.Dense(32, activation="gelu"),
                keras.layers.Dense(4),
            ]
        )
        model.compile(
            tfamp.wrap_optimizer(keras.optimizers.SGD(0.5, momentum=0.9)),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            auto_scale_loss=False,
        )
        before = [v.numpy() for v in model.trainable_variables]
        history = tfamp.fit(
            model, dataset, microbatches=microbatches, verbose=0
        )
        assert int(model.optimizer.iterations.numpy()) == 5
        after = [v.numpy() for v in model.trainable_variables]
        return before, after, history.history["loss"]

    before, whole, loss = trained(1)
    _, pieces, loss_of_pieces = trained(8)
    for start, one, other in zip(before, whole, pieces, strict=True):
        assert np.abs(one - start).max() > 0.01
        np.testing.assert_allclose(other, one, **FLOAT32_ROUNDING)
    np.testing.assert_allclose(loss_of_pieces, loss, **FLOAT32_ROUNDING)
