"""Training in Keras: by its own `fit`, and by tfamp's."""

import keras
import tensorflow as tf

import tfamp
from benchmarks.compare import keras_networks
from benchmarks.compare.cases import Case, make_batches
from benchmarks.compare.contestants import Contestant
from benchmarks.compare.memory import ResidentMemory, TensorFlowGpuMemory
from benchmarks.compare.turns import Gauge, Turns
from tfamp.analysis.bench.feed import in_memory


class KerasStep(keras.Model):
    """A model whose step is Keras's own, for `tfamp.fit` to leave alone.

    It puts an optimizer into a `LossScaleOptimizer` unless the model
    overrides `train_step`.
    """

    def train_step(self, data):
        return super().train_step(data)


def prepare(device: str, threads: int) -> Gauge:
    """Settles what cannot be changed later, and computes a little.

    Args:
        device: "cpu" or "gpu".
        threads: that one operation may use.

    Returns:
        What tells the memory of the device.
    """
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    gpus = tf.config.list_physical_devices("GPU")
    if device == "cpu":
        tf.config.set_visible_devices([], "GPU")
    else:
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
    # What is loaded at the first operation is no part of a training's memory.
    image = tf.ones([1, 8, 8, 8])
    tf.nn.conv2d(image, tf.ones([3, 3, 8, 8]), 1, "SAME").numpy()
    return ResidentMemory() if device == "cpu" else TensorFlowGpuMemory()


def train(
    contestant: Contestant,
    case: Case,
    precision: str,
    epochs: int,
    turns: Turns,
) -> None:
    """Trains as the contestant does, all epochs."""
    tfamp.set_precision(precision)
    model = keras_networks.build(case.network)
    with tf.device("CPU:0"):
        batches = in_memory(
            [(tf.constant(x), tf.constant(y)) for x, y in make_batches(case)]
        )
    fit = _fit_tfamp if contestant.framework == "tfamp" else _fit_keras
    fit(contestant, case, model, batches, epochs, _Epochs(turns))


def _fit_keras(contestant, case, model, batches, epochs, callback):
    keras_networks.leave_to_keras(model)
    model.compile(
        optimizer=keras_networks.make_optimizer(case),
        loss=keras_networks.make_loss(),
        jit_compile=contestant.compiled,
        steps_per_execution=case.steps if contestant.whole_epochs else 1,
    )
    model.fit(
        batches,
        epochs=epochs,
        steps_per_epoch=case.steps,
        callbacks=[callback],
        shuffle=False,
        verbose=0,
    )


def _fit_tfamp(contestant, case, model, batches, epochs, callback):
    optimizer = keras_networks.make_optimizer(case)
    if contestant.bare_optimizer:
        model = KerasStep(model.input, model.output)
    else:
        optimizer = tfamp.wrap_optimizer(optimizer)
    tfamp.keep_float32(model)
    # What else tfamp does to a model goes here, by a field of the contestant.
    if contestant.optimized:
        tfamp.optimize(model)
    model.compile(
        optimizer=optimizer,
        loss=keras_networks.make_loss(),
        auto_scale_loss=False,
    )
    tfamp.fit(
        model,
        batches,
        epochs=epochs,
        steps_per_epoch=case.steps,
        callbacks=[callback],
        jit=False if contestant.plain else contestant.compiled or "auto",
        verbose=0,
    )


class _Epochs(keras.callbacks.Callback):
    """Tells `Turns` of epochs; of batches it hears nothing, as `fit` likes."""

    def __init__(self, turns: Turns):
        super().__init__()
        self._turns = turns

    def on_epoch_begin(self, epoch, logs=None):
        self._turns.begin_epoch()

    def on_epoch_end(self, epoch, logs=None):
        self._turns.end_epoch(float(logs["loss"]))
