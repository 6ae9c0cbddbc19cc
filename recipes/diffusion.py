"""Trains a network to remove noise, and makes images of noise with it.

    python -m recipes.diffusion --precision=mixed_bfloat16

The default needs no download: a U-Net of 499,073 weights, conditioned on time
and class, 60 epochs of the 1,437 training digits of scikit-learn. What to
judge it by, besides samples.png:

*   frechet_distance: between the means and covariances of the pixels of 360
    samples and of the 360 test digits. 360 training digits are at 0.400; with
    each pixel taken from another of them, at 6.519.
*   loss: the mean squared error of the velocities (noise_schedule.py) of test
    digits with noise. The best linear network is at 0.3455.

On one core of a CPU with AVX512-BF16 that others used too (TensorFlow 2.21.0,
Keras 3.15.1), start-up included:

    precision        seed   seconds (of the core)   frechet_distance   loss
    float32          0      451 (97)                0.562              0.2098
    mixed_bfloat16   0      257 (111)               0.567              0.2109
    mixed_bfloat16   1      169 (100)               0.561              0.2108
    mixed_bfloat16   2      201 (110)               0.534              0.2113
    mixed_float16    0      1272 (386)              0.570              0.2107

float16 has no fast path on CPUs. Gradients are small: of those of the first
four steps it would make 36% zero without a loss scale, and with one 0.12%
(`tfamp probe recipes.diffusion --steps=4`).

Samples are made with a moving average of the weights, in float32 as they are:
each step moves it by 1/200 of a difference that is small itself, which 16 bits
would mostly round away. --guidance=2 leads samples further to their class.

Larger images: --dataset=cifar10 --widths=64,128,256 --blocks=2 --epochs=200
--ema_momentum=0.9995, or --dataset=celeb_a, which has no classes (not
measured here).
"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

import tfamp
from recipes import pictures
from recipes.data import images, pixels
from recipes.denoiser import GROUPS, denoiser
from recipes.frechet import frechet_distance, known_distances
from recipes.noise_schedule import add_noise, linear_loss, remove_noise
from recipes.rates import warm_cosine
from tfamp.distribute.consensus import is_chief
from tfamp.recipe import flag

# Noisy images that an evaluation sees at the least: each image several times
# where there are fewer, since the loss of few jumps with their noise.
_EVAL_IMAGES = 1440

# Memory for samples that are made at once.
_SAMPLES_IN_A_PASS = 512
# A column for each digit.
_SHOWN_SAMPLES, _SHOWN_COLUMNS = 80, 10


@dataclasses.dataclass(frozen=True)
class Config(tfamp.recipe.RunConfig):
    """The flags of this recipe."""

    dataset: str = flag(
        "digits", "digits, or a TensorFlow Datasets name such as cifar10"
    )
    image_size: int = flag(
        0, "pixels a side; 0: as stored, and no more than 64", minimum=0
    )
    widths: tuple[int, ...] = flag(
        (32, 64), "channels of each level, the finest first; multiples of 8"
    )
    blocks: int = flag(1, "residual blocks on each level", minimum=1)
    attention: bool = flag(True, "between the pixels of the coarsest level")
    dropout: float = flag(0.1, "share of features", minimum=0, below=1)
    batch_size: int = flag(64, "images in a step, over all devices", minimum=1)
    epochs: int = flag(60, "passes over the training data", minimum=1)
    learning_rate: float = flag(4e-3, "of Adam, at its peak", minimum=0)
    warmup_epochs: float = flag(5.0, "epochs of linear warm-up", minimum=0)
    ema_momentum: float = flag(
        0.995,
        "of the averaged weights that samples are made with; 0: no average",
        minimum=0,
        below=1,
    )
    class_dropout: float = flag(
        0.1, "share of images whose class is not told", minimum=0, below=1
    )
    guidance: float = flag(
        1.0,
        "of samples towards their class; 0: any class, 1: as trained",
        minimum=0,
    )
    sample_steps: int = flag(50, "from noise to samples", minimum=1)

    def __post_init__(self):
        super().__post_init__()
        if not self.widths or any(w < 1 or w % GROUPS for w in self.widths):
            raise tfamp.InputError(
                f"widths={self.widths}; expected channels of each level, "
                f"multiples of {GROUPS}, such as 32,64."
            )
        if self.guidance != 1 and not self.class_dropout:
            raise tfamp.InputError(
                f"guidance={self.guidance} needs a network that knows images "
                "without their class too; expected class_dropout above 0."
            )


def make_datasets(config: Config) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """Batches of what the network sees and the velocities [B, H, W, C].

    It sees {"noisy": [B, H, W, C], "time": [B], "label": int32 [B]}. All but
    the label is float32: 16 bits cannot tell times apart.
    """
    data = _load(config)
    train = images.with_seeds(
        data.train_examples(config.seed).batch(
            config.batch_size, drop_remainder=True
        ),
        config.seed,
    )
    # The same for every seed: results of several seeds compare.
    evaluation = data.eval_examples().repeat(
        max(_EVAL_IMAGES // data.num_eval, 1)
    )
    evaluation = evaluation.batch(config.batch_size).enumerate()
    evaluation = evaluation.map(lambda i, batch: (batch, tf.stack([i, i])))

    def noisy(batches, class_dropout):
        def of_batch(batch, seed):
            return _noisy_batch(*batch, seed, data.num_classes, class_dropout)

        noisy = batches.map(of_batch, tf.data.AUTOTUNE, deterministic=True)
        return noisy.prefetch(tf.data.AUTOTUNE)

    return noisy(train, config.class_dropout), noisy(evaluation, 0.0)


def build_model(config: Config) -> keras.Model:
    """The compiled network, with float32 velocities as its output."""
    data = _load(config)
    model = denoiser(
        data.image_shape,
        data.num_classes,
        config.widths,
        blocks=config.blocks,
        attention=config.attention,
        dropout=config.dropout,
    )
    tfamp.keep_float32(model)

    steps_per_epoch = data.num_train // config.batch_size
    optimizer = keras.optimizers.Adam(
        warm_cosine(
            config.learning_rate,
            config.epochs * steps_per_epoch,
            round(config.warmup_epochs * steps_per_epoch),
        ),
        beta_2=0.99,
        global_clipnorm=1.0,
        use_ema=config.ema_momentum > 0,
        ema_momentum=config.ema_momentum,
    )
    model.compile(
        optimizer=tfamp.wrap_optimizer(optimizer, shard=config.shard == "on"),
        loss="mean_squared_error",
        auto_scale_loss=False,
    )
    return model


def train(config: Config) -> dict[str, float]:
    """Trains; returns the metrics, and writes `samples.png` to output_dir."""
    strategy = tfamp.recipe.start(config)
    train_batches, eval_batches = make_datasets(config)
    with strategy.scope():
        model = build_model(config)
    tfamp.recipe.print_float32_layers(model)
    data = _load(config)
    train_images, real = data.compared_images()
    for name, distance in known_distances(train_images, real).items():
        print(f"  {name}: frechet_distance {distance:.3f}")
    print(f"  best linear network: loss {linear_loss(train_images):.4f}")
    tfamp.recipe.fit(model, train_batches, eval_batches, config)
    # fit leaves the averaged weights in the model.
    metrics = tfamp.recipe.final_metrics(model, eval_batches)
    samples = sample(model, data, len(real), config)
    if config.output_dir and is_chief(strategy):
        pictures.write_samples(
            f"{config.output_dir}/samples.png",
            samples[:_SHOWN_SAMPLES],
            _SHOWN_COLUMNS,
        )
    return {"frechet_distance": frechet_distance(samples, real)} | metrics


def sample(
    model: keras.Model, data: pixels.Pixels, count: int, config: Config
) -> np.ndarray:
    """Images [count, H, W, C] from -1 to 1, the classes taking turns.

    With a guidance of w the velocity is that of no class, and w times what
    the class changes in it (Ho and Salimans, 2022, "Classifier-Free Diffusion
    Guidance").
    """
    labels = np.arange(count, dtype=np.int32) % max(data.num_classes, 1)
    random = np.random.default_rng(config.seed)
    noise = random.normal(size=(count, *data.image_shape)).astype(np.float32)

    def predict(noisy, time, labels):
        times = tf.fill(tf.shape(labels), time)
        inputs = {"noisy": noisy, "time": times, "label": labels}
        return tf.cast(model(inputs, training=False), tf.float32)

    @tf.function
    def made_from(noise, labels):
        def velocity(noisy, time):
            told = predict(noisy, time, labels)
            if config.guidance == 1:
                return told
            no_class = tf.fill(tf.shape(labels), data.num_classes)
            untold = predict(noisy, time, no_class)
            return untold + config.guidance * (told - untold)

        return remove_noise(velocity, noise, config.sample_steps)

    passes = range(0, count, _SAMPLES_IN_A_PASS)
    made = [
        made_from(
            noise[i : i + _SAMPLES_IN_A_PASS],
            labels[i : i + _SAMPLES_IN_A_PASS],
        )
        for i in passes
    ]
    return np.clip(np.concatenate(made), -1, 1)


def _load(config: Config) -> pixels.Pixels:
    data = pixels.load(
        config.dataset, config.data_dir, config.image_size, config.batch_size
    )
    multiple = 2 ** (len(config.widths) - 1)
    if data.image_size % multiple:
        raise tfamp.InputError(
            f"image_size={data.image_size} with {len(config.widths)} levels; "
            f"expected a multiple of {multiple}."
        )
    if config.guidance != 1 and not data.num_classes:
        raise tfamp.InputError(
            f"guidance={config.guidance}, and {config.dataset!r} has no "
            "classes; expected 1."
        )
    return data


def _noisy_batch(image_batch, labels, seed, num_classes, class_dropout):
    """Noise, times and untold classes, all of one seed."""
    noise_seed, time_seed, class_seed = tf.unstack(tf.random.split(seed, 3))
    size = tf.shape(image_batch)[0]
    noise = tf.random.stateless_normal(tf.shape(image_batch), noise_seed)
    # Times spread evenly over the batch: a loss that jumps less from step to
    # step (Kingma et al., 2021, "Variational Diffusion Models").
    begin = tf.random.stateless_uniform([], time_seed)
    time = (
        begin + tf.range(size, dtype=tf.float32) / tf.cast(size, tf.float32)
    ) % 1.0
    told = tf.random.stateless_uniform([size], class_seed) >= class_dropout
    noisy, velocity = add_noise(image_batch, noise, time)
    return {
        "noisy": noisy,
        "time": time,
        "label": tf.where(told, labels, num_classes),
    }, velocity


if __name__ == "__main__":
    tfamp.recipe.main(train, Config)
