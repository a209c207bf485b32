"""How well frozen features serve a target: a ridge head in closed form, judged by leave-one-out."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from svdmerge.errors import TrainingError

# Penalties tried, in units of the features' mean squared singular value: from nearly plain least
# squares (1e-6 still leaves float64 six digits more) to a head that is nearly the class means.
PENALTIES = tuple(10.0 ** (e / 3) for e in range(-18, 7))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearHead:
    """Scores of y classes: features weight^T + bias."""

    weight: Float[Tensor, "y d"]
    bias: Float[Tensor, " y"]

    def scores(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b y"]:
        """A score for each example and class, in the head's dtype."""
        return features.to(self.weight.dtype) @ self.weight.T + self.bias

    def accuracy(self, features: Float[Tensor, "b d"], *, labels: Int[Tensor, " b"]) -> float:
        """Share of examples whose best score is their class's."""
        return float((self.scores(features).argmax(dim=1) == labels).double().mean())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RidgeFit:
    """A ridge head, the penalty leave-one-out chose, and what each example scored when left out."""

    head: LinearHead
    penalty: float
    left_out: Float[Tensor, "b y"]
    """Scores of each example by the head fitted without it."""
    loo_error: Float[Tensor, " b"]
    """Mean over classes of its squared error when left out; 1/y - 1/y^2 is what guessing gets."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Spectrum:
    """The thin SVD of centred features, and the targets seen through it."""

    p: Float[Tensor, "b j"]
    s: Float[Tensor, " j"]
    qh: Float[Tensor, "j d"]
    targets: Float[Tensor, "b y"]
    inside: Float[Tensor, "j y"]


def ridge(
    features: Float[Tensor, "b d"], *, labels: Int[Tensor, " b"], num_classes: int
) -> RidgeFit:
    """The ridge regression of one-hot classes on features, intercept unpenalised, in float64.

    Of the penalties on a grid the one with the least leave-one-out error (PRESS) is taken; the
    larger one on a tie. One SVD serves all penalties, for b < d as for b > d.

    Raises:
        TrainingError: fewer than two examples, or features that are not finite.

    Reference: Allen 1974 (PRESS); Golub, Heath, Wahba 1979, section 2 (ridge by the SVD).
    """
    check_features(features)
    x = features.to(torch.float64)
    one_hot = torch.nn.functional.one_hot(labels.long(), num_classes).to(torch.float64)
    spectrum = _decompose(x, targets=one_hot - one_hot.mean(dim=0))
    unit = float((spectrum.s**2).mean()) if len(spectrum.s) else 1.0
    # From the largest down with `<`: on a tie the stronger penalty stays.
    penalty, residuals = unit * PENALTIES[-1], None
    for factor in reversed(PENALTIES):
        tried = _left_out_residuals(spectrum, penalty=unit * factor)
        if residuals is None or float(tried.square().mean()) < float(residuals.square().mean()):
            penalty, residuals = unit * factor, tried
    assert residuals is not None
    shrunk = (spectrum.s / (spectrum.s**2 + penalty))[:, None] * spectrum.inside
    weight = (spectrum.qh.T @ shrunk).T
    bias = one_hot.mean(dim=0) - weight @ x.mean(dim=0)
    left_out = one_hot - residuals
    return RidgeFit(
        head=LinearHead(weight=weight, bias=bias),
        penalty=penalty,
        left_out=left_out,
        loo_error=residuals.square().mean(dim=1),
    )


def check_features(features: Float[Tensor, "b d"]) -> None:
    """Raise TrainingError for fewer than two examples, or features that are not finite."""
    if features.shape[0] < 2:
        raise TrainingError(
            f"{features.shape[0]} training examples",
            "Leave-one-out needs at least two.",
            "Give more examples.",
        )
    if not bool(torch.isfinite(features).all()):
        raise TrainingError(
            "the features hold NaN or Inf", "The model overflowed on some example.", "Check it."
        )


def _decompose(x: Float[Tensor, "b d"], *, targets: Float[Tensor, "b y"]) -> _Spectrum:
    p, s, qh = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    # Centring leaves one direction that is rounding alone where b <= d; it must not count.
    floor = s[0] * torch.finfo(s.dtype).eps * max(x.shape) if len(s) else 0.0
    rank = int((s > floor).sum())
    p, s, qh = p[:, :rank], s[:rank], qh[:rank]
    return _Spectrum(p=p, s=s, qh=qh, targets=targets, inside=p.T @ targets)


def _left_out_residuals(x: _Spectrum, *, penalty: float) -> Float[Tensor, "b y"]:
    """Each example's error by the fit without it: residual_i / (1 - h_i), exact, no refit.

    The hat matrix is H = 11^T/b + P diag(s^2/(s^2 + penalty)) P^T, the first term being the
    intercept. 1 - h_i is summed from what each direction leaves, penalty/(s^2 + penalty), and not
    by subtraction from 1, which would cancel for small penalties.
    """
    left = penalty / (x.s**2 + penalty)
    squares = x.p.square()
    outside = (1.0 - 1.0 / x.p.shape[0] - squares.sum(dim=1)).clamp(min=0.0)
    leverage_left = outside + squares @ left
    residual = x.targets - x.p @ ((1.0 - left)[:, None] * x.inside)
    # An example that alone spans a direction has 1 - h_i = 0 up to rounding and no defined error.
    return residual / leverage_left.clamp(min=torch.finfo(residual.dtype).eps)[:, None]
