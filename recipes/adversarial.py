"""Two networks that learn against each other: their losses and their step."""

import keras
import tensorflow as tf

import tfamp

# What a GAN is made of, by attribute.
_PARTS = (
    "generator",
    "discriminator",
    "generator_optimizer",
    "discriminator_optimizer",
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
        loss, gradients = tfamp.value_and_gradients(loss_fn, weights, optimizer)
        optimizer.apply(gradients, weights)
        # A step that is skipped may have no loss, and the epoch still has one.
        finite = tf.math.is_finite(loss)
        mean.update_state(
            tf.where(finite, loss, 0.0),
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
