"""An upper bound on what is left of a matrix once components are taken from it."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.deflated import Deflated, without
from svdmerge.core.products import Products
from svdmerge.core.svd import random_starts

# Random starts. The bound fails only if all of them are nearly orthogonal to one direction; sixteen
# columns cost a matrix product little more than eight.
STARTS = 16
# The 1e-9 quantile of the chi-squared distribution with STARTS degrees of freedom.
CHI_SQUARED = 0.5831
# Lanczos steps. On power-law spectra the bound is then 1.2 times what it bounds, with four 1.1.
STEPS = 3
# Points from the largest Ritz value to a multiple of it, at which the bound is looked for, twice:
# the second time between two of the first. It ends no more than 0.4 % above where it could, in t.
POINTS, REACH = 64, 16.0
# Of eps * ||A||_F: what rounding of the products may hide.
ROUNDING = 4.0


def remainder_bounds(
    a: Products, *, v: Float[Tensor, "*b n k"], rests: Sequence[float], fros: Sequence[float],
    seeds: Sequence[int],
) -> list[float]:  # fmt: skip
    """For each matrix of A, with probability 1 - 1e-9 no less than ||B||_2, B = A (I - V V^T), and
    so than any singular value of A after as many as V has columns (those that are zero do not
    count). `rests` are ||A||_F^2 less the squared values of V's components, `fros` ||A||_F.

    Let M = B^T B, v its leading eigenvector and x_i Gaussian columns drawn without regard to V.
    Any polynomial p has ||p(M) x_i|| >= |p(||M||)| |v^T x_i|, and the sum of (v^T x_i)^2 over
    the columns exceeds CHI_SQUARED but with probability 1e-9. The best p at a point is known from
    Lanczos coefficients: min ||p(M) x||^2 / p(t)^2 = ||x||^2 / sum_k p_k(t)^2, p_k orthonormal with
    regard to x (Christoffel's function). So ||M|| is no more than the largest t at which the sum of
    these minima still reaches CHI_SQUARED.

    Reference: random starts, Kuczynski, Wozniakowski 1992; Christoffel's function, Szego 1939,
    theorem 3.1.3. Deterministic, and taken where smaller: the Frobenius norm of the rest.
    """
    eps = torch.finfo(a.dtype).eps
    runs = _lanczos(Deflated(a, v), seeds=seeds)
    return [
        min(
            (max(rest, 0.0) + ROUNDING * eps * fro**2) ** 0.5,
            _largest(*run) ** 0.5 + ROUNDING * eps * fro,
        )
        for run, rest, fro in zip(runs, rests, fros, strict=True)
    ]


Array = np.ndarray
# Squared lengths of the starts, and the diagonals and off-diagonals of each one's own run.
Run = tuple[Float[Array, " b"], Float[Array, "k b"], Float[Array, "k b"]]


def _lanczos(b: Deflated, *, seeds: Sequence[int]) -> list[Run]:
    *batch, _, n = b.a.shape
    starts = random_starts(n, STARTS, seeds=seeds, device=b.v.device)
    x = without(starts.reshape(*batch, n, STARTS).to(b.v), b.v)
    lengths = torch.linalg.vector_norm(x, dim=-2, keepdim=True, dtype=torch.float64)
    x = x / lengths.to(x)
    before, beta = torch.zeros_like(x), torch.zeros_like(lengths).to(x)
    rows = [lengths**2]
    for _ in range(STEPS):
        y, z = b.step(x)
        alpha = torch.linalg.vector_norm(y, dim=-2, keepdim=True, dtype=torch.float64) ** 2
        # Again, for what rounding leaves along V would count once z is scaled up.
        z = without(z - (x * alpha.to(x) + before * beta), b.v)
        beta = torch.linalg.vector_norm(z, dim=-2, keepdim=True).clamp(
            min=torch.finfo(x.dtype).tiny
        )
        before, x = x, z / beta
        rows += [alpha, beta.double()]
    found = torch.cat(rows, dim=-2).reshape(len(seeds), len(rows), STARTS).cpu().numpy()
    return [(run[0], run[1::2], run[2::2]) for run in found]


def _largest(
    squares: Float[Array, " b"], diagonal: Float[Array, "k b"], off: Float[Array, "k b"]
) -> float:
    """A little above the largest t at which the minima add up to CHI_SQUARED."""
    # Beyond all zeros of the p_k the minima only fall; before, they may dip and rise again at the
    # very value that is looked for.
    tridiagonal = np.zeros((STARTS, STEPS, STEPS))
    for i in range(STEPS):
        tridiagonal[:, i, i] = diagonal[i]
    for i in range(STEPS - 1):
        tridiagonal[:, i, i + 1] = tridiagonal[:, i + 1, i] = off[i]
    low = float(np.linalg.eigvalsh(tridiagonal).max())
    high = max(low * REACH, torch.finfo(torch.float64).tiny)
    while _minima(np.array([high]), squares, diagonal, off)[0] >= CHI_SQUARED:
        high *= 2.0
    for _ in range(2):
        points = np.linspace(low, high, POINTS)
        past = int((_minima(points, squares, diagonal, off) >= CHI_SQUARED).sum())
        low, high = float(points[max(past - 1, 0)]), float(points[min(past, POINTS - 1)])
    return high


def _minima(
    t: Float[Array, " t"], squares: Float[Array, " b"], diagonal: Float[Array, "k b"],
    off: Float[Array, "k b"],
) -> Float[Array, " t"]:  # fmt: skip
    """sum_i ||x_i||^2 / sum_k p_k(t)^2 at each t, by the three-term recurrence."""
    p = np.ones((len(t), len(squares)))
    before, total, beta = np.zeros_like(p), np.ones_like(p), np.zeros_like(squares)
    for alpha, after in zip(diagonal, off, strict=True):
        before, p, beta = p, ((t[:, None] - alpha) * p - beta * before) / after, after
        total = total + p**2
    return (squares / total).sum(axis=1)
