"""Each replica updates its part, and no number is another for it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import mostly_long
from tests.scaling import shard_cases

OPTIMIZERS = {
    "adamw": lambda: keras.optimizers.AdamW(
        keras.optimizers.schedules.CosineDecay(1e-2, 9),
        weight_decay=0.1,
        global_clipnorm=0.5,
    ),
    "averaged": lambda: keras.optimizers.Adam(
        1e-2,
        use_ema=True,
        ema_momentum=0.9,
        ema_overwrite_frequency=3,
        clipvalue=0.3,
    ),
    "amsgrad": lambda: keras.optimizers.Adam(1e-2, amsgrad=True, clipnorm=0.2),
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "plain_sgd": lambda: keras.optimizers.SGD(0.1, weight_decay=0.1),
    "lion": lambda: keras.optimizers.Lion(1e-2, weight_decay=0.1),
    "rmsprop": lambda: keras.optimizers.RMSprop(
        1e-2, momentum=0.9, centered=True, weight_decay=0.1
    ),
    "adagrad": lambda: keras.optimizers.Adagrad(1e-2),
    "nadam": lambda: keras.optimizers.Nadam(1e-2, weight_decay=0.1),
    "adamax": lambda: keras.optimizers.Adamax(1e-2),
    "adadelta": lambda: keras.optimizers.Adadelta(0.5),
    "ftrl": lambda: keras.optimizers.Ftrl(1e-2),
}
# Of each way to an update: by a kernel, by operations, and rows of a table.
SHAPES = {
    "small": (3,),
    "kernel": (7, 9),
    "large": (1, 66_001),
    "table": (9, 3),
}
STEPS, POISONED = 5, 2
# TensorFlow divides by a root in one operation or in two, and takes another
# way for rows of a table than for all of it.
ROUND_ROWS_OTHERWISE = ("adagrad", "adadelta")


def trained(strategy, make, *, shard, precision="float32", poisoned_by=None):
    """Weights and state after some steps on gradients that are given."""
    replicas = strategy.num_replicas_in_sync
    with strategy.scope():
        weights = [
            keras.Variable(
                np.random.default_rng(i).standard_normal(shape),
                dtype="float32",
                name=name,
            )
            for i, (name, shape) in enumerate(SHAPES.items())
        ]
        inner = make()
        if inner.weight_decay:
            inner.exclude_from_weight_decay(var_names=["small", "table"])
        optimizer = tfamp.wrap_optimizer(
            inner, precision, initial_scale=64.0, shard=shard
        )
        optimizer.build(weights)

    @tf.function(autograph=False)
    def step(gradients, poison):
        def on_replica(gradients):
            replica = tf.distribute.get_replica_context()
            me = tf.convert_to_tensor(replica.replica_id_in_sync_group)
            here = tf.where(me == poison, np.float32(np.inf), 1.0)
            *dense, rows = [each[me] * here * 64.0 for each in gradients]
            table = tf.IndexedSlices(
                rows[:2], tf.stack([me % 2, 1]), tf.constant([9, 3])
            )
            optimizer.apply([*dense, table], weights)

        strategy.run(on_replica, (gradients,))

    generator = np.random.default_rng(9)
    for k in range(STEPS):
        gradients = [
            tf.constant(
                generator.standard_normal((replicas, *shape)), tf.float32
            )
            for shape in SHAPES.values()
        ]
        # No replica has the number 99.
        poison = poisoned_by if k == POISONED else None
        step(gradients, tf.constant(99 if poison is None else poison))
    return weights, optimizer


def values_of(weights):
    return [weight.numpy() for weight in weights]


@pytest.mark.parametrize("name", mostly_long(OPTIMIZERS, always=["adamw"]))
@pytest.mark.parametrize("replicas", mostly_long([2, 4], always=[2]))
def test_shards_change_no_bit(mirrored, name, replicas):
    strategy, make = mirrored(replicas), OPTIMIZERS[name]
    whole, _ = trained(strategy, make, shard=False)
    sharded, _ = trained(strategy, make, shard=True)
    values = values_of(whole), values_of(sharded)
    if name in ROUND_ROWS_OTHERWISE:
        np.testing.assert_allclose(*[v.pop() for v in values], rtol=1e-6)
    for a, b in zip(*values, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("replicas", "name"),
    mostly_long(
        [(r, name) for r in (2, 4) for name in shard_cases.CASES],
        always=[(2, "float16")],
    ),
)
def test_a_training_of_twenty_steps_is_the_same_to_the_bit(
    mirrored, replicas, name
):
    strategy, options = mirrored(replicas), shard_cases.CASES[name]
    whole = shard_cases.trained(strategy, False, **options)
    sharded = shard_cases.trained(strategy, True, **options)
    assert whole["skipped"] >= replicas
    assert whole["iterations"] == shard_cases.STEPS - whole["skipped"]
    for key, value in whole.items():
        np.testing.assert_array_equal(value, sharded[key], err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("poisoned_by", mostly_long(range(4), always=[1]))
def test_a_step_that_one_replica_spoils_is_skipped_on_all(
    mirrored, poisoned_by
):
    strategy, make = mirrored(4), OPTIMIZERS["averaged"]
    options = {"precision": "mixed_float16", "poisoned_by": poisoned_by}
    whole, _ = trained(strategy, make, shard=False, **options)
    sharded, optimizer = trained(strategy, make, shard=True, **options)
    assert int(optimizer.skipped_steps.numpy()) == 1
    assert int(optimizer.iterations.numpy()) == STEPS - 1
    for a, b in zip(values_of(whole), values_of(sharded), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_replica_holds_its_part_of_masters_and_moments(mirrored):
    _, optimizer = trained(mirrored(4), OPTIMIZERS["adamw"], shard=True)
    for shape, master in zip(
        SHAPES.values(), optimizer.shards.masters, strict=True
    ):
        for component in mirrored(4).experimental_local_results(master.value):
            assert component.shape == (-(-np.prod(shape) // 4),)
    moments = [v for v in optimizer.inner_optimizer.variables if v.shape.rank]
    assert len(moments) == 2 * len(SHAPES)
    assert {v.shape[0] for v in moments} == {1, 16, 16501, 7}


@pytest.mark.slow
def test_a_weight_that_is_set_from_outside_stays_so(mirrored):
    strategy = mirrored(4)
    weights, optimizer = trained(
        strategy, lambda: keras.optimizers.SGD(0.5), shard=True
    )
    weights[1].assign(np.full(SHAPES["kernel"], 3.0))

    @tf.function(autograph=False)
    def step():
        def on_replica():
            gradient = tf.ones(SHAPES["kernel"]) * 16.0
            optimizer.apply([gradient], [weights[1]])

        strategy.run(on_replica)

    step()
    # Four replicas' gradients of 16 / 64 add up to 1.
    np.testing.assert_array_equal(weights[1].numpy(), 2.5)


@pytest.mark.slow
def test_one_part_cannot_be_taken_for_the_whole(mirrored):
    _, optimizer = trained(mirrored(4), OPTIMIZERS["sgd"], shard=True)
    with pytest.raises(ValueError, match="NONE"):
        optimizer.shards.masters[0].numpy()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: keras.optimizers.Muon(1e-3), "Muon is not known to"),
        (lambda: keras.optimizers.Adafactor(1e-3), "Adafactor is not known"),
        (lambda: keras.optimizers.Lamb(1e-3), "Lamb is not known to"),
        (
            lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
            "microbatches",
        ),
    ],
)
def test_what_needs_more_than_an_element_is_refused(make, said):
    with pytest.raises(tfamp.InputError, match=said):
        tfamp.wrap_optimizer(make(), shard=True)


def each_optimizer_of_keras():
    """By name, one of each class that Keras has."""
    several = {"MultiOptimizer": ([keras.optimizers.SGD(0.1)],)}
    classes = {
        name: cls
        for name, cls in vars(keras.optimizers).items()
        if isinstance(cls, type)
        and issubclass(cls, keras.optimizers.Optimizer)
        and name not in ("Optimizer", "LossScaleOptimizer")
    }
    return {
        name: cls(*several.get(name, (0.1,))) for name, cls in classes.items()
    }


def test_every_optimizer_of_keras_is_taken_or_refused_in_one_line():
    refused = {}
    for name, optimizer in each_optimizer_of_keras().items():
        try:
            tfamp.wrap_optimizer(optimizer, shard=True)
        except tfamp.InputError as error:
            refused[name] = str(error)
    for name, said in refused.items():
        assert f"{name} is not known to" in said
        assert "\n" not in said
    # Norms or products of whole weights; what is averaged elsewhere.
    later = {"Muon", "MultiOptimizer", "ScheduleFreeAdamW"}
    assert refused.keys() - later == {"Adafactor", "Lamb"}


def test_somebodys_own_optimizer_is_refused():
    class Mine(keras.optimizers.Adam):
        pass

    with pytest.raises(tfamp.InputError, match="Mine is not known to"):
        tfamp.wrap_optimizer(Mine(), shard=True)


def test_a_constraint_is_refused():
    weight = keras.layers.Dense(2, kernel_constraint="max_norm")
    weight.build((None, 3))
    optimizer = tfamp.wrap_optimizer("sgd", shard=True)
    with pytest.raises(tfamp.InputError, match="constraint"):
        optimizer.build(weight.trainable_variables)


def test_without_a_strategy_all_is_one_part():
    strategy, make = tf.distribute.get_strategy(), OPTIMIZERS["plain_sgd"]
    whole, _ = trained(strategy, make, shard=False)
    sharded, _ = trained(strategy, make, shard=True)
    for a, b in zip(values_of(whole), values_of(sharded), strict=True):
        np.testing.assert_array_equal(a, b)
