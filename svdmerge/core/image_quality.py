"""How near generated images are to real ones, from features (n, d) of both.

Which network made the features is part of every figure's name: the distances that papers call FID
and KID are those of one Inception network, and mean nothing beside another's.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.errors import TrainingError


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionRecall:
    """How many generated images look real, and how many real ones are within what is generated."""

    precision: float
    recall: float


def kernel_distance(real: Float[Tensor, "m d"], made: Float[Tensor, "n d"]) -> float:
    """The unbiased squared MMD of the cubic kernel (x y / d + 1)^3: about 0 for one distribution.

    Unbiased, so it can fall below zero, and means the same for few images as for many.

    Raises:
        TrainingError: fewer than two images on a side.

    Reference: arXiv 1801.01401, section 4.
    """
    _check(real, made, least=2)
    x, y = real.double(), made.double()
    return float(_mean_off_diagonal(x) + _mean_off_diagonal(y) - 2.0 * _kernel(x, y).mean())


def _kernel(x: Float[Tensor, "m d"], y: Float[Tensor, "n d"]) -> Float[Tensor, "m n"]:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _mean_off_diagonal(x: Float[Tensor, "m d"]) -> Tensor:
    values, num = _kernel(x, x), len(x)
    return (values.sum() - values.diagonal().sum()) / (num * (num - 1))


def frechet_distance(real: Float[Tensor, "m d"], made: Float[Tensor, "n d"]) -> float:
    """The squared 2-Wasserstein distance of normal distributions with the features' moments.

    |mean difference|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2); by symmetric eigenvalues, which stay
    real where a general matrix root of A B picks up imaginary rounding. Biased upwards for few
    images: compare at equal numbers.

    Raises:
        TrainingError: fewer than two images on a side.

    Reference: arXiv 1706.08500, equation 6.
    """
    _check(real, made, least=2)
    x, y = real.double(), made.double()
    a, b = torch.cov(x.T).reshape(x.shape[1], -1), torch.cov(y.T).reshape(y.shape[1], -1)
    values, vectors = torch.linalg.eigh(a)
    root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0.0).sqrt().sum()
    gap = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    return float(gap + a.trace() + b.trace() - 2.0 * cross)


def precision_recall(
    real: Float[Tensor, "m d"], made: Float[Tensor, "n d"], *, neighbours: int = 3
) -> PrecisionRecall:
    """Shares of each side within the other's support, balls that reach to the k-th neighbour.

    Raises:
        TrainingError: no more images on a side than `neighbours`.

    Reference: arXiv 1904.06991, section 2 (k = 3).
    """
    _check(real, made, least=neighbours + 1)
    x, y = real.double(), made.double()
    between = torch.cdist(x, y)
    precision = (between <= _radii(x, neighbours)[:, None]).any(dim=0)
    recall = (between <= _radii(y, neighbours)[None, :]).any(dim=1)
    return PrecisionRecall(
        precision=float(precision.double().mean()), recall=float(recall.double().mean())
    )


def _radii(x: Float[Tensor, "n d"], neighbours: int) -> Float[Tensor, " n"]:
    """Each point's distance to its k-th nearest other; the nearest of all is itself, at 0."""
    # Without the shortcut through inner products, which leaves 1e-8 where 0 is meant.
    exact = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return exact.kthvalue(neighbours + 1, dim=1).values


def _check(real: Tensor, made: Tensor, *, least: int) -> None:
    for name, features in (("real", real), ("generated", made)):
        if len(features) < least:
            raise TrainingError(
                f"image quality: {len(features)} {name} images",
                f"At least {least} are needed.",
                "Give more.",
            )
