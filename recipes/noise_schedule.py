"""Images to noise and back: the arithmetic of a diffusion model, in float32.

At time t, from 0 to 1, an image x and noise e of standard deviation 1 are
mixed by an angle a = t * pi/2 (the cosine schedule of Nichol and Dhariwal,
2021, without its offset):

    noisy    = cos(a) * x + sin(a) * e
    velocity = cos(a) * e - sin(a) * x

The velocity (Salimans and Ho, 2022) is how the noisy image changes with the
angle, and the pair is the pair (x, e) turned by it. A network that predicts
the velocity gets and gives numbers of the size of 1 at every time, and nothing
is divided by a cosine or sine that vanishes, as where it predicts the noise or
the image. That is what 16 bits want, and why it is chosen here.
"""

import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

_QUARTER_TURN = math.pi / 2


def add_noise(
    images: tf.Tensor, noise: tf.Tensor, time: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mixes images with noise.

    Args:
        images, noise: [B, H, W, C].
        time: [B], from 0 (the images) to 1 (the noise).

    Returns:
        The noisy images and their velocities, [B, H, W, C], float32.
    """
    images, noise, time = (
        tf.cast(each, tf.float32) for each in (images, noise, time)
    )
    return _turn(images, noise, _QUARTER_TURN * time[:, None, None, None])


def remove_noise(
    predict_velocity: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    noise: tf.Tensor,
    num_steps: int,
) -> tf.Tensor:
    """Makes images of noise: DDIM (Song et al., 2021), without chance.

    Each step turns the noisy images back by the same small angle, with the
    velocity that is predicted for them. What the steps add up is float32,
    whatever the network computes in: one of many changes a pixel by little
    more than bfloat16 can tell apart. Within a `tf.function` they are a loop
    of the graph.

    Args:
        predict_velocity: noisy images [B, H, W, C], float32, and their time,
            a float32 scalar, to velocities [B, H, W, C].
        noise: [B, H, W, C], of standard deviation 1.
        num_steps: from noise to images; the error is about inverse to it.

    Returns:
        Images [B, H, W, C], float32; not clipped.
    """
    angle = -_QUARTER_TURN / num_steps
    noisy = tf.cast(noise, tf.float32)
    for step in tf.range(num_steps):
        time = 1.0 - tf.cast(step, tf.float32) / num_steps
        velocity = tf.cast(predict_velocity(noisy, time), tf.float32)
        noisy, _ = _turn(noisy, velocity, angle)
    return noisy


def linear_loss(images: np.ndarray) -> float:
    """The loss of the best linear network: what a real one has to beat.

    That network knows the mean and the covariance of the images. Along a
    principal component of variance s² it is left with a mean squared error of
    s² / (cos²(a) s² + sin²(a)) in the velocity, whose mean over all angles is
    s. So the loss is the mean of s over the components.

    Args:
        images: [N, ...], the more than it has pixels, the better.
    """
    pixels = np.asarray(images, np.float64).reshape(len(images), -1)
    deviations = np.linalg.svd(pixels - pixels.mean(axis=0), compute_uv=False)
    deviations /= math.sqrt(len(images) - 1)
    return float(deviations.sum() / pixels.shape[1])


def _turn(one, other, angle):
    cos, sin = tf.cos(angle), tf.sin(angle)
    return cos * one + sin * other, cos * other - sin * one
