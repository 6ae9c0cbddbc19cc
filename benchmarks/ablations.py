"""The ablations of Micikevicius et al. 2018 on the embedded digits.

    python -m benchmarks.ablations

"Mixed Precision Training" names three things that keep float16 training as
good as float32: float32 master weights (its section 3.1), loss scaling (3.2),
and float32 sums in matrix products (3.3). Here each is taken away, over
several seeds, from two networks of three and four dense layers: one that reads
digits, and one whose second head has gradients too small for float16. The
results go to a Markdown table, beside what the paper found.

Without master weights: after each step the weights are rounded to float16; the
optimizer computes in float32, so that nothing else changes. With float16 sums:
each product is added to a float16 sum, rounded once as in a fused
multiply-add, in the forward and both backward products of each layer.
Convolutions and recurrent layers are left out: these sums take too long on a
CPU.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras import layers

import tfamp
from benchmarks import ablation_table
from recipes.failures import task, two_heads
from tfamp.analysis.page import environment
from tfamp.files import output
from tfamp.recipe import flag
from tfamp.recipe.flags import check_ranges


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    seeds: int = flag(5, "trainings of each kind", minimum=2)
    epochs: int = flag(20, "passes over the training data", minimum=1)
    quick: bool = flag(False, "2 seeds of 3 epochs, to see that it runs")
    data_dir: str = flag("", "folder of prepared data sets; default of tfds")
    output_dir: str = flag("benchmarks/results", "folder for ablations.md")

    def __post_init__(self):
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        name: as the table has it.
        precision: of tfamp.
        scale: the fixed loss scale; None for dynamic scaling.
        master_weights: whether weights are float32 between steps.
        float16_sums: whether matrix products add up in float16.
    """

    name: str
    precision: str = "mixed_float16"
    scale: float | None = None
    master_weights: bool = True
    float16_sums: bool = False


ARMS = (
    Arm("float32", precision="float32", scale=1.0),
    Arm("mixed precision"),
    Arm("with loss scale 128", scale=128.0),
    Arm("with loss scale 8", scale=8.0),
    Arm("without loss scaling", scale=1.0),
    Arm("without float32 master weights", master_weights=False),
    Arm("with float16 sums", float16_sums=True),
)


@keras.saving.register_keras_serializable(package="ablations")
class RoundToFloat16(keras.constraints.Constraint):
    """Leaves of a weight what float16 holds; applied after each update."""

    def __call__(self, w):
        return tf.cast(tf.cast(w, tf.float16), w.dtype)


class DenseWithFloat16Sums(layers.Dense):
    """A dense layer on `matmul_with_float16_sums`."""

    def call(self, inputs, training=None):
        x = matmul_with_float16_sums(inputs, self.kernel)
        return self.activation(x + tf.cast(self.bias, x.dtype))


@tf.custom_gradient
def matmul_with_float16_sums(a: tf.Tensor, b: tf.Tensor):
    """`a @ b` with each partial sum rounded to float16, and so its gradients.

    Args:
        a: float16, [M, K].
        b: float16, [K, N].

    Returns:
        float16, [M, N], and the function that computes both gradients.
    """

    def gradients(upstream):
        return (
            _float16_sums(upstream, tf.transpose(b)),
            _float16_sums(tf.transpose(a), upstream),
        )

    return _float16_sums(a, b), gradients


