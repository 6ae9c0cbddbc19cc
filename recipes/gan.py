"""Trains a generator of handwritten digits against a discriminator.

    python -m recipes.gan --precision=mixed_bfloat16

The default needs no download: small convolutional networks, 100 epochs of the
1,437 training digits of scikit-learn. What to judge it by, besides samples.png:

*   frechet_distance: between the means and covariances of the pixels of 360
    samples and of the 360 test digits, and of nothing else. 360 training
    digits are at 0.561; with each pixel taken from another of them, at 7.323.
*   discriminator_loss: 2 ln 2 = 1.386 and the penalty, where it cannot tell
    samples from test digits.

On one core of a CPU that others used too (TensorFlow 2.21.0, Keras 3.15.1),
seed 0; the float32 run took 91 seconds:

    precision        frechet_distance   discriminator_loss
    float32          1.060              1.378
    mixed_bfloat16   0.873              1.376

28x28 pixels: --dataset=mnist --epochs=10 (not measured here).
"""

import dataclasses
import math

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tfamp
from recipes import pictures
from recipes.data import images, loading
from recipes.data.glyphs import read_glyphs
from tfamp.recipe import flag

# Networks halve the sides of an image down to this many pixels, or to odd.
_COARSEST_SIDE = 4

# What a GAN is made of, by attribute.
_PARTS = (
    "generator",
    "discriminator",
    "generator_optimizer",
    "discriminator_optimizer",
)

# Memory for samples that are made at once.
_SAMPLES_IN_A_PASS = 512
_SHOWN_SAMPLES, _SHOWN_COLUMNS = 64, 16


