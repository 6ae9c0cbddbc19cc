"""What a model computes outside of the calls of its layers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfamp
from tfamp.precision.keep_float32 import keep_float32

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)
X = np.ones([4, 2], "float32")
# Beyond float16 once it is squared.
LARGE = 300.0
LOSS = 90_000 / 1024


@keras.saving.register_keras_serializable(package="tests")
class OwnStep(keras.Model):
    """Its step squares, sums and takes softmaxes of what its layer returns."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(
            2, kernel_initializer="identity", use_bias=False
        )

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        with tf.GradientTape() as tape:
            # 16 bits, as a layer's result that is no output of the model.
            hidden = ops.cast(self.dense(data[0]), self.compute_dtype)
            large = hidden * LARGE
            mean_square = tf.reduce_mean(tf.square(large))
            share = tf.nn.softmax(large / LARGE)
            product = ops.matmul(ops.transpose(hidden), share)
            loss = tf.cast(mean_square, tf.float32) / 1024
            scaled = self.optimizer.scale_loss(loss)
        variables = self.trainable_variables
        gradients = tape.gradient(scaled, variables)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return {"loss": loss, "product": tf.reduce_sum(product)}

    def get_config(self):
        return {"name": self.name}


@pytest.fixture(params=["mixed_float16", "mixed_bfloat16"])
def policy(request):
    keras.config.set_dtype_policy(request.param)
    return request.param


def compiled():
    model = OwnStep()
    model(X)
    model.compile(
        tfamp.LossScaleOptimizer(keras.optimizers.SGD(0.0), initial_scale=1.0),
        auto_scale_loss=False,
    )
    return model


def dtypes_in_step(model):
    """The dtypes of each kind of operation in the graph of a step."""
    step = tf.function(lambda x: model.train_step((x, x)), autograph=False)
    found = {}
    for node in step.get_concrete_function(X).graph.as_graph_def().node:
        if "T" in node.attr and not node.name.startswith("gradient"):
            name = tf.as_dtype(node.attr["T"].type).name
            found.setdefault(node.op, set()).add(name)
    return found


def test_a_step_of_the_models_own_squares_in_float32(policy):
    model = compiled()
    kept = keep_float32(model)
    assert "train_step" in next(str(each) for each in kept)
    # fit by Keras, eagerly and traced, and by tfamp.
    for run_eagerly in (True, False):
        model.run_eagerly = run_eagerly
        history = model.fit(X, X, batch_size=4, verbose=0).history
        assert history["loss"] == [LOSS]
    history = tfamp.fit(model, X, X, batch_size=4, verbose=0).history
    assert history["loss"] == [LOSS]
    assert history["skipped_steps"] == [0]


def test_fit_keeps_an_own_step_by_itself_and_leaves_it_when_asked(policy):
    history = tfamp.fit(compiled(), X, X, batch_size=4, verbose=0).history
    assert history["loss"] == [LOSS]
    stock = tfamp.fit(
        compiled(), X, X, batch_size=4, keep_float32=False, verbose=0
    ).history
    # Squares beyond float16; in bfloat16 they are rounded to 8 bits.
    assert stock["loss"] != [LOSS]


def test_products_of_a_step_stay_in_16_bits_and_sums_do_not(policy):
    model = compiled()
    keep_float32(model, outputs=False)
    dtypes = dtypes_in_step(model)
    assert dtypes["MatMul"] == {policy.removeprefix("mixed_")}
    for name in ("Square", "Mean", "Softmax"):
        assert dtypes[name] == {"float32"}, name


def test_an_own_step_is_kept_once_undone_and_saved(policy, tmp_path):
    model = compiled()
    assert any(each.changed for each in keep_float32(model))
    assert not any(each.changed for each in keep_float32(model))
    model.save(tmp_path / "own.keras")
    loaded = tfamp.load_model(tmp_path / "own.keras")
    assert isinstance(loaded, OwnStep)
    assert dtypes_in_step(loaded)["Square"] == {"float32"}
    keep_float32(model, operations=False)
    assert type(model) is OwnStep
    assert policy.removeprefix("mixed_") in dtypes_in_step(model)["Square"]


