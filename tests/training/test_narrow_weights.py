"""Weights in shards are kept in 16 bits while they train; nobody sees it."""

import keras
import numpy as np
import pytest

import tfamp
from tests.conftest import mostly_long
from tfamp import keras_internals

FITS = {
    "plain": {},
    "pieces": {"microbatches": 2, "steps_per_loop": 2},
    "compiled": {"jit": True},
    "narrow_wire": {"all_reduce_dtype": "bfloat16"},
}


class Seen(keras.callbacks.Callback):
    """What the weights are kept in, and what others see of them."""

    def on_epoch_end(self, epoch, logs=None):
        weights = self.model.weights
        self.kept = {
            "/".join(w.path.split("/")[-2:]): keras_internals.stored(
                w
            ).dtype.name
            for w in weights
        }
        self.seen = [np.array(w) for w in weights]


def trained(
    strategy, shard, precision="mixed_bfloat16", use_ema=False, **options
):
    tfamp.set_precision(precision)
    keras.utils.set_random_seed(1)
    generator = np.random.default_rng(0)
    x = generator.standard_normal((16, 6)).astype("float32")
    y = generator.integers(0, 3, 16)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([6]),
                keras.layers.Dense(9, activation="relu", name="narrow"),
                keras.layers.LayerNormalization(name="norm"),
                keras.layers.Dense(3, dtype="float32", name="head"),
            ]
        )
        optimizer = keras.optimizers.AdamW(
            1e-2, weight_decay=0.1, global_clipnorm=0.5, use_ema=use_ema
        )
        model.compile(
            tfamp.wrap_optimizer(optimizer, shard=shard),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            auto_scale_loss=False,
        )
    seen = Seen()
    tfamp.fit(
        model,
        x,
        y,
        batch_size=8,
        shuffle=False,
        verbose=0,
        validation_data=(x, y),
        **({"epochs": 1, "callbacks": [seen]} | options),
    )
    return model, seen


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly_long(FITS, always=["plain"]))
def test_a_training_in_shards_is_the_same_training(mirrored, name):
    whole, seen_whole = trained(mirrored(2), False, **FITS[name])
    sharded, seen = trained(mirrored(2), True, **FITS[name])
    assert seen.kept["narrow/kernel"] == "bfloat16"
    assert seen.kept["norm/gamma"] == seen.kept["head/kernel"] == "float32"
    for a, b in zip(seen_whole.seen, seen.seen, strict=True):
        assert b.dtype == np.float32
        np.testing.assert_array_equal(a, b)
    for a, b in zip(whole.weights, sharded.weights, strict=True):
        assert keras_internals.stored(b).dtype == "float32"
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    for key in ("loss", "val_loss"):
        losses = whole.history.history[key], sharded.history.history[key]
        assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_averages_are_swapped_in_what_the_model_reads(mirrored, swap_on_epoch):
    losses, weights, predictions = [], [], []
    for shard in (False, True):
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
        model, _ = trained(
            mirrored(2), shard, use_ema=True, epochs=3, callbacks=[swap]
        )
        losses.append(model.history.history["val_loss"])
        weights.append([w.numpy() for w in model.weights])
        rows = np.ones((4, 6), "float32")
        swap = keras.callbacks.SwapEMAWeights()
        predictions.append(tfamp.predict(model, rows, callbacks=[swap]))
    assert losses[0] == losses[1]
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(*predictions)


@pytest.mark.long
def test_a_table_that_is_read_twice_stays_float32(mirrored):
    tfamp.set_precision("mixed_bfloat16")
    strategy = mirrored(2)
    with strategy.scope():
        inputs = keras.Input([4], dtype="int32")
        table = keras.layers.ReversibleEmbedding(8, 4, name="table")
        model = keras.Model(inputs, table(table(inputs), reverse=True))
        model.compile(
            tfamp.wrap_optimizer("adam", shard=True),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            auto_scale_loss=False,
        )
    seen = Seen()
    seen.on_epoch_end = lambda epoch, logs=None: setattr(
        seen, "kept", keras_internals.stored(model.weights[0]).dtype
    )
    tokens = np.arange(16).reshape(4, 4) % 8
    tfamp.fit(model, tokens, tokens, batch_size=4, callbacks=[seen], verbose=0)
    assert seen.kept == "float32"


def test_a_weight_that_is_read_past_its_layer_is_refused():
    tfamp.set_precision("mixed_bfloat16")
    model = keras.Sequential(
        [
            keras.Input([2]),
            keras.layers.Dense(2),
            keras.layers.Dense(1, dtype="float32"),
        ]
    )
    kernel = model.layers[0].kernel
    model.compile(
        tfamp.wrap_optimizer("sgd", shard=True),
        lambda y, p: keras.ops.mean((y - p) ** 2) + keras.ops.sum(kernel**2),
        auto_scale_loss=False,
    )
    with pytest.raises(tfamp.InputError, match="another way"):
        tfamp.fit(model, np.ones((4, 2)), np.ones((4, 1)), verbose=0)
    assert keras_internals.stored(kernel).dtype == "float32"
    assert np.isfinite(kernel.numpy()).all()
