"""How far made images are from real ones: the Fréchet distance of pixels."""

import math

import numpy as np


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """The squared Fréchet distance of two sets' means and covariances.

    That of FID (Heusel et al., 2017), here for pixels as they are. Sets of
    the same size compare: the fewer images, the further apart two sets of one
    origin are.

    Args:
        one, other: images, [N, ...] with N of at least 2.
    """
    (mean, deviations), (other_mean, other_deviations) = (
        _mean_and_deviations(each) for each in (one, other)
    )
    # With covariances A'A and B'B, the trace of the root of their product is
    # the sum of the singular values of AB': of the size of the sets, however
    # many pixels there are.
    common = np.linalg.svd(deviations @ other_deviations.T, compute_uv=False)
    return float(
        np.sum((mean - other_mean) ** 2)
        + np.sum(deviations**2)
        + np.sum(other_deviations**2)
        - 2 * np.sum(common)
    )


def known_distances(
    train_images: np.ndarray, real: np.ndarray
) -> dict[str, float]:
    """How far from real images are some that nothing was learned for.

    Args:
        train_images, real: [N, H, W, C], with the same N.

    Returns:
        "other real images": the training images themselves.
        "pixels of several": with each pixel taken from another of them, right
        by itself and fitting no other.
    """
    random = np.random.default_rng(0)
    mixed = random.permuted(train_images, axis=0)
    return {
        "other real images": frechet_distance(train_images, real),
        "pixels of several": frechet_distance(mixed, real),
    }


def _mean_and_deviations(images):
    """The mean [D], and [N, D] with D'D as the covariance; float64."""
    pixels = np.asarray(images, np.float64).reshape(len(images), -1)
    mean = pixels.mean(axis=0)
    return mean, (pixels - mean) / math.sqrt(len(pixels) - 1)
