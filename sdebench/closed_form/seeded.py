"""Fixed pseudo-random coefficients of problems, the same under every numpy version."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri


def seeded_uniforms(seed: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return uniforms in (0, 1) made from raw Philox words."""
    words = np.random.Philox(key=seed).random_raw(int(np.prod(shape)))
    uniforms = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return np.asarray(uniforms).reshape(shape)


def seeded_normals(seed: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return standard normals made from raw Philox words by the inverse normal.

    numpy promises the words of a bit generator, not the stream of its normals
    (NEP 19), so problem matrices are built from words.
    """
    return np.asarray(ndtri(seeded_uniforms(seed, shape)))
