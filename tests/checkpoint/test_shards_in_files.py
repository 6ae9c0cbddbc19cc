"""What is saved of an optimizer in shards is whole, for any number of them."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import mostly_long
from tfamp.checkpoint.store import Checkpoints, Position
from tfamp.saving.load import load_model


def small(strategy, shard, seed=0):
    """A model whose weights and moments are all different numbers."""
    keras.utils.set_random_seed(seed)
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([3]), keras.layers.Dense(5), keras.layers.Dense(1)]
        )
        optimizer = tfamp.wrap_optimizer(
            keras.optimizers.Adam(use_ema=True), shard=shard
        )
        model.compile(optimizer, "mse", auto_scale_loss=False)
        optimizer.build(model.trainable_variables)
    for i, variable in enumerate(optimizer.inner_optimizer.variables):
        if not variable.shape.rank:
            continue
        piece = shard and optimizer.shards.moment(variable)
        shape = piece.weight.shape if piece else variable.shape
        value = seed + i + np.arange(np.prod(shape), dtype="float32") / 32
        if piece:
            optimizer.shards.write_whole(piece, value.reshape(shape))
        else:
            variable.assign(value.reshape(shape))
    return model


def state_of(model):
    """All that training goes on from, whole."""
    shards = model.optimizer.shards
    state = {weight.path: weight.numpy() for weight in model.weights}
    for i, variable in enumerate(model.optimizer.inner_optimizer.variables):
        piece = shards and shards.moment(variable)
        state[i] = shards.read_whole(piece) if piece else variable.numpy()
    if shards:
        # As each step begins: weights that a file set are the masters'.
        shards.follow_all()
        for weight in model.trainable_variables:
            np.testing.assert_array_equal(
                shards.read_whole(weight), weight.numpy()
            )
    return state


def assert_same(before, after):
    assert len(before) == len(after) == 4 + 2 + 3 * 4
    for a, b in zip(before.values(), after.values(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved_by", "restored_by"),
    mostly_long(
        [
            ((4, True), (2, True)),
            ((2, True), (1, False)),
            ((1, False), (4, True)),
        ],
        always=[((4, True), (2, True)), ((1, False), (4, True))],
    ),
)
def test_a_run_moves_to_any_number_of_replicas(
    mirrored, tmp_path, saved_by, restored_by
):
    before = small(mirrored(saved_by[0]), saved_by[1])
    Checkpoints(before, str(tmp_path)).save(Position(3))
    after = small(mirrored(restored_by[0]), restored_by[1], seed=9)
    assert Checkpoints(after, str(tmp_path)).restore() == Position(3)
    assert_same(state_of(before), state_of(after))


MOVES = ((4, True), (2, True), (1, False), (4, True))


def after_moves(mirrored, moves, folder=None):
    """Weights after an epoch on each of so many replicas, in and out of shards.

    Without a folder: all of them on the first.
    """
    generator = np.random.default_rng(0)
    x = generator.standard_normal((32, 3)).astype("float32")
    y = (x @ generator.standard_normal((3, 1))).astype("float32")
    stays = folder is None
    epochs = [len(moves)] if stays else range(1, len(moves) + 1)
    for (replicas, shard), until in zip(moves, epochs, strict=False):
        keras.utils.set_random_seed(0)
        with mirrored(replicas).scope():
            model = keras.Sequential(
                [keras.Input([3]), keras.layers.Dense(5), keras.layers.Dense(1)]
            )
            optimizer = keras.optimizers.AdamW(1e-2, global_clipnorm=1.0)
            model.compile(
                tfamp.wrap_optimizer(optimizer, shard=shard),
                "mse",
                auto_scale_loss=False,
            )
        tfamp.fit(
            model,
            x,
            y,
            batch_size=8,
            epochs=until,
            shuffle=False,
            verbose=0,
            checkpoint_dir=folder,
        )
        assert int(model.optimizer.iterations.numpy()) == 4 * until
    return np.concatenate([w.numpy().ravel() for w in model.weights])


@pytest.mark.slow
def test_a_run_that_moves_ends_as_one_that_stays(mirrored, tmp_path):
    stayed = after_moves(mirrored, MOVES)
    moved = after_moves(mirrored, MOVES, tmp_path / "moved")
    # Sums in another order, and nothing else.
    control = after_moves(mirrored, [(1, False)] * len(MOVES))
    rounding = np.abs(control - stayed).max()
    off = np.abs(moved - stayed).max()
    last_bit = 2.0**-23 * np.abs(stayed).max()
    assert off <= 4 * max(rounding, last_bit)
    assert rounding < 1e-5 * np.abs(stayed).max()


def test_a_file_holds_float32_weights_and_whole_moments(mirrored, tmp_path):
    before = small(mirrored(4), True)
    before.save(tmp_path / "model.keras")
    with tf.distribute.get_strategy().scope():
        after = load_model(tmp_path / "model.keras")
    assert after.optimizer.shard
    assert {str(w.dtype) for w in after.weights} == {"float32"}
    assert_same(state_of(before), state_of(after))
