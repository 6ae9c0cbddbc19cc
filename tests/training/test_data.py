"""Data sets of every length, callbacks of every kind, and bad input."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfamp
from tests.conftest import mostly_slow


def build_model(optimizer=None, **options):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    model.compile(
        optimizer or keras.optimizers.Adam(0.02),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **options,
    )
    return model


def dataset(rows=24, batch_size=8, **options):
    generator = np.random.default_rng(3)
    x = generator.normal(size=(rows, 4)).astype("float32")
    y = generator.integers(0, 3, rows)
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(
        batch_size, **options
    )


def of_unknown_length(data):
    return tf.data.Dataset.from_generator(
        lambda: iter(data), output_signature=data.element_spec
    )


def steps_of(model):
    return int(model.optimizer.iterations.numpy())


def test_a_generator_of_unknown_length_ends_each_epoch():
    model = build_model()
    history = tfamp.fit(
        model, of_unknown_length(dataset()), epochs=3, verbose=0
    )
    assert steps_of(model) == 9
    assert history.epoch == [0, 1, 2]
    assert history.params["steps"] == 3


def test_steps_per_epoch_go_on_where_the_epoch_before_stopped():
    first = np.arange(5, dtype="float32")
    seen = []

    class Records(layers.Layer):
        def call(self, x):
            tf.py_function(lambda t: seen.append(float(t[0, 0])), [x], [])
            return x

    model = keras.Sequential([keras.Input((1,)), Records(), layers.Dense(1)])
    model.compile("sgd", loss="mae")
    data = tf.data.Dataset.from_tensor_slices((first[:, None], first)).batch(1)
    tfamp.fit(model, data.repeat(), epochs=2, steps_per_epoch=3, verbose=0)
    assert seen[-6:] == [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize(
    ("steps_per_epoch", "steps_done"), [(2, 2 + 1 + 2 + 1), (4, 3 * 4)]
)
def test_data_that_end_early_begin_anew_in_the_next_epoch_with_a_warning(
    steps_per_epoch, steps_done
):
    model = build_model()
    with pytest.warns(UserWarning, match=r"Use dataset.repeat\(\)") as caught:
        history = tfamp.fit(
            model,
            dataset(),
            epochs=4,
            steps_per_epoch=steps_per_epoch,
            verbose=0,
        )
    (ours,) = {
        each.filename for each in caught if "repeat()" in str(each.message)
    }
    assert ours == __file__
    assert steps_of(model) == steps_done
    assert len(history.history["loss"]) == 4
    assert np.isfinite(history.history["loss"]).all()


def test_a_callback_that_stops_in_mid_epoch_gets_no_warning():
    model = build_model()
    stop = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: setattr(
            model, "stop_training", batch == 1
        )
    )
    tfamp.fit(
        model,
        dataset().repeat(),
        epochs=3,
        steps_per_epoch=3,
        callbacks=[stop],
        verbose=0,
    )
    assert steps_of(model) == 2


@pytest.mark.slow
@pytest.mark.parametrize("rows", mostly_slow([9, 10, 11], always=[9]))
def test_last_batches_smaller_than_the_replicas_train_alike(rows, mirrored):
    weights = []
    for replicas in (1, 4):
        keras.utils.set_random_seed(1)
        with mirrored(replicas).scope():
            model = build_model(keras.optimizers.SGD(0.5))
        tfamp.fit(model, dataset(rows), verbose=0)
        weights.append(model.get_weights())
    for one, four in zip(*weights, strict=True):
        np.testing.assert_allclose(one, four, rtol=2e-5, atol=2e-6)


def test_eager_steps_split_a_partial_batch_into_microbatches():
    weights = []
    for options in ({"microbatches": 1}, {"microbatches": 2}):
        keras.utils.set_random_seed(1)
        model = build_model(keras.optimizers.SGD(0.5), run_eagerly=True)
        tfamp.fit(model, dataset(11), verbose=0, **options)
        weights.append(model.get_weights())
    for one, two in zip(*weights, strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-5, atol=2e-6)


def test_keras_callbacks_do_what_they_do_in_model_fit(tmp_path):
    averaging = keras.optimizers.Adam(0.02, use_ema=True, ema_momentum=0.5)
    model = build_model(averaging)
    rates, batches = [], []
    history = tfamp.fit(
        model,
        dataset(),
        epochs=4,
        validation_data=dataset(),
        verbose=0,
        callbacks=[
            keras.callbacks.LearningRateScheduler(lambda e, lr: lr / 2),
            keras.callbacks.ReduceLROnPlateau(
                monitor="skipped_steps", mode="min", patience=1, factor=0.25
            ),
            keras.callbacks.EarlyStopping(
                monitor="skipped_steps",
                mode="min",
                patience=3,
                restore_best_weights=True,
            ),
            keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"),
            keras.callbacks.ModelCheckpoint(
                tmp_path / "best.weights.h5",
                monitor="val_loss",
                save_best_only=True,
                save_weights_only=True,
            ),
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
            keras.callbacks.TerminateOnNaN(),
            keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
            keras.callbacks.LambdaCallback(
                on_epoch_begin=lambda epoch, logs: rates.append(
                    float(model.optimizer.learning_rate.numpy())
                ),
                on_train_batch_end=lambda batch, logs: batches.append(batch),
            ),
        ],
    ).history
    # Halved by the scheduler, quartered by the plateau from epoch 2 on.
    np.testing.assert_allclose(
        rates, 0.02 * np.array([1 / 2, 1 / 4, 1 / 32, 1 / 256]), rtol=1e-5
    )
    assert batches == [0, 1, 2] * 4
    assert (tmp_path / "4.keras").exists()
    assert (tmp_path / "best.weights.h5").exists()
    header, *lines = (tmp_path / "log.csv").read_text().splitlines()
    assert {"loss_scale", "val_accuracy"} < set(header.split(","))
    assert len(lines) == len(history["loss"]) == 4


def test_backup_and_restore_takes_training_up_again(tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)

    def stop_after_two(epoch, logs):
        if epoch == 1:
            raise KeyboardInterrupt

    stop = keras.callbacks.LambdaCallback(on_epoch_end=stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        tfamp.fit(
            build_model(),
            dataset(),
            epochs=3,
            callbacks=[backup, stop],
            verbose=0,
        )
    resumed = build_model()
    history = tfamp.fit(
        resumed, dataset(), epochs=3, callbacks=[backup], verbose=0
    )
    assert history.epoch == [2]


def test_training_twice_goes_on_where_it_stopped():
    once, twice = build_model(), build_model()
    twice.set_weights(once.get_weights())
    tfamp.fit(once, dataset(), epochs=2, verbose=0)
    for _ in range(2):
        tfamp.fit(twice, dataset(), verbose=0)
    for a, b in zip(once.get_weights(), twice.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (
            lambda: keras.Sequential([layers.Dense(1)]),
            dataset,
            {},
            "is not compiled; call model.compile",
        ),
        (build_model, lambda: None, {}, "x=None; pass arrays"),
        (build_model, lambda: "rows", {}, "Unrecognized data type"),
        (build_model, lambda: dataset().unbatch(), {}, "batch it"),
        (build_model, lambda: dataset().repeat(), {}, "pass steps_per_epoch"),
        (build_model, lambda: dataset().take(0), {}, "before the first batch"),
        (
            build_model,
            lambda: dataset(24, 6, drop_remainder=True),
            {"microbatches": 4},
            "6 is not divisible by 1 replicas times 4 microbatches; use 4",
        ),
        (
            build_model,
            lambda: dataset().map(lambda x, y: (x, y + 7)),
            {},
            r"label value of \d+ which is outside the valid range of \[0, 3\)",
        ),
        (build_model, dataset, {"epochs": -1}, "epochs=-1 must be an integer"),
        (build_model, dataset, {"epochs": "3"}, "epochs='3' must be an int"),
        (build_model, dataset, {"steps_per_epoch": 1.5}, "steps_per_epoch=1.5"),
        (build_model, dataset, {"steps_per_loop": 0}, "steps_per_loop=0"),
        (build_model, dataset, {"jit": "maybe"}, "jit='maybe'"),
        (build_model, dataset, {"verbose": 3}, "verbose=3"),
        (build_model, dataset, {"on_overflow": "panic"}, "'panic'; expected"),
        (
            build_model,
            dataset,
            {"all_reduce_dtype": "int8"},
            "Unknown all_reduce_dtype 'int8'",
        ),
        (
            build_model,
            dataset,
            {"validation_data": [1, 2]},
            "Unrecognized data type",
        ),
    ],
)
def test_bad_input_gets_one_line(model, data, options, message):
    options = {"verbose": 0} | options
    with pytest.raises(tfamp.InputError, match=message) as error:
        tfamp.fit(model(), data(), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (lambda: None, {}, "x=None; pass arrays"),
        (lambda: dataset().unbatch(), {}, "batch it"),
        (lambda: dataset().repeat(), {}, "repeats without end"),
        (lambda: dataset().take(0), {}, "before the first batch"),
        (dataset, {"steps": 0}, "steps=0 must be an integer"),
    ],
)
def test_bad_input_to_evaluation_gets_one_line(data, options, message):
    with pytest.raises(tfamp.InputError, match=message):
        tfamp.evaluate(build_model(), data(), **options)


def test_layers_that_synchronize_replicas_train_where_they_can(mirrored):
    def build():
        with mirrored(2).scope():
            model = keras.Sequential(
                [
                    keras.Input((4,)),
                    layers.BatchNormalization(synchronized=True),
                    layers.Dense(3),
                ]
            )
            model.compile(
                "sgd",
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            )
        return model

    assert np.isfinite(tfamp.fit(build(), dataset(), verbose=0).history["loss"])
    for options in ({"jit": True}, {"microbatches": 2}):
        with pytest.raises(tfamp.InputError, match="synchronizes replicas"):
            tfamp.fit(build(), dataset(), verbose=0, **options)


def test_an_optimizer_of_no_strategy_is_refused_under_one(mirrored):
    optimizer = tfamp.wrap_optimizer("adam")
    with mirrored(2).scope():
        model = build_model(optimizer)
    with pytest.raises(tfamp.InputError, match=r"within strategy\.scope\(\)"):
        tfamp.fit(model, dataset(), verbose=0)
