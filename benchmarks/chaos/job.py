"""A small training run of random parts, as a process that can be disturbed."""

import dataclasses
import faulthandler
import json
import os
import pathlib
import random
import signal
import sys
from multiprocessing.connection import Connection

import keras
import numpy as np
import tensorflow as tf

import tfamp
import tfamp.training.run
from tfamp.checkpoint.place import full_disks_told
from tfamp.distribute.cluster import multi_worker_strategy, resolve_cluster
from tfamp.recipe import describe_exit

BEST = "best.keras"
ROWS, BATCH, EPOCHS = 60, 12, 5


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run is made of."""

    processes: int
    precision: str
    dropout: bool
    batch_norm: bool
    averages: bool
    schedule: bool
    early_stopping: bool
    plateau: bool
    best: bool
    swap: bool
    shuffle: bool
    microbatches: int
    steps_per_loop: int

    def parts(self) -> str:
        """The names of what is in it."""
        values = dataclasses.asdict(self)
        names = [name for name, value in values.items() if value is True]
        names += [self.precision] * (self.precision != "float32")
        names += [f"microbatches={self.microbatches}"] * (self.microbatches > 1)
        names.append(f"steps_per_loop={self.steps_per_loop}")
        return " ".join(names)


def draw(generator: random.Random, processes: int) -> Job:
    """A job of random parts."""

    def coin() -> bool:
        return generator.random() < 0.5

    averages = coin()
    schedule = coin()
    return Job(
        processes=processes,
        precision=generator.choice(["float32", "mixed_float16"]),
        dropout=coin(),
        batch_norm=coin(),
        averages=averages,
        schedule=schedule,
        early_stopping=coin(),
        # It sets a rate, which a schedule does not let it.
        plateau=coin() and not schedule,
        best=coin(),
        swap=averages and coin(),
        shuffle=coin(),
        microbatches=generator.choice([1, 2]),
        steps_per_loop=generator.choice([1, 3]),
    )


def begun(worker: int) -> str:
    """The name of the file that tells that a start has come to fit."""
    return f"begun-{worker}"


def program(
    job: Job,
    folder: pathlib.Path,
    saves: bool,
    worker: int,
    addresses: list[str],
    errors: Connection,
) -> None:
    """Trains, and leaves the final values in `folder`; never returns.

    Args:
        errors: takes what it prints, also where no file can grow.
    """
    (folder / begun(worker)).unlink(missing_ok=True)
    os.dup2(errors.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, file=2)
    if addresses:
        os.environ["TF_CONFIG"] = json.dumps(
            {
                "cluster": {"worker": addresses},
                "task": {"type": "worker", "index": worker},
            }
        )
    status = 0
    try:
        _train(job, folder, saves, worker)
    except BaseException as error:
        line, status = describe_exit(error) or ("", 1)
        if line:
            print(f"tfamp: {line}", file=sys.stderr, flush=True)
        else:
            sys.excepthook(*sys.exc_info())
    # Threads of a cluster that has lost a worker may wait for ever.
    os._exit(status)


def _train(job: Job, folder: pathlib.Path, saves: bool, worker: int) -> None:
    tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(3)
    # As often as a run reports: a kill then finds all kinds of moments.
    tfamp.training.run.SECONDS_BETWEEN_SAVES = 0
    tfamp.set_precision(job.precision)
    if job.processes > 1:
        # Not for an hour: one that was killed at the start does not come.
        strategy = multi_worker_strategy(
            resolve_cluster(), start_timeout_seconds=90.0
        )
    else:
        strategy = tfamp.get_strategy("one_device")
    generator = np.random.default_rng(0)
    x = generator.normal(size=(ROWS, 8)).astype("float32")
    y = x[:, :3].argmax(axis=1)
    # Beyond float16 at times, so that steps are skipped.
    x[7] *= 1e4
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    validation = dataset.batch(BATCH, drop_remainder=True)
    if job.shuffle:
        dataset = dataset.shuffle(ROWS, seed=5)
    with strategy.scope():
        model = _build(job)
    (folder / begun(worker)).touch()
    tfamp.fit(
        model,
        dataset.batch(BATCH, drop_remainder=True),
        epochs=EPOCHS,
        validation_data=validation,
        callbacks=_callbacks(job, folder),
        microbatches=job.microbatches,
        steps_per_loop=job.steps_per_loop,
        checkpoint_dir=folder / "checkpoints" if saves else None,
        verbose=0,
    )
    if worker == 0:
        values = [*model.weights, *model.optimizer.variables]
        part = folder / "part.npz"
        with full_disks_told():
            np.savez(part, *[value.numpy() for value in values])
        part.rename(folder / "final.npz")


def _build(job: Job) -> keras.Model:
    layers = [keras.Input((8,)), keras.layers.Dense(8)]
    if job.batch_norm:
        layers.append(keras.layers.BatchNormalization())
    if job.dropout:
        layers.append(keras.layers.Dropout(0.3))
    model = keras.Sequential([*layers, keras.layers.Dense(3)])
    rate = 0.02
    if job.schedule:
        rate = keras.optimizers.schedules.CosineDecay(rate, 25)
    model.compile(
        tfamp.wrap_optimizer(
            keras.optimizers.AdamW(
                rate, use_ema=job.averages, ema_momentum=0.9
            ),
            dynamic_growth_steps=5,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        auto_scale_loss=False,
    )
    return model


def _callbacks(
    job: Job, folder: pathlib.Path
) -> list[keras.callbacks.Callback]:
    found = []
    if job.swap:
        found.append(keras.callbacks.SwapEMAWeights(swap_on_epoch=True))
    if job.plateau:
        found.append(
            keras.callbacks.ReduceLROnPlateau(
                monitor="loss", patience=2, factor=0.5, min_delta=10.0
            )
        )
    if job.early_stopping:
        found.append(
            keras.callbacks.EarlyStopping(
                patience=3, min_delta=0.5, restore_best_weights=True
            )
        )
    if job.best:
        found.append(
            keras.callbacks.ModelCheckpoint(
                # HDF5 ends the process where a file of its own cannot grow.
                str(folder / BEST),
                save_best_only=True,
            )
        )
    return found
