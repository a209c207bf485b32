"""What ranks components against each other."""

import numpy as np
from jaxtyping import Float

Array = np.ndarray


def sigma(s: Float[Array, " c"], *, fro: float) -> Float[Array, " c"]:
    """The singular value itself: AXIS as published (arXiv 2508.19353)."""
    del fro
    return s


def relative(s: Float[Array, " c"], *, fro: float) -> Float[Array, " c"]:
    """Singular value over the matrix's Frobenius norm: a source's scale no longer buys it slots."""
    # Not >=: a zero matrix has no components worth ranking, and 0/0 would be NaN.
    return s / fro if fro > 0 else np.zeros_like(s)


SALIENCES = {"sigma": sigma, "relative": relative}
