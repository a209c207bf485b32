"""An upper bound on what is left of a matrix once components are taken from it."""

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.components import RankOneComponents
from svdmerge.core.deflated import Deflated, without
from svdmerge.core.products import Products

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


def remainder_bound(a: Products, *, known: RankOneComponents, fro: float, seed: int) -> float:
    """With probability 1 - 1e-9 no less than ||B||_2, B = A (I - V V^T), V of those known, and so
    than any singular value of A after theirs.

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
    rest = fro**2 - float((known.s.double() ** 2).sum())
    frobenius = (max(rest, 0.0) + ROUNDING * eps * fro**2) ** 0.5
    if fro == 0.0 or min(a.shape) <= len(known):
        return 0.0
    lanczos = _lanczos(Deflated(a, known.vh.T), seed=seed)
    return min(frobenius, _largest(*lanczos) ** 0.5 + ROUNDING * eps * fro)


def _lanczos(
    b: Deflated, *, seed: int
) -> tuple[Float[Tensor, " b"], Float[Tensor, "k b"], Float[Tensor, "k b"]]:
    """Squared lengths of the starts, and the diagonals and off-diagonals of each one's own run."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(b.a.shape[1], STARTS, generator=generator)
    x = without(start.to(b.v), b.v)
    lengths = torch.linalg.vector_norm(x.double(), dim=0)
    x /= lengths.to(x)
    before, beta = torch.zeros_like(x), x.new_zeros(STARTS)
    diagonal, off = list[Tensor](), list[Tensor]()
    for _ in range(STEPS):
        y, z = b.step(x)
        alpha = (y.double() ** 2).sum(dim=0)
        # Again, for what rounding leaves along V would count once z is scaled up.
        z = without(z - (x * alpha.to(x) + before * beta), b.v)
        beta = torch.linalg.vector_norm(z, dim=0).clamp(min=torch.finfo(x.dtype).tiny)
        before, x = x, z / beta
        diagonal.append(alpha)
        off.append(beta.double())
    return lengths**2, torch.stack(diagonal), torch.stack(off)


def _largest(
    squares: Float[Tensor, " b"], diagonal: Float[Tensor, "k b"], off: Float[Tensor, "k b"]
) -> float:
    """A little above the largest t at which the minima add up to CHI_SQUARED."""
    # Beyond all zeros of the p_k the minima only fall; before, they may dip and rise again at the
    # very value that is looked for.
    tridiagonal = torch.diag_embed(diagonal.T)
    for i, beta in enumerate(off[:-1]):
        tridiagonal[:, i, i + 1] = tridiagonal[:, i + 1, i] = beta
    low = float(torch.linalg.eigvalsh(tridiagonal).max())
    high = max(low * REACH, torch.finfo(torch.float32).tiny)
    while float(_minima(diagonal.new_tensor([high]), squares, diagonal, off)) >= CHI_SQUARED:
        high *= 2.0
    for _ in range(2):
        points = torch.linspace(low, high, POINTS, dtype=diagonal.dtype, device=diagonal.device)
        past = int((_minima(points, squares, diagonal, off) >= CHI_SQUARED).sum())
        low, high = float(points[max(past - 1, 0)]), float(points[min(past, POINTS - 1)])
    return high


def _minima(
    t: Float[Tensor, " t"], squares: Float[Tensor, " b"], diagonal: Float[Tensor, "k b"],
    off: Float[Tensor, "k b"],
) -> Float[Tensor, " t"]:  # fmt: skip
    """sum_i ||x_i||^2 / sum_k p_k(t)^2 at each t, by the three-term recurrence."""
    p = torch.ones(len(t), len(squares), dtype=t.dtype, device=t.device)
    before, total, beta = torch.zeros_like(p), torch.ones_like(p), torch.zeros_like(squares)
    for alpha, after in zip(diagonal, off, strict=True):
        before, p, beta = p, ((t[:, None] - alpha) * p - beta * before) / after, after
        total = total + p**2
    return (squares / total).sum(dim=1)
