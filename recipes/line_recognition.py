"""Trains a network to read lines of handwriting, with the CTC loss.

    python -m recipes.line_recognition --precision=mixed_bfloat16

The default needs no download: 468,011 weights learn to read lines of 1 to 12
of scikit-learn's handwritten digits, 16 pixels high and 192 wide, composed
anew in each epoch, and are tested on 512 lines of digits they never saw. On
4 cores of a CPU with AVX512-BF16 (TensorFlow 2.21.0, Keras 3.15.1), shared
with two other trainings, start-up included, seed 0:

    precision        seconds (of a core)   character errors   exact lines
    float32          131 (92)              0.026              0.854
    mixed_bfloat16   126 (81)              0.027              0.844
    mixed_float16    244 (291)             0.025              0.856

One line is 0.002; float16 has no fast path on CPUs.
Reading nothing makes 1.000 errors per character; the best text that is the
same for every line, 0.917.

A line with fewer frames than CTC needs for its text teaches nothing and is
counted in lines_left_out; what is read of it counts in the other metrics.
The default has none: 48 frames for at most 12 + 11.

With --output_dir it leaves 16 lines in lines.png, and in lines.txt the true
text of each and what was read, with a tab between. More hands, and letters:
--dataset=mnist or --dataset=emnist/balanced (not measured here).
"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tfamp
from recipes import ctc, pictures, transformer
from recipes.data import images
from recipes.data.glyphs import read_glyphs
from recipes.data.lines import LineShape, compose, fit_glyphs
from recipes.rates import warm_cosine
from tfamp.distribute.consensus import is_chief
from tfamp.files.output import output_folder, write_atomically
from tfamp.recipe import flag

# Lines that one epoch composes, and those that every evaluation sees.
_TRAIN_LINES, _EVAL_LINES = 4096, 512

# Pixels of a line, each way, that become one frame.
_STRIDE = 4

_SHOWN_LINES = 16
_PRINTED_LINES = 4


@dataclasses.dataclass(frozen=True)
class Config(tfamp.recipe.RunConfig):
    """The flags of this recipe."""

    dataset: str = flag(
        "digits",
        "characters to write with: digits, or a TensorFlow Datasets name such "
        "as mnist or emnist/balanced",
    )
    line_height: int = flag(16, "pixels; a multiple of 4", minimum=8)
    line_width: int = flag(192, "pixels; a multiple of 4", minimum=8)
    max_characters: int = flag(12, "of the longest line", minimum=1)
    channels: tuple[int, ...] = flag(
        (32, 64, 64), "of the convolutions; the first two halve the picture"
    )
    num_layers: int = flag(2, "blocks of attention and MLP", minimum=0)
    width: int = flag(128, "features of a frame between blocks", minimum=2)
    num_heads: int = flag(4, "of attention, in each block", minimum=1)
    dropout: float = flag(0.1, "share of features", minimum=0, below=1)
    batch_size: int = flag(32, "lines in a step, over all devices", minimum=1)
    epochs: int = flag(6, "passes over as many lines", minimum=1)
    learning_rate: float = flag(2e-3, "of AdamW, at its peak", minimum=0)
    warmup_epochs: float = flag(1.0, "epochs of linear warm-up", minimum=0)
    weight_decay: float = flag(1e-2, "of kernels, decoupled", minimum=0)

    def __post_init__(self):
        super().__post_init__()
        for name in ("line_height", "line_width"):
            if getattr(self, name) % _STRIDE:
                raise tfamp.InputError(
                    f"{name}={getattr(self, name)}; expected a multiple of "
                    f"{_STRIDE}."
                )
        if len(self.channels) < 2 or min(self.channels) < 1:
            raise tfamp.InputError(
                f"channels={self.channels}; expected those of two or more "
                "convolutions, such as 32,64,64."
            )
        transformer.check_heads(self.width, self.num_heads)


def make_datasets(config: Config) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """Batches of (lines in the compute dtype, labels [B, L] int32).

    New lines in each epoch, and the same ones at each evaluation.
    """
    train, evaluation = _read_glyphs(config)
    numbers = tf.data.Dataset.range(_TRAIN_LINES)
    seeds = images.with_seeds(numbers, config.seed).map(lambda _, seed: seed)
    train_seeds = seeds.batch(config.batch_size, drop_remainder=True)
    # The same for every seed: results of several seeds compare.
    seeds = tf.data.Dataset.range(_EVAL_LINES).map(lambda i: tf.stack([i, i]))
    eval_seeds = seeds.batch(config.batch_size)
    return (
        _lines(train, train_seeds, config).prefetch(tf.data.AUTOTUNE),
        _lines(evaluation, eval_seeds, config).cache(),
    )


def build_model(config: Config) -> keras.Model:
    """The compiled reader, with float32 logits [B, T, 1 + C] as its output.

    Class 0 is CTC's blank, the others are 1 + the labels of the characters.
    """
    glyphs, _ = read_glyphs(config.dataset, config.data_dir)
    model = reader(config, glyphs.num_classes)
    tfamp.keep_float32(model)
    tfamp.optimize(model)

    steps_per_epoch = max(_TRAIN_LINES // config.batch_size, 1)
    optimizer = keras.optimizers.AdamW(
        warm_cosine(
            config.learning_rate,
            config.epochs * steps_per_epoch,
            round(config.warmup_epochs * steps_per_epoch),
        ),
        weight_decay=config.weight_decay,
        global_clipnorm=1.0,
    )
    optimizer.exclude_from_weight_decay(
        [v for v in model.trainable_variables if len(v.shape) < 2]
    )
    model.compile(
        optimizer=tfamp.wrap_optimizer(optimizer, shard=config.shard == "on"),
        loss=ctc.LineCTC(),
        metrics=[
            ctc.CharacterErrorRate(),
            keras.metrics.MeanMetricWrapper(
                ctc.exact_lines, name="exact_lines"
            ),
            ctc.LinesLeftOut(),
        ],
        auto_scale_loss=False,
    )
    return model


def reader(config: Config, num_classes: int) -> keras.Model:
    """Convolutions, then attention between the frames."""
    inputs = keras.Input([config.line_height, config.line_width, 1])
    x = inputs
    for i, channels in enumerate(config.channels):
        x = layers.Conv2D(
            channels,
            3,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
        )(x)
        x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)
        x = layers.ReLU()(x)
        if i < 2:
            x = layers.MaxPooling2D(2)(x)
    # A column of the picture becomes a frame: [B, T, features].
    x = layers.Permute([2, 1, 3])(x)
    x = layers.Reshape([config.line_width // _STRIDE, -1])(x)
    x = layers.Dense(config.width, name="frames")(x)
    for i in range(config.num_layers):
        x = transformer.block(
            x,
            f"block{i}",
            num_heads=config.num_heads,
            num_blocks=config.num_layers,
            causal=False,
            dropout=config.dropout,
        )
    x = layers.RMSNormalization(name="output_norm")(x)
    logits = layers.Dense(1 + num_classes, name="logits")(x)
    return keras.Model(inputs, logits, name="reader")


def train(config: Config) -> dict[str, float]:
    """Trains; returns the metrics, and shows lines beside what was read."""
    strategy = tfamp.recipe.start(config)
    train_batches, eval_batches = make_datasets(config)
    with strategy.scope():
        model = build_model(config)
    tfamp.recipe.print_float32_layers(model)
    labels = np.concatenate([y.numpy() for _, y in eval_batches])
    print(
        "  nothing read: character_error_rate 1.0000; one text for all lines: "
        f"{_constant_error_rate(labels):.4f}"
    )
    tfamp.recipe.fit(model, train_batches, eval_batches, config)
    metrics = tfamp.recipe.final_metrics(model, eval_batches)
    if is_chief(strategy):
        _show(model, eval_batches, config.output_dir)
    return metrics


def _read_glyphs(config):
    train, evaluation = read_glyphs(config.dataset, config.data_dir)
    if config.dataset.split("/")[0].split(":")[0] == "emnist":
        # Stored with rows and columns exchanged, as its authors left it.
        train, evaluation = (
            each._replace(pixels=each.pixels.swapaxes(1, 2))
            for each in (train, evaluation)
        )
    return (
        fit_glyphs(train, config.line_height),
        fit_glyphs(evaluation, config.line_height),
    )


def _lines(glyphs, seeds, config):
    shape = LineShape(
        config.line_height, config.line_width, config.max_characters
    )
    # 16 bits hold 256 gray levels, and halve what is sent to the device.
    dtype = keras.config.dtype_policy().compute_dtype

    def lines(seeds):
        line_batch, labels = compose(glyphs, shape, seeds)
        return tf.cast(2.0 * line_batch - 1.0, dtype), labels

    return seeds.map(lines, tf.data.AUTOTUNE, deterministic=True)


def _constant_error_rate(labels: np.ndarray) -> float:
    """The least error rate of one character, repeated, as every line's text.

    Of n such characters those match that the line has, up to n; each other
    character of the longer of the two texts is an edit.
    """
    lengths = np.count_nonzero(labels, axis=1)
    edits = [
        np.sum(np.maximum(lengths, n) - np.minimum(matches, n))
        for label in range(1, labels.max() + 1)
        for matches in [np.count_nonzero(labels == label, axis=1)]
        for n in range(labels.shape[1] + 1)
    ]
    return float(min(edits) / lengths.sum())


def _show(model, batches, output_dir):
    """Prints some lines' texts; writes more, and their pictures."""
    lines, labels = next(iter(batches.unbatch().batch(_SHOWN_LINES)))
    logits = model(lines, training=False)
    read = ctc.greedy_decode(logits).numpy()
    num_classes = logits.shape[-1] - 1
    rows = [
        f"{_text(true, num_classes)}\t{_text(found, num_classes)}"
        for true, found in zip(labels.numpy(), read, strict=True)
    ]
    print("  true text, and what was read:")
    for row in rows[:_PRINTED_LINES]:
        print("    " + row.replace("\t", "  ->  "))
    if not output_dir:
        return
    folder = output_folder(output_dir)
    sheet = pictures.to_uint8(tf.cast(lines, tf.float32), -1, 1)
    pictures.write_png(
        folder / "lines.png", pictures.grid(sheet, columns=1), enlarge=3
    )
    write_atomically(folder / "lines.txt", "\n".join(rows) + "\n")


def _text(labels, num_classes):
    """The classes as digits, or apart where one takes more than a digit."""
    separator = "" if num_classes <= 10 else " "
    return separator.join(str(label - 1) for label in labels if label)


if __name__ == "__main__":
    tfamp.recipe.main(train, Config)
