"""What is misplaced is said; what is left out is done, and said."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tfamp.distribute import strategy as strategies

X = np.linspace(-1, 1, 16, dtype="float32").reshape(8, 2)
Y = np.arange(8) % 2


def build_model(optimizer="sgd", **options):
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(2, activation="softmax")]
    )
    options.setdefault("loss", "sparse_categorical_crossentropy")
    model.compile(optimizer, **options)
    return model


def test_one_line_is_right_by_itself_and_says_what_it_did(capsys):
    tfamp.set_precision("mixed_float16")
    model = build_model()
    history = tfamp.fit(model, X, Y, verbose=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "kept dense" in lines[0]
    assert "loss scale 32768" in lines[0]
    assert model(X).dtype == "float32"
    assert history.history["loss_scale"] == [32768]


def test_what_the_caller_kept_or_left_stays_so():
    tfamp.set_precision("mixed_float16")
    model = build_model()
    tfamp.fit(model, X, Y, verbose=0, keep_float32=False)
    assert model(X).dtype == "float16"
    model = build_model()
    tfamp.keep_float32(model, outputs=False)
    kept = [layer.compute_dtype for layer in model.layers]
    tfamp.fit(model, X, Y, verbose=0)
    assert [layer.compute_dtype for layer in model.layers] == kept


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_model_built_before_set_precision(is_kept):
    model = build_model()
    if is_kept:
        # There was nothing to keep.
        tfamp.keep_float32(model)
    tfamp.set_precision("mixed_float16")
    with pytest.warns(UserWarning, match=r"set_precision\('mixed_float16'\) a"):
        tfamp.fit(model, X, Y, verbose=0)


def test_a_precision_that_clear_session_undid():
    tfamp.set_precision("mixed_bfloat16")
    keras.backend.clear_session()
    model = build_model()
    with pytest.warns(UserWarning, match="clear_session.* undid"):
        tfamp.fit(model, X, Y, verbose=0)


def test_an_optimizer_wrapped_for_another_precision():
    optimizer = tfamp.wrap_optimizer("sgd")
    tfamp.set_precision("mixed_float16")
    model = build_model(optimizer, auto_scale_loss=False)
    with pytest.warns(UserWarning, match="move tfamp.wrap_optimizer"):
        tfamp.fit(model, X, Y, verbose=0)


def test_a_loss_that_compile_was_told_not_to_scale_is_not_scaled():
    tfamp.set_precision("mixed_float16")
    model = build_model(auto_scale_loss=False)
    with pytest.warns(UserWarning, match="without loss scaling"):
        history = tfamp.fit(model, X, Y, verbose=0)
    assert history.history["loss_scale"] == [1]


def test_a_model_built_outside_of_the_scope(mirrored):
    model = build_model()
    with (
        mirrored(2).scope(),
        pytest.raises(tfamp.InputError, match="outside of this strategy's"),
    ):
        tfamp.fit(model, X, Y, verbose=0)


def test_a_strategy_that_no_model_is_built_in(mirrored, monkeypatch):
    strategy = mirrored(2)
    monkeypatch.setattr(strategies, "_strategy_of", lambda *_, **__: strategy)
    tfamp.get_strategy("mirrored")
    with pytest.warns(UserWarning, match="one device, not on 2 replicas"):
        tfamp.fit(build_model(), X, Y, verbose=0)
    with strategy.scope():
        model = build_model()
    tfamp.fit(model, X, Y, verbose=0)
    # It is in use: other models may do without it.
    tfamp.fit(build_model(), X, Y, verbose=0)


def test_a_model_that_overrides_fit_is_told_that_it_is_not_called():
    class Own(keras.Sequential):
        def make_train_function(self, force=False):
            raise NotImplementedError

    model = Own([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="overrides make_train_function"):
        tfamp.fit(model, X, Y, verbose=0)


def test_a_step_of_its_own_may_call_the_model_on_something_else():
    class Pairs(keras.Model):
        def train_step(self, pairs):
            with tf.GradientTape() as tape:
                near, far = self(pairs[:, 0]), self(pairs[:, 1])
                loss = self.compute_loss(
                    y=tf.range(tf.shape(near)[0]),
                    y_pred=near @ tf.transpose(far),
                )
            self.optimizer.apply(
                tape.gradient(loss, self.trainable_variables),
                self.trainable_variables,
            )
            return {"loss": loss}

    x = keras.Input((3,))
    model = Pairs(x, keras.layers.Dense(2)(x))
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    pairs = np.ones((4, 2, 3), "float32")
    before = model.get_weights()[0]
    history = tfamp.fit(model, tf.data.Dataset.from_tensors(pairs), verbose=0)
    # Four equal rows: each is as near as any other.
    np.testing.assert_allclose(history.history["loss"], [np.log(4)], rtol=1e-5)
    assert model.get_weights()[0].shape == before.shape
