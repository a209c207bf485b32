"""AXIS as the paper tells it (arXiv 2508.19353), in dense float64 numpy. Shares no code with the
library: it is what the library is compared with."""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Merged:
    """What AXIS makes of one layer: the difference, its SVD, and which triplets were kept."""

    delta: Array
    u: Array
    s: Array
    vh: Array
    kept: list[tuple[int, int]]


def merge_matrix(base: Array, sources: list[Array], num_kept: int) -> Merged:
    """Steps 1 to 4: differences, thin SVDs, the top triplets of all sources, a second SVD."""
    base = base.astype(np.float64)
    triplets: list[tuple[float, int, int, Array, Array]] = []
    for number, source in enumerate(sources):
        u, s, vh = np.linalg.svd(source.astype(np.float64) - base, full_matrices=False)
        for index in range(len(s)):
            triplets.append((s[index], number, index, u[:, index], vh[index]))
    triplets.sort(key=lambda triplet: triplet[0], reverse=True)
    kept = triplets[:num_kept]
    delta = np.zeros(base.shape)
    for sigma, _, _, left, right in kept:
        delta += sigma * np.outer(left, right)
    u, s, vh = np.linalg.svd(delta, full_matrices=False)
    return Merged(delta, u, s, vh, [(number, index) for _, number, index, _, _ in kept])


def merge_vector(base: Array, sources: list[Array]) -> Array:
    """What is no matrix: the mean of the differences."""
    differences = [source.astype(np.float64) - base.astype(np.float64) for source in sources]
    return np.mean(differences, axis=0)


def adapted(base: Array, merged: Merged, num_trained: int, trained: Array) -> Array:
    """Step 5: W_0 + U diag(s') Vh with the leading singular values replaced."""
    s = merged.s.copy()
    s[:num_trained] = trained
    return base.astype(np.float64) + (merged.u * s) @ merged.vh
