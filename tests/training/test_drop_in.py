"""What a user of `Model.fit` types gives what `Model.fit` gives."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import first_always

RNG = np.random.default_rng(0)
X = RNG.normal(size=(22, 3)).astype("float32")
Y = X[:, :1] - X[:, 1:2] * X[:, 2:]
CLASSES = (Y[:, 0] > 0).astype("int32")
WEIGHTS = RNG.uniform(0.5, 2, 22).astype("float32")


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8]


def generator():
    while True:
        for i in range(2):
            yield X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8]


def dataset(*arrays):
    return tf.data.Dataset.from_tensor_slices(arrays or (X, Y)).batch(8)


def build_model(**options):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", **options)
    return model


def fit_both(arguments, **options):
    """The histories of both, of data that are made anew for each."""
    histories = []
    for fit in (keras.Model.fit, tfamp.fit):
        model = build_model(**options)
        history = fit(model, **arguments(), verbose=0)
        histories.append(history.history)
    return histories


@pytest.mark.filterwarnings("ignore:.*`shuffle=True` was passed")
@pytest.mark.filterwarnings("ignore:.*ran out of data")
@pytest.mark.parametrize(
    ("arguments", "options"),
    first_always(
        [
            (lambda: {"x": X, "y": Y}, {}),
            (lambda: {"x": X, "y": Y, "batch_size": 5, "epochs": 2}, {}),
            (lambda: {"x": X, "y": Y, "shuffle": False, "batch_size": 8}, {}),
            (lambda: {"x": X, "y": Y, "shuffle": "batch", "batch_size": 8}, {}),
            (
                lambda: {
                    "x": X,
                    "y": Y,
                    "batch_size": 8,
                    "validation_split": 0.3,
                },
                {"steps_per_execution": 2},
            ),
            (
                lambda: {
                    "x": X,
                    "y": CLASSES,
                    "class_weight": {0: 1.0, 1: 5.0},
                    "batch_size": 8,
                },
                {},
            ),
            (
                lambda: {
                    "x": X,
                    "y": Y,
                    "sample_weight": WEIGHTS,
                    "validation_data": (X, Y, WEIGHTS),
                    "validation_batch_size": 7,
                    "validation_steps": 2,
                },
                {},
            ),
            (
                lambda: {
                    "x": X,
                    "y": Y,
                    "epochs": 3,
                    "initial_epoch": 1,
                    "validation_data": dataset(),
                    "validation_freq": [2],
                },
                {},
            ),
            (lambda: {"x": Batches(), "epochs": 2}, {}),
            (lambda: {"x": generator(), "steps_per_epoch": 3, "epochs": 2}, {}),
            (
                lambda: {
                    "x": dataset(X, CLASSES),
                    "class_weight": {0: 1.0, 1: 5.0},
                },
                {"run_eagerly": True},
            ),
            (lambda: {"x": X, "y": Y, "epochs": 0}, {}),
        ],
        6,
    ),
)
def test_the_history_is_that_of_model_fit(arguments, options):
    stock, ours = fit_both(arguments, **options)
    assert set(stock) <= set(ours)
    for name, values in stock.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-6, atol=1e-6)


def test_steps_beyond_the_data_go_on_in_the_next_epoch_with_a_warning():
    model = build_model()
    with pytest.warns(UserWarning, match="ended after 3 of 5 steps"):
        history = tfamp.fit(
            model, X, Y, batch_size=8, epochs=2, steps_per_epoch=5, verbose=0
        )
    assert len(history.history["loss"]) == 2
    assert int(model.optimizer.iterations.numpy()) == 6


def test_a_generator_that_ends_says_what_later_epochs_lack():
    batches = ((X[:8], Y[:8]) for _ in range(4))
    with pytest.warns(UserWarning, match="ended after 2 of 4 steps"):
        tfamp.fit(build_model(), batches, epochs=2, verbose=0)


def test_a_model_without_trainable_weights_is_evaluated_with_a_warning():
    model = build_model()
    model.trainable = False
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="does not have any trainable"):
        history = tfamp.fit(model, X, Y, batch_size=8, verbose=0)
    expected = np.mean((model(X).numpy() - Y) ** 2)
    np.testing.assert_allclose(history.history["loss"], [expected], rtol=1e-5)


def test_no_more_epochs_are_run_than_keras_is_set_to():
    keras.config.set_max_epochs(1)
    try:
        with pytest.warns(UserWarning, match="Limiting epochs to 1"):
            history = tfamp.fit(build_model(), X, Y, epochs=3, verbose=0)
    finally:
        keras.config.set_max_epochs(None)
    assert len(history.history["loss"]) == 1


def test_evaluate_takes_arrays_and_returns_a_list_where_asked():
    model = build_model(metrics=["mae"])
    expected = model.evaluate(X, Y, batch_size=8, verbose=0)
    ours = tfamp.evaluate(model, X, Y, batch_size=8, return_dict=False)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": (X, Y)}, r"x is a tuple of 2, but the model has one input"),
        ({"x": dataset(), "y": Y}, "`y` should not be passed"),
        ({"x": dataset(), "validation_split": 0.2}, "validation_split"),
        ({"x": X, "y": Y[:5]}, "same size|cardinality"),
        ({"x": X, "y": Y, "batch_size": 0}, "batch_size=0 must be"),
        ({"x": X, "y": Y, "validation_freq": 0}, "validation_freq=0"),
        ({"x": X, "y": Y, "keep_float32": "no"}, "keep_float32='no'"),
    ],
)
def test_data_that_cannot_be_taken_get_one_line(arguments, message):
    with pytest.raises(tfamp.InputError, match=message) as error:
        tfamp.fit(build_model(), **arguments, verbose=0)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(
    keras.__version__.startswith("3.10"),
    reason="tells the first batch of an execution, not the last",
)
def test_callbacks_are_told_of_executions_as_by_keras():
    told = []

    class Tell(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            told.append(("train", batch))

        def on_test_batch_begin(self, batch, logs=None):
            told.append(("test", batch))

        def on_predict_batch_end(self, batch, logs=None):
            told.append(("predict", batch, len(logs["outputs"])))

    def run(fit, evaluate, predict):
        told.clear()
        model = build_model(steps_per_execution=2)
        options = {"batch_size": 8, "callbacks": [Tell()], "verbose": 0}
        fit(model, X, Y, **options)
        evaluate(model, X, Y, **options)
        outputs = predict(model, X, **options)
        return list(told), outputs

    stock, expected = run(
        keras.Model.fit, keras.Model.evaluate, keras.Model.predict
    )
    ours, outputs = run(tfamp.fit, tfamp.evaluate, tfamp.predict)
    assert ours == stock
    assert stock[-1] == ("predict", 3, 6)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5)


def test_workers_that_read_without_end_begin_each_epoch_anew():
    class Endless(Batches):
        @property
        def num_batches(self):
            return None

    history = tfamp.fit(
        build_model(),
        Endless(workers=2),
        steps_per_epoch=2,
        epochs=3,
        verbose=0,
    )
    assert len(history.history["loss"]) == 3


def test_a_loss_without_targets_gets_one_line():
    with pytest.raises(tfamp.InputError, match="the data have no targets"):
        tfamp.fit(build_model(), X, verbose=0)


def test_ragged_batches_that_a_layer_cannot_take_get_one_line():
    rows = tf.ragged.constant([[1.0, 2.0], [3.0]] * 4)
    ragged = tf.data.Dataset.from_tensor_slices((rows, np.zeros(8))).batch(8)
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(tfamp.InputError, match=r"ragged|cannot take these"):
        tfamp.fit(model, ragged, verbose=0)


def test_a_token_beyond_the_vocabulary_gets_one_line():
    model = keras.Sequential([keras.layers.Embedding(3, 1)])
    model.compile("sgd", "mse")
    with pytest.raises(tfamp.InputError, match=r"= 3 is not in \[0, 3\)"):
        tfamp.fit(model, np.full((4, 1), 3), np.zeros((4, 1, 1)), verbose=0)


def test_probe_takes_datasets_only():
    with pytest.raises(tfamp.InputError, match=r"Expected a tf\.data"):
        tfamp.probe(build_model(), (X, Y))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (keras.optimizers.Adam, r"Adam is a class; .* wrap_optimizer\(Adam\("),
        ("adma", "Could not interpret|adma"),
    ],
)
def test_what_is_no_optimizer_gets_one_line(optimizer, message):
    with pytest.raises(tfamp.InputError, match=message):
        tfamp.wrap_optimizer(optimizer)


@pytest.mark.parametrize(
    ("compiled", "given", "message"),
    [
        ({"steps_per_execution": 2}, {"steps_per_loop": 3}, "leave one"),
        ({"jit_compile": True}, {"jit": False}, "leave one of the two out"),
    ],
)
def test_what_contradicts_compile_gets_one_line(compiled, given, message):
    with pytest.raises(tfamp.InputError, match=message):
        tfamp.fit(build_model(**compiled), X, Y, verbose=0, **given)
