"""Merge methods as their papers tell them, dense, in float64 numpy; no code of the library's.

Every function takes the weighted differences of one matrix as a list and gives the merged one.
"""

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def task_arithmetic(deltas: Sequence[Array], *, scale: float) -> Array:
    """arXiv 2212.04089: lambda * sum of task vectors."""
    return scale * np.sum(deltas, axis=0)


def trimmed(delta: Array, density: float) -> Array:
    """Entry by entry: the largest magnitudes, and what ties with the last of them."""
    sizes = sorted(np.abs(delta).ravel().tolist(), reverse=True)
    last = sizes[max(1, int(density * len(sizes) + 1e-9)) - 1]
    return np.where(np.abs(delta) >= last, delta, 0.0)


def ties(
    deltas: Sequence[Array], weights: Sequence[float], *, density: float, scale: float
) -> Array:
    """arXiv 2306.01708, algorithm 1, in loops over entries."""
    kept = [w * trimmed(d, density) for d, w in zip(deltas, weights, strict=True)]
    merged = np.zeros_like(deltas[0])
    for place in np.ndindex(*merged.shape):
        values = [float(k[place]) for k in kept]
        sign = np.sign(sum(values))
        agreeing = [v for v in values if sign != 0 and np.sign(v) == sign]
        merged[place] = scale * sum(agreeing) / len(agreeing) if agreeing else 0.0
    return merged


def tsv_m(deltas: Sequence[Array], quota: int) -> Array:
    """arXiv 2412.00081, algorithm 1: leading vectors side by side, orthogonalised; values kept."""
    svds = [np.linalg.svd(d, full_matrices=False) for d in deltas]
    live = [min(quota, int((s > 1e-12 * max(s[0], 1e-300)).sum())) for _, s, _ in svds]
    u = np.concatenate([u[:, :q] for (u, _, _), q in zip(svds, live, strict=True)], axis=1)
    s = np.concatenate([s[:q] for (_, s, _), q in zip(svds, live, strict=True)])
    vh = np.concatenate([vh[:q] for (_, _, vh), q in zip(svds, live, strict=True)], axis=0)
    return inverse_root_polar(u) @ np.diag(s) @ inverse_root_polar(vh.T).T


def inverse_root_polar(x: Array) -> Array:
    """X (X^T X)^(-1/2), on the range of X alone: the polar factor by another way than the SVD."""
    values, vectors = np.linalg.eigh(x.T @ x)
    roots = np.array([v**-0.5 if v > 1e-10 else 0.0 for v in values])
    return x @ (vectors * roots) @ vectors.T


def iso_c(deltas: Sequence[Array], *, scale: float) -> Array:
    """arXiv 2502.04959: the polar factor of the sum, times the mean of its singular values."""
    total = np.sum(deltas, axis=0)
    s = np.linalg.svd(total, compute_uv=False)
    small = total.T if total.shape[0] < total.shape[1] else total
    if not s.any():
        return np.zeros_like(total)
    polar = inverse_root_polar(small / s[0])
    return scale * s.mean() * (polar.T if total.shape[0] < total.shape[1] else polar)


def svc(kept: Sequence[Array]) -> Array:
    """arXiv 2602.05536 with alpha 1: the sum, each singular value over its mean counting."""
    total = np.sum(kept, axis=0)
    u, s, vh = np.linalg.svd(total, full_matrices=False)
    calibrated = np.zeros_like(total)
    for r in range(len(s)):
        if s[r] <= 1e-12 * max(s[0], 1e-300):
            continue
        whole = u[:, r] @ total
        counts: list[float] = []
        for part in kept:
            own = u[:, r] @ part
            has_response = np.linalg.norm(own) > 1e-6 * np.linalg.norm(whole)
            counts.append(max(1.0, whole @ own / (own @ own)) if has_response else 1.0)
        calibrated += s[r] * len(kept) / sum(counts) * np.outer(u[:, r], vh[r])
    return calibrated


def knots(deltas: Sequence[Array], *, density: float, scale: float) -> Array:
    """arXiv 2410.19735: one SVD of all side by side, TIES on the right factors with s on V."""
    n = deltas[0].shape[1]
    u, s, vh = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    rank = int((s > 1e-5 * s[0]).sum())
    right = np.diag(s[:rank]) @ vh[:rank]
    blocks = [right[:, i * n : (i + 1) * n] for i in range(len(deltas))]
    return u[:, :rank] @ ties(blocks, [1.0] * len(blocks), density=density, scale=scale)


def core_space(deltas: Sequence[Array], *, density: float, scale: float) -> Array:
    """arXiv 2509.17786: TIES on U^T D_i V, in the bases of all columns and of all rows."""
    u, s, _ = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    u = u[:, s > 1e-5 * s[0]]
    _, s, vh = np.linalg.svd(np.concatenate(deltas, axis=0), full_matrices=False)
    vh = vh[s > 1e-5 * s[0]]
    cores = [u.T @ d @ vh.T for d in deltas]
    return u @ ties(cores, [1.0] * len(cores), density=density, scale=scale) @ vh