def test_a_step_that_stores_16_bits_and_calls_what_we_do_not_know(policy):
    class Storing(OwnStep):
        def __init__(self):
            super().__init__()
            self.last = tf.Variable(
                tf.zeros([], self.compute_dtype), trainable=False
            )

        def train_step(self, data):
            hidden = tf.cast(self.dense(data[0]), self.compute_dtype)
            self.last.assign(tf.reduce_mean(hidden))
            image = tf.image.flip_left_right(ops.exp(hidden)[None, ..., None])
            array = tf.TensorArray(self.compute_dtype, 1)
            array = array.write(0, tf.reduce_sum(hidden, 0))
            return {
                "loss": tf.cast(self.last, tf.float32)
                + tf.reduce_sum(tf.cast(image, tf.float32))
                + tf.cast(array.stack()[0, 0], tf.float32)
            }

    model = Storing()
    model(X)
    model.compile(tfamp.wrap_optimizer("sgd"), auto_scale_loss=False)
    loss = tfamp.fit(model, X, X, batch_size=4, verbose=0).history["loss"]
    np.testing.assert_allclose(loss, [1 + 8 * np.e + 4], rtol=1e-2)


def test_a_loss_of_the_models_own_computes_in_float32(policy):
    class OwnLoss(keras.Sequential):
        def compute_loss(self, x=None, y=None, y_pred=None, *_, **__):
            hidden = ops.cast(y_pred, self.compute_dtype) * LARGE
            return ops.mean(ops.square(hidden))

    model = OwnLoss([keras.Input([2]), layers.ReLU()])
    model.add(layers.Dense(2, "relu", False, "identity"))
    keep_float32(model)
    model.compile(tfamp.wrap_optimizer("sgd"), auto_scale_loss=False)
    assert model.evaluate(X, X, verbose=0) == LARGE**2


def test_the_step_of_a_model_without_a_call_is_kept(policy):
    class Pair(keras.Model):
        def __init__(self):
            super().__init__()
            self.net = keras.Sequential(
                [keras.Input([2]), layers.Dense(2, None, False, "identity")]
            )

        def train_step(self, data):
            hidden = tf.cast(self.net(data[0]), self.compute_dtype) * LARGE
            return {"loss": tf.reduce_mean(tf.square(hidden))}

    model = Pair()
    model.compile(tfamp.wrap_optimizer("sgd"), auto_scale_loss=False)
    loss = tfamp.fit(model, X, X, batch_size=4, verbose=0).history["loss"]
    assert loss == [LARGE**2]


def test_an_activity_regularizer_sums_in_float32(policy, tmp_path):
    inputs = keras.Input([2])
    x = layers.Dense(
        2, None, False, "identity", activity_regularizer=keras.regularizers.L2()
    )(inputs)
    model = keras.Model(inputs, layers.Dense(2)(x))
    keep_float32(model)
    data = X * LARGE
    model(data)
    # Newer versions of Keras divide it by the number of rows.
    stock = layers.Activation(
        "linear", dtype="float32", activity_regularizer=keras.regularizers.L2()
    )
    stock(data)
    assert float(model.losses[0]) == pytest.approx(float(stock.losses[0]))
    sums = 0.01 * (data.astype("float64") ** 2).sum()
    assert float(stock.losses[0]) in (
        pytest.approx(sums),
        pytest.approx(sums / len(data)),
    )
    assert model.losses[0].dtype == tf.float32
    model.save(tmp_path / "model.keras")
    loaded = tfamp.load_model(tmp_path / "model.keras")
    loaded(data)
    assert loaded.losses[0].dtype == tf.float32
    keep_float32(model, operations=False)
    model(data)
    assert model.losses[0].dtype != tf.float32
