"""Reconstruction error. Python floats in and out."""

import math

LEAST_MSE = 1e-12  # the PSNR of a perfect reconstruction is large, not infinite, which JSON cannot hold


def psnr_from_mse(mse: float, data_range: float) -> float:
    """Returns the peak signal-to-noise ratio in dB: 10 log10(data_range^2 / mse).

    Args:
      mse: mean squared error; 0 gives infinity.
      data_range: largest minus smallest possible pixel on the scale of `mse`: 1 for [0, 1], 2 for [-1, 1].

    Raises:
      ValueError: a negative or NaN `mse`, or a `data_range` that is not positive.
    """
    if not mse >= 0 or not data_range > 0:
        raise ValueError(f'PSNR needs mse >= 0 and data_range > 0, got mse {mse} and data_range {data_range}')
    return math.inf if mse == 0 else 10 * math.log10(data_range**2 / mse)
