"""What losses of held-out examples say: intervals by bootstrap, and a choice that noise resists."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# Resamples: the ends of a 95 % interval then move by about a tenth of its width from run to run.
NUM_RESAMPLES = 2000
# Standard errors by which a richer candidate must beat a simpler one. The usual rule is 1 (Breiman
# et al. 1984, section 3.4.3); of 0.5, 1 and 2, 0.5 lost nothing on two targets of 16 and 48
# examples.
STANDARD_ERRORS = 0.5


def bootstrap_interval(
    differences: Float[Tensor, " b"], *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of the mean of b paired differences, in their unit.

    Reference: Efron, Tibshirani 1993, chapter 13.
    """
    x = differences.to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(x), (NUM_RESAMPLES, len(x)), generator=generator)
    means = x[drawn].mean(dim=1)
    tail = (1.0 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1.0 - tail], dtype=torch.float64))
    return float(low), float(high)


def surely_better(
    differences: Float[Tensor, "c b"], *, level: float = 0.95, seed: int = 0
) -> list[bool]:
    """Which of c candidates' mean differences on the same b examples are above zero for sure.

    The claims hold together: of eighteen useless candidates, one has an interval of its own above
    zero in every third draw. Each t-statistic must exceed what the largest of all c is in
    resamples of centred differences, each over its own standard error: the largest of many is
    where that was underestimated.

    Reference: White 2000 (reality check); Romano, Wolf 2005, with their first step alone.
    """
    x = differences.to(torch.float64)
    if x.shape[1] < 2 or not len(x):
        return [False] * len(x)
    mean, error = x.mean(dim=1), x.std(dim=1) / x.shape[1] ** 0.5
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(x.shape[1], (NUM_RESAMPLES, x.shape[1]), generator=generator)
    # How often each example was drawn: one product then serves all candidates.
    counts = torch.zeros(NUM_RESAMPLES, x.shape[1], dtype=x.dtype)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    # Rounding has no spread to be judged by: what is equal on all examples is known as it is.
    tiny = torch.finfo(x.dtype).eps * x.abs().amax(dim=1)
    spread = error > tiny
    if not bool(spread.any()):
        return (mean > 0).tolist()
    centred = (x - mean[:, None])[spread]
    means = counts @ centred.T / x.shape[1]
    variances = counts @ centred.T.square() / x.shape[1] - means.square()
    errors = (variances / (x.shape[1] - 1)).clamp(min=0.0).sqrt()
    # A resample of one example over and over has no error, and no say.
    t = torch.where(errors > tiny[spread], means / errors, 0.0)
    cut = torch.quantile(t.amax(dim=1), 0.5 + level / 2)
    return torch.where(spread, mean > cut * error, mean > 0).tolist()


def standard_error(differences: Float[Tensor, " b"]) -> float:
    """The standard error of the mean of b paired differences; infinite for fewer than two."""
    if len(differences) < 2:
        return float("inf")
    return float(differences.double().std(unbiased=True)) / len(differences) ** 0.5


def choose(
    losses: Sequence[Float[Tensor, " b"]], *, standard_errors: float = STANDARD_ERRORS
) -> int:
    """The candidate to take of several, simplest first, by losses on the same b examples.

    The one of least mean loss, unless a simpler one lies within `standard_errors` of the paired
    difference's standard error: then the simplest such.
    """
    means = [float(x.double().mean()) for x in losses]
    best = min(range(len(losses)), key=lambda i: (means[i], i))
    for i in range(best):
        gap = losses[i].double() - losses[best].double()
        if means[i] - means[best] <= standard_errors * standard_error(gap):
            return i
    return best
