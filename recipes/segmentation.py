"""Trains a U-Net to label every pixel, with Dice and cross-entropy.

    python -m recipes.segmentation --precision=mixed_bfloat16

The default needs no download: 2,048 scenes an epoch, composed anew from the
handwritten digits of scikit-learn, 48 pixels a side, and 256 fixed ones of
digits that were never seen. On 4 cores of a CPU with AVX512-BF16 (TensorFlow
2.21.0, Keras 3.15.1), shared with two other trainings, start-up included, seed
0:

    precision        seconds   mean IoU   pixel accuracy
    float32          130       0.674      0.950
    mixed_bfloat16   82        0.677      0.951
    mixed_float16    493       0.681      0.952

All background has a mean IoU of 0.073. float16 has no fast path on CPUs.

With --output_dir it leaves masks.png: images, their labels, what was found.
Photographs: --dataset=oxford_iiit_pet --image_size=128 --widths=32,64,128,256
(not measured here).
"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tfamp
from recipes import pictures
from recipes.data import images, masks
from recipes.data.glyphs import read_glyphs
from recipes.data.scenes import compose
from recipes.rates import warm_cosine
from tfamp.recipe import flag

# Scenes that one epoch composes, and those that every evaluation sees.
_TRAIN_SCENES, _EVAL_SCENES = 2048, 256
_DIGITS_IN_A_SCENE = 6

_SHOWN_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class Config(tfamp.recipe.RunConfig):
    """The flags of this recipe."""

    dataset: str = flag(
        "scenes",
        "scenes, or a TensorFlow Datasets name such as oxford_iiit_pet",
    )
    num_classes: int = flag(
        0, "labels in the masks of a data set that is not known", minimum=0
    )
    eval_split: str = flag("auto", "split to evaluate on; validation or test")
    image_size: int = flag(48, "pixels a side", minimum=8)
    widths: tuple[int, ...] = flag(
        (16, 32, 64), "channels of each level, the finest first"
    )
    batch_size: int = flag(32, "images in a step, over all devices", minimum=1)
    epochs: int = flag(12, "passes over the training data", minimum=1)
    learning_rate: float = flag(5e-3, "of AdamW, at its peak", minimum=0)
    warmup_epochs: float = flag(1.0, "epochs of linear warm-up", minimum=0)
    weight_decay: float = flag(1e-2, "of kernels, decoupled", minimum=0)
    dice_in_float32: bool = flag(
        True, "false sums the Dice loss in the compute dtype, to see it fail"
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.widths or min(self.widths) < 1:
            raise tfamp.InputError(
                f"widths={self.widths}; expected channels of each level, such "
                "as 16,32,64."
            )
        coarsest = 2 ** (len(self.widths) - 1)
        if self.image_size % coarsest:
            raise tfamp.InputError(
                f"image_size={self.image_size} with {len(self.widths)} levels"
                f"; expected a multiple of {coarsest}."
            )


@keras.saving.register_keras_serializable(package="tfamp_recipes")
class CrossEntropyDice(keras.losses.Loss):
    """Cross-entropy of pixels plus the Dice loss of classes.

    Dice sums over all pixels of the batch (on each replica, of each
    microbatch), since most images lack most classes. Such sums pass 65504,
    the largest float16, from 64 images of 32x32 pixels on. In float16 they
    are inf there, and the loss NaN; or they stop at 2048, where adding 1
    changes nothing (TensorFlow on CPUs), and the loss is a silent 0 divided
    by a number of pixels that is inf. `dtype` is float32 unless it is set.

    Args:
        dtype: in which the loss is computed.
        name: of the loss.
        reduction: as of every Keras loss.
    """

    def __init__(
        self,
        dtype=None,
        name="cross_entropy_dice",
        reduction="sum_over_batch_size",
    ):
        super().__init__(name=name, reduction=reduction, dtype=dtype)

    def call(self, y_true, y_pred):
        """Labels [B, H, W] and logits [B, H, W, C] to losses [B, H, W]."""
        cross_entropy = keras.losses.sparse_categorical_crossentropy(
            y_true, y_pred, from_logits=True
        )
        one_hot = keras.ops.one_hot(
            keras.ops.cast(y_true, "int32"), y_pred.shape[-1], dtype=self.dtype
        )
        dice = keras.losses.dice(
            one_hot, keras.ops.softmax(y_pred), axis=(0, 1, 2)
        )
        return cross_entropy + keras.ops.mean(dice)

    def get_config(self):
        return {**super().get_config(), "dtype": self.dtype}


def make_datasets(config: Config) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """Batches of (images in the compute dtype, labels [B, H, W] int32)."""
    make = _scenes if config.dataset == "scenes" else _photographs
    return tuple(
        batches.map(_to_model, tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
        for batches in make(config)
    )


def build_model(config: Config) -> keras.Model:
    """The compiled U-Net, with logits [B, H, W, C] as its output."""
    channels, num_classes, num_images = _shapes(config)
    inputs = keras.Input([config.image_size, config.image_size, channels])
    model = keras.Model(inputs, unet(inputs, config.widths, num_classes))
    tfamp.keep_float32(model)
    tfamp.optimize(model)

    steps_per_epoch = max(num_images // config.batch_size, 1)
    optimizer = keras.optimizers.AdamW(
        warm_cosine(
            config.learning_rate,
            config.epochs * steps_per_epoch,
            round(config.warmup_epochs * steps_per_epoch),
        ),
        weight_decay=config.weight_decay,
    )
    optimizer.exclude_from_weight_decay(
        [v for v in model.trainable_variables if len(v.shape) < 2]
    )
    compute_dtype = keras.config.dtype_policy().compute_dtype
    model.compile(
        optimizer=tfamp.wrap_optimizer(optimizer, shard=config.shard == "on"),
        loss=CrossEntropyDice(
            dtype=None if config.dice_in_float32 else compute_dtype
        ),
        metrics=[
            keras.metrics.MeanIoU(
                num_classes, name="mean_iou", sparse_y_pred=False
            ),
            keras.metrics.SparseCategoricalAccuracy(name="pixel_accuracy"),
        ],
        auto_scale_loss=False,
    )
    return model


def train(config: Config) -> dict[str, float]:
    """Trains; returns the metrics, and writes `masks.png` to output_dir."""
    strategy = tfamp.recipe.start(config)
    train_batches, eval_batches = make_datasets(config)
    with strategy.scope():
        model = build_model(config)
    tfamp.recipe.print_float32_layers(model)
    print(f"  all background: mean_iou {_background_iou(eval_batches):.4f}")
    tfamp.recipe.fit(model, train_batches, eval_batches, config)
    if config.output_dir:
        _write_masks(model, eval_batches, f"{config.output_dir}/masks.png")
    return tfamp.recipe.final_metrics(model, eval_batches)


def unet(x, widths: tuple[int, ...], num_classes: int):
    """U-Net (Ronneberger et al., 2015), padded and with batch norm."""
    *finer, coarsest = widths
    skips = []
    for width in finer:
        x = _block(x, width)
        skips.append(x)
        x = layers.MaxPooling2D(2)(x)
    x = _block(x, coarsest)
    for width, skip in zip(reversed(finer), reversed(skips), strict=True):
        x = layers.Conv2DTranspose(width, 2, strides=2)(x)
        x = _block(layers.Concatenate()([skip, x]), width)
    return layers.Conv2D(num_classes, 1, name="logits")(x)


def _block(x, width):
    for _ in range(2):
        x = layers.Conv2D(
            width,
            3,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
        )(x)
        x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)
        x = layers.ReLU()(x)
    return x


def _shapes(config: Config) -> tuple[int, int, int]:
    """Channels and classes of the data, and training images in an epoch."""
    if config.dataset == "scenes":
        train, _ = read_glyphs("digits", config.data_dir)
        return 1, 1 + train.num_classes, _TRAIN_SCENES
    data = _masks(config)
    return data.channels, data.num_classes, data.num_examples(data.train_split)


def _scenes(config: Config) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """New scenes in each epoch, and the same ones at each evaluation."""
    train, evaluation = read_glyphs("digits", config.data_dir)

    size, batch_size = config.image_size, config.batch_size

    def scenes(_, seed):
        return compose(train, size, _DIGITS_IN_A_SCENE, batch_size, seed)

    numbers = tf.data.Dataset.range(_TRAIN_SCENES // batch_size)
    train_scenes = images.with_seeds(numbers, config.seed).map(
        scenes, tf.data.AUTOTUNE, deterministic=True
    )
    # The same for every seed: results of several seeds compare.
    eval_scenes = tf.data.Dataset.from_tensor_slices(
        compose(evaluation, size, _DIGITS_IN_A_SCENE, _EVAL_SCENES, [0, 0])
    )
    return train_scenes, eval_scenes.batch(batch_size)


def _photographs(config: Config) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    data = _masks(config)
    train = data.read(data.train_split, config.image_size, config.seed)
    train = train.shuffle(1024, config.seed)
    train = images.with_seeds(train, config.seed).map(
        _mirror, tf.data.AUTOTUNE, deterministic=True
    )
    evaluation = data.read(data.eval_split, config.image_size)
    return (
        train.batch(config.batch_size, drop_remainder=True),
        evaluation.batch(config.batch_size),
    )


def _masks(config: Config) -> masks.Masks:
    return masks.Masks(
        config.dataset, config.data_dir, config.eval_split, config.num_classes
    )


def _mirror(example, seed):
    image, labels = example
    mirrored = tf.random.stateless_uniform([], seed) < 0.5
    return tf.cond(
        mirrored,
        lambda: (image[:, ::-1], labels[:, ::-1]),
        lambda: (image, labels),
    )


def _to_model(image_batch, labels):
    # 16 bits hold 256 gray levels, and halve what is sent to the device.
    dtype = keras.config.dtype_policy().compute_dtype
    return tf.cast(2.0 * image_batch - 1.0, dtype), labels


def _background_iou(batches: tf.data.Dataset) -> float:
    """The mean IoU of calling every pixel 0: what learns nothing scores."""
    labels = np.concatenate([y.numpy().ravel() for _, y in batches])
    classes = np.unique(labels)
    return float(np.mean(labels == 0) / len(classes))


def _write_masks(model, batches, path):
    """Rows of an image, its labels, and the labels that were found."""
    image_batch, labels = next(iter(batches.unbatch().batch(_SHOWN_IMAGES)))
    found = np.argmax(model(image_batch, training=False), axis=-1)
    shown = pictures.to_uint8(tf.cast(image_batch, tf.float32), -1, 1)
    if shown.shape[-1] == 1:
        shown = shown.repeat(3, axis=-1)
    sheet = np.concatenate(
        [shown, pictures.label_colors(labels), pictures.label_colors(found)]
    )
    picture = pictures.grid(sheet, columns=len(shown))
    pictures.write_png(path, picture, enlarge=2)


if __name__ == "__main__":
    tfamp.recipe.main(train, Config)
