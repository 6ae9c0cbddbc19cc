"""What the worker processes of `test_multi_worker` run.

    python -m tests.multi_worker_program FOLDER SCENARIO ...

One start runs several scenarios one after another; TF_CONFIG says who the
workers are. Each worker writes what a scenario left it with to
`FOLDER/SCENARIO-WORKER.npz`. The scenarios are functions of a strategy, so
that a test can run the same one in a single process.
"""

import json
import os
import pathlib
import sys
import threading
import time

import keras
import numpy as np
import tensorflow as tf
from absl import logging

import tfamp
from recipes import image_classification
from tests import resumable_run
from tests.distribute import reduction_cases
from tests.overflow import test_blame
from tests.overflow import test_on_replicas as overflows
from tests.recipes import test_lora
from tests.scaling import shard_cases
from tests.training import test_matrix, test_wire

# Divisible by 2 and 3 workers, and by as many microbatches.
BATCH = 12
RECIPE_STEPS = 6
EPOCHS, EPOCH_STEPS = 6, resumable_run.STEPS

# Half of the matrix, in which any two choices still meet in every way.
MATRIX_ROW = [
    (precision, jit, microbatches, steps_per_loop)
    for precision, jit, microbatches, steps_per_loop in (
        test_matrix.COMBINATIONS
    )
    if jit == ((microbatches == 1) == (steps_per_loop == 1))
]

WIRE_FACTORS = (1e-8, 1e-3, 1e5)

# Clocks: each worker reads its own.
_SPEEDS = ("examples_per_second", "step_milliseconds")


