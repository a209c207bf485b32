"""The closed-form discriminant head against explicit refits and an independent formula."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from svdmerge.core.discriminant import (
    MIXED_SHRINKAGES,
    MIXED_TEMPERATURES,
    SHRINKAGES,
    DiscriminantFit,
    discriminant,
)
from svdmerge.errors import TrainingError


def problem(*, num: int, dim: int, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % num_classes
    centres = torch.randn(num_classes, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(num, dim, generator=generator, dtype=torch.float64)
    return centres[labels] + noise, labels


def scores(
    x: np.ndarray, y: np.ndarray, at: np.ndarray, *, rho: float, size: int, num_classes: int
) -> np.ndarray:
    """x^T A^-1 mu - mu^T A^-1 mu / 2 with a dense inverse; `size` divides the scatter."""
    means = np.stack([x[y == c].mean(axis=0) for c in range(num_classes)])
    r = x - means[y]
    inverse = np.linalg.inv(r.T @ r / size + rho * np.eye(x.shape[1]))
    return at @ inverse @ means.T - np.einsum("yd,de,ye->y", means, inverse, means) / 2


def within(x: np.ndarray, y: np.ndarray, num_classes: int) -> float:
    r = x - np.stack([x[y == c].mean(axis=0) for c in range(num_classes)])[y]
    return float((r**2).sum() / len(x) / x.shape[1])


@pytest.mark.parametrize(("num", "dim"), [(24, 5), (15, 40)])
def test_left_out_scores_are_those_of_explicit_refits(num: int, dim: int) -> None:
    x, y = problem(num=num, dim=dim, num_classes=3, seed=1)
    fit = discriminant(x, labels=y, num_classes=3)
    centred, labels = (x - x.mean(dim=0)).numpy(), y.numpy()
    rho = fit.shrinkage * within(centred, labels, 3)
    refitted = np.stack(
        [
            scores(
                np.delete(centred, i, 0), np.delete(labels, i), centred[i : i + 1],
                rho=rho, size=num, num_classes=3,
            )[0]
            for i in range(num)
        ]
    )  # fmt: skip
    prior = np.log(np.bincount(labels) / num)
    # One temperature for all: what is left after the prior is a multiple of the refitted scores.
    ratio = (fit.left_out.numpy() - prior) / refitted
    np.testing.assert_allclose(ratio, np.full_like(ratio, np.median(ratio)), rtol=1e-7)


def test_the_head_scores_as_the_formula() -> None:
    x, y = problem(num=30, dim=6, num_classes=3, seed=2)
    fit = discriminant(x, labels=y, num_classes=3)
    rho = fit.shrinkage * within(x.numpy(), y.numpy(), 3)
    raw = scores(x.numpy(), y.numpy(), x.numpy(), rho=rho, size=30, num_classes=3)
    found = fit.head.scores(x).numpy()
    # Up to one temperature and what is the same for all classes.
    found, raw = found - found.mean(axis=1)[:, None], raw - raw.mean(axis=1)[:, None]
    slope = (found * raw).sum() / (raw**2).sum()
    assert slope > 0
    # The formula above is not centred: differences of classes do not depend on that but for a
    # constant per class, which balanced classes share with the prior.
    shift = (found - slope * raw).mean(axis=0)
    np.testing.assert_allclose(found - slope * raw, np.tile(shift, (30, 1)), atol=1e-8)


def test_with_two_equal_classes_its_direction_is_that_of_ridge_regression() -> None:
    x, y = problem(num=40, dim=8, num_classes=2, seed=3)
    fit = discriminant(x, labels=y, num_classes=2)
    found = (fit.head.weight[1] - fit.head.weight[0]).numpy()
    centred, target = (x - x.mean(dim=0)).numpy(), y.numpy() - 0.5
    penalty = 40 * fit.shrinkage * within(centred, y.numpy(), 2)
    ridge = np.linalg.solve(centred.T @ centred + penalty * np.eye(8), centred.T @ target)
    cosine = found @ ridge / np.linalg.norm(found) / np.linalg.norm(ridge)
    assert cosine == pytest.approx(1.0, abs=1e-12)


def test_scores_are_calibrated_and_better_than_guessing_on_separable_classes() -> None:
    x, y = problem(num=60, dim=10, num_classes=4, seed=4)
    fit = discriminant(10 * x, labels=y, num_classes=4)
    assert float(torch.nn.functional.cross_entropy(fit.left_out, y)) < 0.5 * math.log(4)
    assert fit.shrinkage in SHRINKAGES
    assert fit.head.accuracy(10 * x, labels=y) > 0.9


@pytest.mark.parametrize("num", [16, 200])
def test_losses_order_features_by_how_far_apart_classes_lie(num: int) -> None:
    generator = torch.Generator().manual_seed(10)
    y = torch.arange(num) % 2
    noise = torch.randn(num, 12, generator=generator, dtype=torch.float64)
    side = (2.0 * y - 1.0)[:, None] * torch.ones(12, dtype=torch.float64)
    fits = [discriminant(a * side + noise, labels=y, num_classes=2) for a in (0.0, 0.3, 1.0)]
    losses = [float(fit.log_loss.mean()) for fit in fits]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * math.log(2) < losses[0]


def test_the_loss_is_that_of_the_mean_prediction_over_settings() -> None:
    x, y = problem(num=18, dim=5, num_classes=3, seed=9)
    centred, labels = (x - x.mean(dim=0)).numpy(), y.numpy()
    unit, predicted = within(centred, labels, 3), []
    for shrinkage in MIXED_SHRINKAGES:
        raw = np.stack(
            [
                scores(
                    np.delete(centred, i, 0), np.delete(labels, i), centred[i : i + 1],
                    rho=shrinkage * unit, size=18, num_classes=3,
                )[0]
                for i in range(18)
            ]
        )  # fmt: skip
        for t in MIXED_TEMPERATURES:
            odds = np.exp(t * (raw - raw.max(axis=1)[:, None]))
            predicted.append((odds / odds.sum(axis=1)[:, None])[np.arange(18), labels])
    found = discriminant(x, labels=y, num_classes=3).log_loss
    np.testing.assert_allclose(found, -np.log(np.mean(predicted, axis=0)), rtol=1e-7)


def test_pure_noise_scores_about_as_guessing() -> None:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(60, 20, generator=generator), torch.arange(60) % 3
    fit = discriminant(x, labels=y, num_classes=3)
    assert float(fit.log_loss.mean()) == pytest.approx(math.log(3), abs=0.1)


def test_the_only_example_of_a_class_counts_as_a_guess() -> None:
    x, y = problem(num=20, dim=4, num_classes=2, seed=6)
    y[0] = 2
    fit = discriminant(x, labels=y, num_classes=3)
    assert float(fit.log_loss[0]) == pytest.approx(math.log(3))


def test_one_example_a_class_gives_the_nearest_mean() -> None:
    x, y = torch.eye(3, dtype=torch.float64), torch.arange(3)
    fit = discriminant(x, labels=y, num_classes=3)
    assert fit.head.accuracy(x, labels=y) == 1.0
    assert bool(torch.isfinite(fit.head.weight).all())


def test_the_scale_and_place_of_features_do_not_matter() -> None:
    x, y = problem(num=30, dim=12, num_classes=3, seed=7)
    first, second = (discriminant(z, labels=y, num_classes=3) for z in (x, 100 * x + 7))
    np.testing.assert_allclose(first.log_loss, second.log_loss, rtol=1e-6, atol=1e-9)


def test_features_that_are_not_finite_are_refused() -> None:
    x, y = problem(num=6, dim=3, num_classes=2, seed=8)
    x[2, 1] = float("nan")
    with pytest.raises(TrainingError, match="NaN or Inf"):
        discriminant(x, labels=y, num_classes=2)


def test_constant_features_give_a_guess() -> None:
    y = torch.arange(8) % 2
    fit: DiscriminantFit = discriminant(torch.ones(8, 4), labels=y, num_classes=2)
    assert float(fit.log_loss.mean()) == pytest.approx(math.log(2), abs=1e-6)
