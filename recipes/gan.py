"""Trains a generator of images against a discriminator.

    python -m recipes.gan --precision=mixed_bfloat16

The default needs no download: small convolutional networks, 100 epochs of the
1,437 training digits of scikit-learn. What to judge it by, besides samples.png:

*   frechet_distance: between the means and covariances of the pixels of 360
    samples and of the 360 test digits, and of nothing else. 360 training
    digits are at 0.400; with each pixel taken from another of them, at 6.519.
*   discriminator_loss: 2 ln 2 = 1.386 and the penalty, where it cannot tell
    samples from test digits.

On one core of a CPU with AVX512-BF16 that others used too (TensorFlow 2.21.0,
Keras 3.15.1), start-up included, seed 0:

    precision        seconds (of the core)   frechet_distance   discriminator
    float32          102 (56)                0.845              1.384
    mixed_bfloat16   73 (48)                 0.904              1.380
    mixed_float16    289 (206)               0.744              1.380

float16 has no fast path on CPUs. Of one seed each, the differences say nothing
of the precisions.

Other images: --dataset=mnist --epochs=10, or --dataset=celeb_a --width=64
--epochs=20, at 64 pixels a side (not measured here).
"""

import dataclasses
import math

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tfamp
from recipes import pictures
from recipes.adversarial import GAN
from recipes.data import images, pixels
from recipes.frechet import frechet_distance, known_distances
from tfamp.distribute.consensus import is_chief
from tfamp.recipe import flag

# Networks halve the sides of an image down to this many pixels, or to odd.
_COARSEST_SIDE = 4

# Memory for samples that are made at once.
_SAMPLES_IN_A_PASS = 512
_SHOWN_SAMPLES, _SHOWN_COLUMNS = 64, 16


@dataclasses.dataclass(frozen=True)
class Config(tfamp.recipe.RunConfig):
    """The flags of this recipe."""

    dataset: str = flag(
        "digits", "digits, or a TensorFlow Datasets name such as celeb_a"
    )
    image_size: int = flag(
        0, "pixels a side; 0: as stored, and no more than 64", minimum=0
    )
    latent_size: int = flag(32, "numbers that an image is made of", minimum=1)
    width: int = flag(
        32, "channels at full size; twice as many at half of it", minimum=1
    )
    batch_size: int = flag(64, "images in a step, over all devices", minimum=1)
    epochs: int = flag(100, "passes over the training data", minimum=1)
    learning_rate: float = flag(1e-3, "of both Adams", minimum=0)
    penalty: float = flag(
        1.0, "weight of the squared gradient at real images", minimum=0
    )
    ema_momentum: float = flag(
        0.995,
        "of the generator's weights that samples are made with",
        minimum=0,
        below=1,
    )


def make_datasets(config: Config) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """Batches of (images [B, H, W, C], noise [B, L]), both float32."""
    data = _load(config)

    def with_noise(example, seed):
        image, _ = example
        return image, tf.random.stateless_normal([config.latent_size], seed)

    train = images.with_seeds(data.train_examples(config.seed), config.seed)
    # The same for every seed: results of several seeds compare.
    evaluation = data.eval_examples().enumerate()
    evaluation = evaluation.map(lambda i, example: (example, tf.stack([i, i])))
    return (
        train.map(with_noise, tf.data.AUTOTUNE, deterministic=True)
        .batch(config.batch_size, drop_remainder=True)
        .prefetch(tf.data.AUTOTUNE),
        evaluation.map(with_noise, tf.data.AUTOTUNE, deterministic=True)
        .batch(config.batch_size)
        .prefetch(tf.data.AUTOTUNE),
    )


def build_model(config: Config) -> GAN:
    """Both networks with their optimizers, compiled."""
    shape = _load(config).image_shape
    networks = (
        generator(shape, config.latent_size, config.width),
        discriminator(shape, config.width),
    )
    for network in networks:
        tfamp.keep_float32(network)

    def adam(**averaging):
        # Without momentum: each gradient is of an opponent that has moved.
        return tfamp.wrap_optimizer(
            keras.optimizers.Adam(
                config.learning_rate, beta_1=0.0, beta_2=0.99, **averaging
            ),
            shard=config.shard == "on",
        )

    model = GAN(
        *networks,
        adam(use_ema=True, ema_momentum=config.ema_momentum),
        adam(),
        config.penalty,
    )
    model.compile(optimizer=None)
    return model