def small(strategy, microbatches=1):
    """A model without batch normalization, in float16."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((10 * BATCH, 6)).astype("float32")
    y = generator.integers(0, 4, 10 * BATCH)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(
        BATCH, drop_remainder=True
    )
    with strategy.scope():
        model = _classifier("mixed_float16")
    history = tfamp.fit(model, dataset, microbatches=microbatches, verbose=0)
    return _weights(model) | _counters(model) | _logs(history)


def recipe(strategy, microbatches=1):
    """A few steps of the image recipe, in float16."""
    config = image_classification.Config(
        batch_size=BATCH, epochs=1, warmup_epochs=0.0, learning_rate=0.02
    )
    tfamp.set_precision("mixed_float16")
    dataset, _ = image_classification.make_datasets(config)
    with strategy.scope():
        model = image_classification.build_model(config)
    history = tfamp.fit(
        model,
        dataset.take(RECIPE_STEPS),
        microbatches=microbatches,
        verbose=0,
    )
    return _weights(model) | _counters(model) | _logs(history)


def overflow(strategy):
    """Gradients that are not finite on worker 0, on 1, on both."""
    model = overflows.build(strategy)
    half = overflows.ROWS // 2
    datasets = [overflows.batch()]
    for rows in ([0], [half], [0, half]):
        datasets.append(overflows.batch(poisoned_rows=rows))
        datasets.append(overflows.batch())
    seen = []
    overflows.with_tfamp_fit(
        model, datasets, lambda: seen.append(_snapshot(model))
    )
    taken = {"clean": seen[::2], "poisoned": seen[1::2]}
    return {
        f"{kind}{i}_{name}": value
        for kind, snapshots in taken.items()
        for i, values in enumerate(snapshots)
        for name, value in values.items()
    }


def blame(strategy):
    """What overflowed first, on either worker: as each of them says it."""
    plants = test_blame.PLANTS[:3] + test_blame.PLANTS[-2:]
    lines = []
    warning, logging.warning = (
        logging.warning,
        lambda t, *v: lines.append(t % v),
    )
    try:
        model = test_blame.build(strategy)
        test_blame.fit_unkept(
            model, test_blame.data(plants), on_overflow="blame", verbose=0
        )
    finally:
        logging.warning = warning
    said = [line for line in lines if "at fault" in line]
    return _weights(model) | _counters(model) | {"said": np.array(said)}


def stop(strategy):
    """One worker alone wants to stop; then a callback that all have."""

    class Stop(keras.callbacks.Callback):
        def __init__(self, worker, *, after_step=None, after_epoch=None):
            super().__init__()
            self._is_here = worker == _worker(strategy)
            self._step, self._epoch = after_step, after_epoch

        def on_train_batch_end(self, batch, logs=None):
            if self._is_here and batch + 1 == self._step:
                self.model.stop_training = True

        def on_epoch_end(self, epoch, logs=None):
            if self._is_here and epoch + 1 == self._epoch:
                self.model.stop_training = True

    never_better = keras.callbacks.EarlyStopping(
        "loss", min_delta=1e9, patience=2, restore_best_weights=True
    )
    results = {}
    for name, callback in {
        "step_on_0": Stop(0, after_step=2),
        "step_on_1": Stop(1, after_step=2),
        "epoch_on_1": Stop(1, after_epoch=2),
        "early": never_better,
    }.items():
        with strategy.scope():
            model = _classifier("float32")
        history = tfamp.fit(
            model,
            _uneven(),
            epochs=6,
            steps_per_loop=1,
            callbacks=[callback],
            verbose=0,
        )
        results[f"{name}_epochs"] = len(history.epoch)
        values = _weights(model) | _counters(model)
        results |= {f"{name}_{key}": value for key, value in values.items()}
    return results


def evaluation(strategy):
    """Last batches of fewer rows than workers, in training and after."""

    class Rows(keras.metrics.Sum):
        def update_state(self, y_true, y_pred, sample_weight=None):
            super().update_state(tf.ones(tf.shape(y_true)[0]))

    with strategy.scope():
        model = _classifier("float32", metrics=["accuracy", Rows(name="rows")])
    history = tfamp.fit(
        model, _uneven(), epochs=2, validation_data=_uneven(25), verbose=0
    )
    results = tfamp.evaluate(model, _uneven(37))
    return (
        _weights(model)
        | _logs(history)
        | {f"evaluate_{name}": value for name, value in results.items()}
    )


def prediction(strategy):
    """Outputs in a structure, in 16 bits; the last batch has one row."""
    rows = np.arange(13, dtype="float32")[:, None]
    keras.config.set_dtype_policy("mixed_bfloat16")
    with strategy.scope():
        x = keras.Input((1,))
        double = keras.layers.Add()([x, x])
        less = keras.layers.Rescaling(1.0, offset=-1.0)(x)
        model = keras.Model(x, {"double": double, "pair": [x, less]})
    results = {}
    for size in (4, 3):
        outputs = tfamp.predict(model, rows, batch_size=size)
        results |= {
            f"double {size}": outputs["double"],
            f"same {size}": outputs["pair"][0],
            f"less {size}": outputs["pair"][1],
        }
    return results


def files(strategy, folder):
    """Callbacks that write, on each worker into a folder of its own."""
    folder = folder / f"files-{_worker(strategy)}"
    folder.mkdir()
    config = image_classification.Config(output_dir=str(folder / "run"))
    with strategy.scope():
        model = _classifier("float32")
    history = tfamp.fit(
        model,
        _uneven(),
        epochs=2,
        callbacks=[
            *tfamp.recipe.run_callbacks(config),
            keras.callbacks.ModelCheckpoint(str(folder / "model.keras")),
            keras.callbacks.CSVLogger(str(folder / "log.csv")),
            keras.callbacks.BackupAndRestore(str(folder / "backup")),
        ],
        verbose=2,
    )
    return _weights(model) | _logs(history)


def sharded(strategy):
    """Rows that each worker decodes for itself, a last batch of one too."""
    generator = np.random.default_rng(13)
    x = generator.standard_normal((13, 6)).astype("float32")
    records = tf.data.Dataset.from_tensor_slices(
        (x, generator.integers(0, 4, 13))
    ).shuffle(13, seed=1)
    decoded = []

    def decode(x, y):
        number = tf.numpy_function(
            lambda y: decoded.append(y) or y, [y], tf.int64
        )
        return 2.0 * x, tf.ensure_shape(number, [])

    with strategy.scope():
        model = _classifier("float32")
    data = tfamp.sharded(records, decode, 6)
    history = tfamp.fit(model, data, epochs=2, verbose=0)
    # Two epochs of one worker's rows, of 6, 6 and 1: that has one at least.
    count = len(decoded)
    results = tfamp.evaluate(model, data)
    return (
        _weights(model)
        | _logs(history)
        | {f"evaluate_{name}": value for name, value in results.items()}
        | {"decoded": count}
    )


def reduction(strategy):
    """Tensors of each dtype, and variables made of them."""
    return reduction_cases.crossed(strategy) | reduction_cases.variables(
        strategy
    )


def low_rank(strategy):
    """LoRA beside a frozen base in bfloat16, and in int8."""
    return {
        f"{name}_{key}": value
        for name, dtype in (("bfloat16", "compute"), ("int8", "int8"))
        for key, value in test_lora.trained_on(strategy, dtype).items()
    }


def matrix(strategy):
    """The row of `test_fit_matrix` for several workers."""
    return {
        f"{i}_{name}": value
        for i, combination in enumerate(MATRIX_ROW)
        for name, value in test_matrix.train(strategy, *combination).items()
    }


def shards(strategy):
    """The same training with whole weights and in shards."""
    return {
        f"{shard}_{name}_{key}": value
        for name in ("pieces", "float16", "narrow_wire")
        for shard in (False, True)
        for key, value in shard_cases.trained(
            strategy, shard, **shard_cases.CASES[name]
        ).items()
    }


def wire(strategy):
    """Gradients of three sizes that cross in float16."""
    results = {}
    for factor in WIRE_FACTORS:
        with strategy.scope():
            model = test_wire.build_model(factor, keras.optimizers.SGD(1.0))
        # For the largest the scale must come down from 2^16 to 1/2.
        steps = 18 if factor == 1e5 else 1
        tfamp.fit(
            model,
            test_wire.dataset(steps),
            verbose=0,
            on_overflow="ignore",
            all_reduce_dtype="float16",
        )
        results[f"{factor:g}_weight"] = model.get_weights()[0]
        results[f"{factor:g}_forward"] = np.array(model(test_wire.ROWS))
    return results


def resumable(strategy, directory=None, callbacks=()):
    """Trains with state of all kinds; saves and resumes in a directory."""
    with strategy.scope():
        model = resumable_run.build_model()
    tfamp.fit(
        model,
        resumable_run.make_dataset(),
        epochs=EPOCHS,
        steps_per_loop=1,
        checkpoint_dir=directory,
        callbacks=callbacks,
        on_overflow="ignore",
        verbose=0,
    )
    values = resumable_run.state_of(model)
    return {f"state{i}": value for i, value in enumerate(values)}


def parting(strategy, folder):
    """Whether each function returns after the chief is at the end of it."""

    class Late(keras.callbacks.Callback):
        """Is at the end long after the last thing that workers do together."""

        def _end(self, name):
            if _worker(strategy) == 0:
                time.sleep(1.0)
                (folder / f"chief-ended-{name}").touch()

        def on_train_end(self, logs=None):
            self._end("fit")

        def on_test_end(self, logs=None):
            self._end("evaluate")

        def on_predict_end(self, logs=None):
            self._end("predict")

    x = np.ones((BATCH, 6), "float32")
    dataset = tf.data.Dataset.from_tensors((x, np.zeros(BATCH, "int32")))
    with strategy.scope():
        model = _classifier("float32")
    ended = {}
    for function, data in (
        (tfamp.fit, dataset),
        (tfamp.evaluate, dataset),
        (tfamp.predict, x),
    ):
        function(model, data, callbacks=[Late()], verbose=0)
        name = function.__name__
        ended[name] = (folder / f"chief-ended-{name}").exists()
    return ended


def interrupted(strategy, folder, number, worker, epoch):
    """`resumable`, in which one worker gets a signal in the given epoch."""
    if worker != _worker(strategy):
        epoch = None
    return resumable(
        strategy, folder / "checkpoints", [_Interruption(number, epoch)]
    )


class _Interruption(keras.callbacks.Callback):
    """Tells of each step, and sends this process a signal in an epoch."""

    def __init__(self, number, epoch):
        super().__init__()
        self._number, self._fatal_epoch = number, epoch

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        print(f"step {self._epoch * EPOCH_STEPS + batch + 1}", flush=True)
        if self._epoch == self._fatal_epoch and batch == EPOCH_STEPS // 3:
            # Not here between two steps, but while the next ones run.
            threading.Timer(0.002, os.kill, (os.getpid(), self._number)).start()


def _classifier(precision, metrics=("accuracy",)):
    with tfamp.precision_scope(precision):
        model = keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(16, activation="gelu"),
                keras.layers.LayerNormalization(),
                keras.layers.Dense(4, dtype="float32"),
            ]
        )
        # No Adam: it hides a factor on the gradients.
        model.compile(
            tfamp.wrap_optimizer(
                keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=2.0)
            ),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=list(metrics),
            auto_scale_loss=False,
        )
    return model


def _uneven(rows=13):
    """Batches of 6 rows, and a last one of one row."""
    generator = np.random.default_rng(rows)
    x = generator.standard_normal((rows, 6)).astype("float32")
    y = generator.integers(0, 4, rows)
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(6)


def _weights(model):
    """By role and path; Keras numbers the layers of later models on."""
    return {
        f"{role}{i}": variable.numpy()
        for role, variables in {
            "weight": model.trainable_variables,
            "statistic": model.non_trainable_variables,
        }.items()
        for i, variable in enumerate(variables)
    }


def _counters(model):
    names = ("scale", "skipped", "consecutive", "iterations")
    return dict(zip(names, overflows.counters(model.optimizer), strict=True))


def _logs(history):
    return {
        f"history_{name}": np.array(values)
        for name, values in history.history.items()
        if name not in _SPEEDS
    }


def _snapshot(model):
    """Weights, moments, averages and counters."""
    (values,) = zip(*overflows.snapshot(model).values(), strict=True)
    return _counters(model) | {f"state{i}": v for i, v in enumerate(values)}


def _worker(strategy):
    return strategy.cluster_resolver.task_id


def main(folder, *scenarios):
    """Runs scenarios; one may have arguments: `NAME:JSON OBJECT`."""
    folder = pathlib.Path(folder)
    strategy = tfamp.get_strategy("multi_worker")
    tf.config.experimental.enable_op_determinism()
    for scenario in scenarios:
        begin = time.monotonic()
        name, _, arguments = scenario.partition(":")
        # As the fixture of the tests does.
        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy("float32")
        match name:
            case "interrupted":
                results = interrupted(strategy, folder, **json.loads(arguments))
            case "files":
                results = files(strategy, folder)
            case "parting":
                results = parting(strategy, folder)
            case _:
                results = SCENARIOS[name](strategy)
        np.savez(folder / f"{name}-{_worker(strategy)}.npz", **results)
        print(f"{name} took {time.monotonic() - begin:.1f} s", flush=True)


SCENARIOS = {
    "small": small,
    "recipe": recipe,
    "overflow": overflow,
    "blame": blame,
    "stop": stop,
    "evaluation": evaluation,
    "prediction": prediction,
    "matrix": matrix,
    "shards": shards,
    "wire": wire,
    "reduction": reduction,
    "low_rank": low_rank,
    "sharded": sharded,
    "resumable": resumable,
}

if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (Exception, SystemExit) as error:
        described = tfamp.recipe.describe_exit(error)
        if described is None:
            raise
        print(f"tfamp: {described[0]}", file=sys.stderr, flush=True)
        sys.exit(described[1])
