"""Two workers of which the second differs, or is lost: how both end."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tfamp.distribute import cluster
from tfamp.distribute.launch import reserve_ports
from tfamp.distribute.workers import WORKER_LOST_SECONDS
from tfamp.recipe import describe_exit

JOIN_SECONDS = 15
# Beyond what workers promise, for a machine that is busy.
SECONDS = JOIN_SECONDS + WORKER_LOST_SECONDS + 120

# It imports TensorFlow once; each process is a fork of it.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.distribute.test_differing"])


class Odd(keras.callbacks.Callback):
    """What goes wrong while the two train."""

    def __init__(self, kind):
        super().__init__()
        self._kind = kind

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1 and self._kind == "rate in the second epoch":
            self.model.optimizer.learning_rate = 0.5
        if epoch == 1 and self._kind == "error":
            raise RuntimeError("a bug of the user's")

    def on_test_begin(self, logs=None):
        if self._kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)


def kill_soon_after_all_have_come():
    """While TensorFlow starts, which holds the interpreter meanwhile."""
    wait = cluster.wait_for_workers

    def waited(*arguments):
        wait(*arguments)
        if os.fork() == 0:
            time.sleep(1.0)
            os.kill(os.getppid(), signal.SIGKILL)
            os._exit(0)

    cluster.wait_for_workers = waited


def train(kind):
    """Trains as the first worker does, but for what `kind` says."""
    if kind == "kill at the start":
        kill_soon_after_all_have_come()
    strategy = tfamp.get_strategy("multi_worker")
    if kind == "end before the model":
        sys.exit(3)
    keras.utils.set_random_seed(3)
    tfamp.set_precision("mixed_float16" if kind == "precision" else "float32")
    x = np.arange(64, dtype="float32").reshape(16, 4) / 64
    y = x[:, :1] + (100 if kind == "data" else 0)
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    if kind == "order":
        dataset = dataset.shuffle(16, seed=7)
    with strategy.scope():
        units = 5 if kind == "model" else 4
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(units),
                keras.layers.Dense(1),
            ]
        )
        optimizer = keras.optimizers.SGD(0.1 if kind == "rate" else 0.01)
        loss = "mae" if kind == "loss" else "mse"
        model.compile(
            tfamp.wrap_optimizer(optimizer), loss, auto_scale_loss=False
        )
    if kind == "weights":
        kernel = model.layers[0].kernel
        kernel.assign(kernel + 1.0)
    batches = dataset.batch(4 if kind == "batch size" else 8, True)
    tfamp.fit(
        model,
        batches,
        epochs=4 if kind == "epochs" else 3,
        validation_data=batches,
        callbacks=[Odd(kind)],
        verbose=0,
    )


def program(kind, worker, addresses, errors):
    """A worker, with its messages in the file `errors`."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    os.environ["TF_CONFIG"] = json.dumps(
        {
            "cluster": {"worker": addresses},
            "task": {"type": "worker", "index": worker},
        }
    )
    cluster.JOIN_SECONDS = JOIN_SECONDS
    try:
        train(kind if worker == 1 else "")
    except Exception as error:
        described = describe_exit(error)
        if described is None:
            raise
        print(f"tfamp: {described[0]}", file=sys.stderr, flush=True)
        sys.exit(described[1])


def ends(kind, folder):
    """The status of each worker, and what it said."""
    reserved = reserve_ports(2)
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in reserved]
    started = []
    for worker in (0, 1):
        errors = folder / f"errors-{worker}.txt"
        arguments = (kind, worker, addresses, errors)
        started.append(processes.Process(target=program, args=arguments))
        started[-1].start()
    for process in started:
        process.join(SECONDS)
        process.kill()
        process.join()
    for each in reserved:
        each.close()
    lines = [
        [
            line
            for line in (folder / f"errors-{worker}.txt")
            .read_text(errors="replace")
            .splitlines()
            if line.startswith("tfamp: ")
        ]
        for worker in (0, 1)
    ]
    return [process.exitcode for process in started], lines


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("precision", "precision is mixed_float16 on worker 1 and float32 on"),
        ("batch size", "batches is .* on worker 1 and .* on the others"),
        ("rate", "learning_rate is 0.1.* on worker 1 and 0.0"),
        ("loss", "loss is mae on worker 1 and mse on the others"),
        ("model", "model of worker 1 is not that of worker 0"),
        ("weights", "weights to begin with of worker 1 is not"),
        ("data", "first batch of this epoch of worker 1 is not"),
        ("order", "first batch of this epoch of worker 1 is not"),
        ("epochs", "epochs is 4 on worker 1 and 3 on the others"),
        ("rate in the second epoch", "learning_rate is 0.5 on worker 1 and"),
    ],
)
def test_what_differs_is_told_in_one_line_on_each(kind, told, tmp_path):
    statuses, lines = ends(kind, tmp_path)
    assert statuses == [2, 2], lines
    assert lines[0] == lines[1]
    assert len(lines[0]) == 1
    assert re.search(f"The workers differ: .*{told}", lines[0][0])


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("kill", -signal.SIGKILL),
        ("kill at the start", -signal.SIGKILL),
        ("end before the model", 3),
        ("error", 1),
    ],
)
def test_a_survivor_ends_by_itself_and_names_the_lost_one(
    kind, status, tmp_path
):
    statuses, lines = ends(kind, tmp_path)
    own, lost = statuses
    assert lost == status
    # While it joins, TensorFlow itself may not return.
    held = [-signal.SIGKILL] if kind == "kill at the start" else []
    assert own in [75, *held], lines
    ((line,), _) = lines
    if kind == "kill at the start":
        # TensorFlow does not always say whom it missed.
        assert re.search("had joined|stopped answering", line)
    else:
        assert line.startswith("tfamp: worker 1 stopped answering")