def train(config: Config) -> dict[str, float]:
    """Trains; returns the metrics, and writes `samples.png` to output_dir."""
    strategy = tfamp.recipe.start(config)
    train_batches, eval_batches = make_datasets(config)
    with strategy.scope():
        model = build_model(config)
    for network in (model.generator, model.discriminator):
        tfamp.recipe.print_float32_layers(network)
    train_images, real = _load(config).compared_images()
    for name, distance in known_distances(train_images, real).items():
        print(f"  {name}: frechet_distance {distance:.3f}")
    tfamp.recipe.fit(model, train_batches, eval_batches, config)
    # From here on the generator is its average over the last steps.
    model.generator_optimizer.finalize_variable_values(
        model.generator.trainable_variables
    )
    samples = _samples(model.generator, len(real), config)
    if config.output_dir and is_chief(strategy):
        pictures.write_samples(
            f"{config.output_dir}/samples.png",
            samples[:_SHOWN_SAMPLES],
            _SHOWN_COLUMNS,
        )
    metrics = {"frechet_distance": frechet_distance(samples, real)}
    metrics |= tfamp.evaluate(model, eval_batches)
    for name in ("discriminator", "generator"):
        optimizer = getattr(model, f"{name}_optimizer")
        metrics |= {
            f"skipped_steps_{name}": int(optimizer.skipped_steps.numpy()),
            f"loss_scale_{name}": float(optimizer.dynamic_scale.numpy()),
        }
    return metrics


def generator(
    image_shape: tuple[int, int, int], latent_size: int, width: int
) -> keras.Model:
    """Noise [B, L] to images [B, *image_shape] within -1..1."""
    *sides, channels = image_shape
    halvings = _halvings(sides)
    coarsest = [side >> halvings for side in sides]
    noise = keras.Input([latent_size])
    widest = width << halvings
    x = layers.Dense(math.prod(coarsest) * widest)(noise)
    x = layers.LeakyReLU(0.2)(layers.Reshape([*coarsest, widest])(x))
    for level in reversed(range(halvings)):
        x = layers.UpSampling2D(2)(x)
        x = layers.LeakyReLU(0.2)(_convolution(x, width << level))
    x = layers.LeakyReLU(0.2)(_convolution(x, width))
    return keras.Model(
        noise,
        layers.Activation("tanh")(_convolution(x, channels)),
        name="generator",
    )


def discriminator(image_shape: tuple[int, int, int], width: int) -> keras.Model:
    """Images [B, *image_shape] to logits [B, 1].

    Without batch normalization: the gradient penalty is of single images.
    """
    inputs = keras.Input(image_shape)
    x = layers.LeakyReLU(0.2)(_convolution(inputs, width))
    for level in range(_halvings(image_shape[:2])):
        x = _convolution(x, width << (level + 1), strides=2)
        x = layers.LeakyReLU(0.2)(x)
    logits = layers.Dense(1, name="logits")(layers.Flatten()(x))
    return keras.Model(inputs, logits, name="discriminator")


def _convolution(x, width, strides=1):
    return layers.Conv2D(
        width, 3, strides, padding="same", kernel_initializer="he_normal"
    )(x)


def _halvings(sides) -> int:
    count = 0
    while all(side % 2 == 0 and side // 2 >= _COARSEST_SIDE for side in sides):
        sides = [side // 2 for side in sides]
        count += 1
    return count


def _load(config: Config) -> pixels.Pixels:
    return pixels.load(
        config.dataset, config.data_dir, config.image_size, config.batch_size
    )


def _samples(network, count: int, config: Config) -> np.ndarray:
    """[count, H, W, C] within -1..1, float32."""
    random = np.random.default_rng(config.seed)
    noise = random.normal(size=(count, config.latent_size)).astype(np.float32)
    made = [
        network(noise[i : i + _SAMPLES_IN_A_PASS], training=False)
        for i in range(0, count, _SAMPLES_IN_A_PASS)
    ]
    return tf.cast(tf.concat(made, axis=0), tf.float32).numpy()


if __name__ == "__main__":
    tfamp.recipe.main(train, Config)
