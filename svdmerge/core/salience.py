"""What ranks components against each other."""

import numpy as np
from jaxtyping import Float

Array = np.ndarray


def sigma(s: Float[Array, " c"], *, fro: float, noise: float) -> Float[Array, " c"]:
    """The singular value itself: AXIS as published (arXiv 2508.19353)."""
    del fro, noise
    return s


def relative(s: Float[Array, " c"], *, fro: float, noise: float) -> Float[Array, " c"]:
    """Singular value over the matrix's Frobenius norm: a source's scale no longer buys it slots."""
    del noise
    # Not >=: a zero matrix has no components worth ranking, and 0/0 would be NaN.
    return s / fro if fro > 0 else np.zeros_like(s)


def denoised(s: Float[Array, " c"], *, fro: float, noise: float) -> Float[Array, " c"]:
    """The singular value, or nothing up to the noise's edge (`core.noise`)."""
    del fro
    return np.where(s > noise, s, 0.0)


SALIENCES = {"sigma": sigma, "relative": relative, "denoised": denoised}