@dataclasses.dataclass(frozen=True)
class Config(tfamp.recipe.RunConfig):
    """The flags of this recipe."""

    dataset: str = flag(
        "digits", "digits, or grayscale images of tfds such as mnist"
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
        0.995, "of the generator's weights that samples are made with"
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.ema_momentum < 1:
            raise tfamp.InputError(
                f"ema_momentum={self.ema_momentum}; expected 0 to below 1."
            )


@keras.saving.register_keras_serializable(package="tfamp_recipes")
class GAN(keras.Model):
    """Two networks that learn against each other, by an optimizer each.

    The losses are the non-saturating ones (Goodfellow et al., 2014), with the
    gradient penalty R1 (Mescheder et al., 2018) for the discriminator. Each
    optimizer has its own loss scale: what overflows for one, says nothing
    about the other.

    Batches are pairs of images [B, H, W, C] within -1..1 and the noise [B, L]
    of as many made ones. Noise that comes with the data makes a step a
    function of its batch: replicas get different noise, a resumed run the
    same.

    Args:
        generator: noise [B, L] to images.
        discriminator: images to logits [B, 1], positive for real ones.
        generator_optimizer, discriminator_optimizer: from
            `tfamp.wrap_optimizer`, not built.
        penalty: weight of half the mean squared gradient.
        **model_arguments: of `keras.Model`: name, dtype and the like.
    """

    def __init__(
        self,
        generator: keras.Model,
        discriminator: keras.Model,
        generator_optimizer: keras.optimizers.Optimizer,
        discriminator_optimizer: keras.optimizers.Optimizer,
        penalty: float,
        **model_arguments,
    ):
        super().__init__(**model_arguments)
        self.generator = generator
        self.discriminator = discriminator
        self.generator_optimizer = generator_optimizer
        self.discriminator_optimizer = discriminator_optimizer
        self.penalty = penalty
        # An optimizer's state is made here: within a step it is too late.
        generator_optimizer.build(generator.trainable_variables)
        discriminator_optimizer.build(discriminator.trainable_variables)
        self._means = [
            keras.metrics.Mean(name="discriminator_loss"),
            keras.metrics.Mean(name="generator_loss"),
        ]
        self.built = True

    def train_step(self, data):
        """One step of the discriminator, then one of the generator."""
        real, noise = data
        self._train(
            self.discriminator,
            self.discriminator_optimizer,
            lambda: self._discriminator_loss(real, noise),
            self._means[0],
        )
        self._train(
            self.generator,
            self.generator_optimizer,
            lambda: self._generator_loss(noise),
            self._means[1],
        )
        return {mean.name: mean.result() for mean in self._means}

    def test_step(self, data):
        """Both losses for images that were not trained on."""
        real, noise = data
        self._means[0].update_state(self._discriminator_loss(real, noise))
        self._means[1].update_state(self._generator_loss(noise))
        return {mean.name: mean.result() for mean in self._means}

    def get_config(self):
        parts = {
            name: keras.saving.serialize_keras_object(getattr(self, name))
            for name in _PARTS
        }
        return {**super().get_config(), **parts, "penalty": self.penalty}

    @classmethod
    def from_config(cls, config):
        parts = {
            name: keras.saving.deserialize_keras_object(config[name])
            for name in _PARTS
        }
        return cls(**config | parts)

    def compile_from_config(self, config):
        # Keras's own builds one optimizer; both are built already.
        del config
        self.compile(optimizer=None)

    def _train(self, network, optimizer, loss_fn, mean):
        weights = network.trainable_variables
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        # Gradients are summed over replicas; the loss is a mean over all.
        loss, gradients = tfamp.value_and_gradients(
            lambda: loss_fn() / replicas, weights, optimizer
        )
        optimizer.apply(gradients, weights)
        # A step that is skipped may have no loss, and the epoch still has one.
        finite = tf.math.is_finite(loss)
        mean.update_state(
            tf.where(finite, loss * replicas, 0.0),
            sample_weight=tf.cast(finite, tf.float32),
        )

    def _discriminator_loss(self, real, noise):
        made = self.generator(noise, training=True)
        real_logits, squares = logits_and_gradients(self.discriminator, real)
        made_logits = self.discriminator(made, training=True)
        return keras.ops.mean(
            keras.ops.softplus(-real_logits)
            + keras.ops.softplus(made_logits)
            + self.penalty / 2 * squares
        )

    def _generator_loss(self, noise):
        made = self.generator(noise, training=True)
        return keras.ops.mean(
            keras.ops.softplus(-self.discriminator(made, training=True))
        )


def logits_and_gradients(
    discriminator: keras.Model, real: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Logits of images, and the squared length of their gradients.

    The gradient is that of the logits as they are. The loss scale comes in
    later, with the loss that holds the square: a gradient scaled here would
    bring the scale's square, which the optimizer divides by the scale once.
    Underflow is no danger here, since logits and pixels are of the order of 1;
    the gradient of the square, which runs through 16 bits once more, does
    carry the scale.

    Args:
        discriminator: images to logits [B, 1].
        real: [B, H, W, C].

    Returns:
        Both [B, 1], float32, and differentiable by the discriminator's
        weights.
    """
    # In float32, though the first layer casts to 16 bits: so is its gradient,
    # and the sum of squares, which float16 may not hold.
    real = tf.cast(real, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(real)
        logits = tf.cast(discriminator(real, training=True), tf.float32)
        # No image of a batch changes another's logit: one sum serves all.
        sum_of_logits = tf.reduce_sum(logits)
    gradients = tape.gradient(sum_of_logits, real)
    squares = tf.reduce_sum(tf.square(gradients), axis=[1, 2, 3])
    return logits, squares[:, tf.newaxis]


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """The squared Fréchet distance of two sets' means and covariances.

    That of FID (Heusel et al., 2017), here for pixels as they are. Sets of
    the same size compare: the fewer images, the further apart two sets of one
    origin are.

    Args:
        one, other: images, [N, ...] with N of at least 2.
    """
    one, other = (
        np.asarray(each, np.float64).reshape(len(each), -1)
        for each in (one, other)
    )
    difference = one.mean(axis=0) - other.mean(axis=0)
    covariance, other_covariance = (
        np.cov(each, rowvar=False) for each in (one, other)
    )
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    common = np.linalg.eigvalsh(root @ other_covariance @ root)
    return float(
        difference @ difference
        + np.trace(covariance)
        + np.trace(other_covariance)
        - 2 * np.sqrt(common.clip(0)).sum()
    )


def make_datasets(config: Config) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """Batches of (images [B, H, W, C], noise [B, L]), both float32."""
    train, evaluation = (_pixels(each) for each in _read(config))
    if config.batch_size > len(train):
        raise tfamp.InputError(
            f"batch_size={config.batch_size} exceeds the {len(train)} training "
            f"images of {config.dataset!r}; use {len(train)} or less."
        )

    def with_noise(image, seed):
        return image, tf.random.stateless_normal([config.latent_size], seed)

    train = tf.data.Dataset.from_tensor_slices(train)
    train = images.with_seeds(
        train.shuffle(train.cardinality(), config.seed), config.seed
    )
    # The same for every seed: results of several seeds compare.
    evaluation = tf.data.Dataset.from_tensor_slices(evaluation).enumerate()
    evaluation = evaluation.map(lambda i, image: (image, tf.stack([i, i])))
    return (
        train.map(with_noise, tf.data.AUTOTUNE, deterministic=True)
        .batch(config.batch_size, drop_remainder=True)
        .prefetch(tf.data.AUTOTUNE),
        evaluation.map(with_noise, tf.data.AUTOTUNE, deterministic=True)
        .batch(config.batch_size)
        .cache(),
    )


def build_model(config: Config) -> GAN:
    """Both networks with their optimizers, compiled."""
    shape = loading.load(config.dataset, config.data_dir).image_shape
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
            )
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
    train_images, real = (_pixels(each) for each in _read(config))
    for name, distance in _known_distances(train_images, real).items():
        print(f"  {name}: frechet_distance {distance:.3f}")
    tfamp.recipe.fit(model, train_batches, eval_batches, config)
    # From here on the generator is its average over the last steps.
    model.generator_optimizer.finalize_variable_values(
        model.generator.trainable_variables
    )
    samples = _samples(model.generator, len(real), config)
    if config.output_dir:
        _write_samples(samples, f"{config.output_dir}/samples.png")
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


def _read(config: Config):
    return read_glyphs(config.dataset, config.data_dir)


def _pixels(glyphs) -> np.ndarray:
    """[N, H, W, C] from -1 to 1, as the generator makes them."""
    return 2 * glyphs.pixels - 1


def _known_distances(
    train_images: np.ndarray, real: np.ndarray
) -> dict[str, float]:
    """How far from `real` are images that nothing was learned for."""
    random = np.random.default_rng(0)
    others = random.permutation(train_images)[: len(real)]
    return {
        "other real images": frechet_distance(others, real),
        # Each pixel right by itself, and none fitting another.
        "pixels of several": frechet_distance(
            random.permuted(others, axis=0), real
        ),
    }


def _samples(network, count: int, config: Config) -> np.ndarray:
    """[count, H, W, C] within -1..1, float32."""
    random = np.random.default_rng(config.seed)
    noise = random.normal(size=(count, config.latent_size)).astype(np.float32)
    made = [
        network(noise[i : i + _SAMPLES_IN_A_PASS], training=False)
        for i in range(0, count, _SAMPLES_IN_A_PASS)
    ]
    return tf.cast(tf.concat(made, axis=0), tf.float32).numpy()


def _write_samples(samples, path):
    shown = pictures.to_uint8(samples[:_SHOWN_SAMPLES], -1, 1)
    picture = pictures.grid(shown, columns=_SHOWN_COLUMNS)
    pictures.write_png(path, picture, enlarge=4)


if __name__ == "__main__":
    tfamp.recipe.main(train, Config)