def main(config: Config) -> dict[str, float]:
    """Trains every arm on both tasks and every seed, and writes the table.

    Args:
        config: the flags.

    Returns:
        What the table says of float32 and of mixed precision.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = output.output_folder(config.output_dir)
    output.make_folder(folder)
    if config.quick:
        config = dataclasses.replace(config, seeds=2, epochs=3)
    begin = time.monotonic()
    rows = [(arm.name, _measure(arm, config)) for arm in ARMS]
    text = ablation_table.to_markdown(
        rows,
        seeds=config.seeds,
        epochs=config.epochs,
        minutes=(time.monotonic() - begin) / 60,
        environment=environment.rows(
            {"environment": environment.describe(_command(config))}
        ),
    )
    output.write_atomically(folder / "ablations.md", text)
    print(text)
    means = [
        {name: statistics.mean(values) for name, values in figures.items()}
        for _, figures in rows[:2]
    ]
    return {f"float32_{name}": value for name, value in means[0].items()} | {
        f"mixed_{name}": value for name, value in means[1].items()
    }


def train(
    arm: Arm, task_name: str, epochs: int, seed: int, data_dir: str = ""
) -> dict[str, float]:
    """Trains once.

    Args:
        arm: how.
        task_name: "digits" or "two_heads".
        epochs: passes over the data.
        seed: of weights and order.
        data_dir: of tfds.

    Returns:
        Test metrics: `accuracy` in percent, and `image_loss` of "two_heads".
    """
    is_two_heads = task_name == "two_heads"
    to_example = two_heads.two_targets if is_two_heads else task.flat_pixels
    train_batches, eval_batches = task.make_batches(
        to_example, "digits", data_dir, batch_size=64, seed=seed
    )
    keras.utils.set_random_seed(seed)
    with tfamp.precision_scope(arm.precision):
        build = _two_heads if is_two_heads else _classifier
        model = build(_dense(arm), functools.partial(_optimizer, arm))
        tfamp.fit(model, train_batches, epochs=epochs, verbose=0)
        results = tfamp.evaluate(model, eval_batches)
    if not is_two_heads:
        return {"accuracy": 100 * results["accuracy"]}
    return {
        "two_heads_accuracy": 100 * results["digit_accuracy"],
        "image_loss": results["image_loss"],
    }


def _command(config: Config) -> list[str]:
    # Where the data and the table lie says nothing to another reader.
    return [
        "python",
        "-m",
        "benchmarks.ablations",
        f"--seeds={config.seeds}",
        f"--epochs={config.epochs}",
    ]


def _measure(arm: Arm, config: Config) -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {}
    for task_name in ("digits", "two_heads"):
        for seed in range(config.seeds):
            found = train(arm, task_name, config.epochs, seed, config.data_dir)
            for name, value in found.items():
                figures.setdefault(name, []).append(value)
            shown = "  ".join(f"{k} {v:.4g}" for k, v in found.items())
            print(f"{arm.name}, {task_name}, seed {seed}: {shown}", flush=True)
    return figures


def _dense(arm: Arm) -> Callable[..., layers.Dense]:
    dense = DenseWithFloat16Sums if arm.float16_sums else layers.Dense
    if arm.master_weights:
        return dense
    return functools.partial(
        dense,
        kernel_constraint=RoundToFloat16(),
        bias_constraint=RoundToFloat16(),
    )


def _optimizer(arm: Arm, optimizer: keras.optimizers.Optimizer) -> Any:
    if arm.scale is None:
        return tfamp.wrap_optimizer(optimizer)
    return tfamp.wrap_optimizer(
        optimizer, dynamic=False, initial_scale=arm.scale
    )


def _classifier(dense, wrap) -> keras.Model:
    pixels = keras.Input([64])
    x = dense(64, "relu")(pixels)
    x = dense(64, "relu")(x)
    model = keras.Model(pixels, dense(task.NUM_CLASSES)(x))
    tfamp.keep_float32(model)
    model.compile(
        optimizer=wrap(keras.optimizers.SGD(0.01, momentum=0.9)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        auto_scale_loss=False,
    )
    return model


def _two_heads(dense, wrap) -> keras.Model:
    model = two_heads.two_heads(dense=dense)
    tfamp.keep_float32(model)
    two_heads.compile_two_heads(model, wrap(keras.optimizers.Adam(3e-3)))
    return model


def _float16_sums(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    # The product of two float16 values is exact in float32.
    columns = tf.cast(tf.transpose(a), tf.float32)
    rows = tf.cast(b, tf.float32)

    def add(k, total):
        product = columns[k][:, tf.newaxis] * rows[k]
        total = tf.cast(tf.cast(total, tf.float32) + product, tf.float16)
        return k + 1, total

    _, total = tf.while_loop(
        lambda k, total: k < tf.shape(rows)[0],
        add,
        (0, tf.zeros([tf.shape(a)[0], tf.shape(b)[1]], tf.float16)),
        shape_invariants=(
            tf.TensorShape([]),
            tf.TensorShape([a.shape[0], b.shape[1]]),
        ),
    )
    return total


if __name__ == "__main__":
    tfamp.recipe.main(main, Config)
