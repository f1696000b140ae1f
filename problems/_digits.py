"""The handwritten digits of scikit-learn, in any resolution, and a classifier.

1,797 images of 8 x 8 pixels, grey levels scaled to [-1, 1] (background -1); of
``dim`` < 64 numbers each is the mean of a rectangle of pixels.  The data come with
scikit-learn and are never stored here.
Source: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI
machine learning repository; the test set, as distributed by scikit-learn.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sdebench.closed_form.log_quadratics import Array
from sdebench.errors import ParameterError

N_IMAGES = 1797
SIDE = 8


class Classifier(NamedTuple):
    """Multinomial logistic regression: log p(j | x) = l_j - log sum_i exp l_i."""

    weights: Array  # (10, d)
    biases: Array  # (10,)

    def log_probabilities(self, x: Array) -> Array:
        """Return log p(j | x), (..., 10), for x (..., d)."""
        scores = x @ self.weights.T + self.biases
        top = np.max(scores, axis=-1, keepdims=True)
        total = np.log(np.sum(np.exp(scores - top), axis=-1, keepdims=True))
        return np.asarray(scores - top - total)


def shape(dim: int) -> tuple[int, int]:
    """Return rows and columns of an image of ``dim`` numbers, at least as many rows.

    Raises
    ------
    ParameterError
        If no rectangle of at most 8 x 8 has that many.
    """
    for columns in range(min(int(max(dim, 0) ** 0.5), SIDE), 0, -1):
        if dim > 1 and dim % columns == 0 and dim // columns <= SIDE:
            return dim // columns, columns
    raise ParameterError(
        f"dim {dim} must be rows times columns, each at most {SIDE}, and more than one"
    )


def check_images(n_images: int) -> None:
    """Raise `ParameterError` for a number of images that there is not."""
    if not 2 <= n_images <= N_IMAGES:
        raise ParameterError(f"n_images {n_images} must be from 2 to {N_IMAGES}")


def _averages(pixels: Array, count: int, axis: int) -> Array:
    """Return means of ``count`` nearly equal parts along an axis."""
    parts = np.array_split(pixels, count, axis=axis)
    return np.stack([part.mean(axis=axis) for part in parts], axis=axis)


@lru_cache(maxsize=8)
def images(dim: int) -> tuple[Array, Array]:
    """Return all images (1797, dim) and what they show (1797,)."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    rows, columns = shape(dim)
    blocks = _averages((pixels / 8.0 - 1.0).reshape(-1, SIDE, SIDE), rows, 1)
    means = np.ascontiguousarray(_averages(blocks, columns, 2).reshape(-1, dim))
    means.flags.writeable = labels.flags.writeable = False
    return means, labels


@lru_cache(maxsize=8)
def classifier(dim: int) -> Classifier:
    """Return the classifier fitted to all images: convex, so the same everywhere.

    Weighed so that it is right about most images and sure about few, whatever dim.
    """
    from sklearn.linear_model import LogisticRegression

    x, labels = images(dim)
    weight = 0.01 * (64.0 / dim) ** 2
    found = LogisticRegression(
        C=weight, solver="newton-cg", tol=1e-12, max_iter=1000
    ).fit(x, labels)
    return Classifier(found.coef_, found.intercept_)
