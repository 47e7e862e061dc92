"""How far reconstructions are from images: MSE and PSNR. NumPy in, float64 arithmetic, Python floats out.

All errors here are on the [0, 1] scale: uint8 pixels are divided by 255, floats must lie in [0, 1] already. An error
on another scale is a factor away: x 255^2 for 0..255, x 4 for [-1, 1].
"""

import math

import numpy as np


def mse_per_image(images, reconstructions) -> np.ndarray:
    """Mean squared error of each image on the [0, 1] scale.

    Sums and counts of it may be gathered batch by batch; their quotient is the `mse` of the whole set.

    Args:
      images: [N, H, W, C], uint8 in 0..255 or floats in [0, 1]; N at least 1.
      reconstructions: the same shape; uint8 or floats, not necessarily as `images`.

    Returns:
      float64 [N].

    Raises:
      TypeError, ValueError: the shapes differ or are empty, another dtype, or floats outside [0, 1].
    """
    images, reconstructions = np.asarray(images), np.asarray(reconstructions)
    if images.shape != reconstructions.shape or images.ndim != 4 or not images.size:
        raise ValueError(
            f'images {images.shape} and reconstructions {reconstructions.shape} must both be the same '
            'non-empty [N, H, W, C]'
        )
    difference = _unit_range('images', images) - _unit_range('reconstructions', reconstructions)
    return np.square(difference).mean(axis=(1, 2, 3))


def mse(images, reconstructions) -> float:
    """Mean squared error over all images on the [0, 1] scale; arguments and errors as `mse_per_image`."""
    return float(mse_per_image(images, reconstructions).mean())


def psnr_from_mse(mse: float, data_range: float) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(data_range^2 / mse).

    Args:
      mse: mean squared error; 0 gives infinity.
      data_range: largest minus smallest possible pixel on the scale of `mse`: 1 for [0, 1], 255 for 0..255.

    Raises:
      ValueError: a negative or NaN `mse`, or a `data_range` that is not positive.
    """
    if not mse >= 0 or not data_range > 0:
        raise ValueError(f'PSNR needs mse >= 0 and data_range > 0, got mse {mse} and data_range {data_range}')
    return math.inf if mse == 0 else 10 * math.log10(data_range**2 / mse)


def psnr(images, reconstructions) -> float:
    """PSNR in dB of the whole set, that is, of its mean squared error (not the mean of each image's PSNR).

    The mean over images of their PSNR is never lower (Jensen) and is infinite as soon as one image is perfect; name the
    one you report. Arguments and errors as `mse_per_image`.
    """
    return psnr_from_mse(mse(images, reconstructions), data_range=1.0)


def _unit_range(name: str, array: np.ndarray) -> np.ndarray:
    """float64 in [0, 1]."""
    if array.dtype == np.uint8:
        return array.astype(np.float64) / 255
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f'{name} has dtype {array.dtype}; expected uint8 in 0..255 or floats in [0, 1]')
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f'{name} spans [{low:g}, {high:g}]; floats must lie in [0, 1]: rescale or clip them first')
    return array.astype(np.float64)
