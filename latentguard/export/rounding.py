"""8-bit weights of a matrix product: one scale a column, and rounding that makes up for itself.

A CPU with AVX2 but without VNNI multiplies unsigned 8-bit activations with signed 8-bit weights and
adds each two neighboring products in 16 bits, which saturates above 32,767. Weights of 7 bits
never do. Neither do larger ones as long as no two neighbors of one sign add to more than 128
(255 * 128 = 32,640), and that is what the scales here are chosen by: they are about a third finer
than 7 bits allow.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.floating]

LARGEST = 127
PAIR = 128
"""Largest sum of two neighboring weights of one sign: 255 * 128 fits 16 bits with sign."""
DAMPING = 0.01
"""Added to the diagonal, as a share of its mean, where calibration does not span the inputs."""
BLOCK = 128


def column_scales(weight: Matrix) -> NDArray[np.float32]:
    """Scales [N] of a weight [K, N] such that `round(weight / scale)` cannot saturate."""
    padded = np.vstack([weight, np.zeros((weight.shape[0] % 2, weight.shape[1]), weight.dtype)])
    pairs = padded.reshape(-1, 2, weight.shape[1])
    ups = np.maximum(pairs, 0).sum(1).max(0)
    downs = np.maximum(-pairs, 0).sum(1).max(0)
    # Half a step less each, since both may round up.
    largest = np.maximum(np.maximum(ups, downs) / (PAIR - 1), np.abs(weight).max(0) / LARGEST)
    return np.where(largest > 0, largest, 1).astype(np.float32)


def to_nearest(weight: Matrix, scales: Matrix) -> NDArray[np.int8]:
    """Each weight to the nearest step."""
    return _within_pairs(np.clip(np.round(weight / scales), -LARGEST, LARGEST))


def compensated(weight: Matrix, scales: Matrix, moment: Matrix) -> NDArray[np.int8]:
    """Rounded row by row, what each rounding changes in the result made up for by later rows.

    GPTQ (Frantar et al. 2022, arXiv 2210.17323): minimizes |x @ (weight - rounded * scales)|^2 over
    the inputs that `moment` was gathered from, as far as rows in order allow.

    Args:
        weight: [K, N].
        scales: [N].
        moment: [K, K], the sum of outer products of inputs.
    """
    size = weight.shape[0]
    mean = float(np.trace(moment)) / size
    if not np.isfinite(mean) or mean <= 0:
        return to_nearest(weight, scales)
    damped = moment.astype(np.float64)
    damped[np.diag_indices(size)] += DAMPING * mean
    # Upper factor of the inverse: row i tells how later rows answer a change of row i.
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    left = weight.astype(np.float32)
    rounded = np.empty_like(left)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        errors = np.empty((stop - start, left.shape[1]), np.float32)
        for row in range(start, stop):
            step = np.clip(np.round(left[row] / scales), -LARGEST, LARGEST)
            if row % 2:
                step = _beside(step, rounded[row - 1])
            rounded[row] = step
            errors[row - start] = (left[row] - step * scales) / factor[row, row]
            left[row + 1 : stop] -= np.outer(factor[row, row + 1 : stop], errors[row - start])
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return rounded.astype(np.int8)


def _beside(step: Matrix, neighbor: Matrix) -> Matrix:
    """A row kept within what its neighbor leaves of the pair's sum."""
    most = np.where(neighbor > 0, PAIR - neighbor, PAIR)
    least = np.where(neighbor < 0, -PAIR - neighbor, -PAIR)
    return np.clip(step, least, most)


def _within_pairs(rounded: Matrix) -> NDArray[np.int8]:
    odd = rounded[1::2]
    rounded[1::2] = _beside(odd, rounded[::2][: len(odd)])
    return rounded.astype(np.int8)
