"""Distances of feature sets, against loops, closed forms and planted answers."""

import math

import pytest
import torch

from svdmerge.core.image_quality import frechet_distance, kernel_distance, precision_recall
from svdmerge.errors import TrainingError


def normal(num: int, *, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(num, 4, generator=generator) + shift


def test_the_kernel_distance_is_the_sum_over_pairs_of_its_definition() -> None:
    x, y = normal(5, seed=0).double(), normal(7, seed=1, shift=0.5).double()

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return (float(a @ b) / 4 + 1) ** 3

    within_x = [k(x[i], x[j]) for i in range(5) for j in range(5) if i != j]
    within_y = [k(y[i], y[j]) for i in range(7) for j in range(7) if i != j]
    between = [k(a, b) for a in x for b in y]
    wanted = sum(within_x) / 20 + sum(within_y) / 42 - 2 * sum(between) / 35
    assert kernel_distance(x.float(), y.float()) == pytest.approx(wanted, rel=1e-4)


def test_the_kernel_distance_of_one_distribution_scatters_around_zero() -> None:
    found = [kernel_distance(normal(40, seed=2 * i), normal(40, seed=2 * i + 1)) for i in range(40)]
    mean = sum(found) / 40
    error = math.sqrt(sum((f - mean) ** 2 for f in found) / 39 / 40)
    assert min(found) < 0 < max(found)
    assert abs(mean) < 3 * error
    assert kernel_distance(normal(40, seed=0), normal(40, seed=1, shift=1.0)) > max(found)


def test_the_frechet_distance_of_scaled_and_shifted_copies_is_the_closed_form() -> None:
    # Copies share their eigenvectors: |shift|^2 + sum over axes of (standard deviations' gap)^2.
    x = normal(200, seed=3).double()
    y = 2.0 * x + 3.0
    wanted = float((y.mean(0) - x.mean(0)).square().sum() + torch.cov(x.T).trace())
    assert frechet_distance(x.float(), y.float()) == pytest.approx(wanted, rel=1e-5)


def test_the_frechet_distance_is_zero_for_the_same_features_even_of_deficient_rank() -> None:
    x = normal(3, seed=4)  # rank 2 in 4 dimensions
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-6)


def test_precision_and_recall_see_what_is_missing_and_what_is_wrong() -> None:
    real = torch.cat([normal(50, seed=5), normal(50, seed=6, shift=100.0)])
    one_mode = normal(50, seed=7)
    found = precision_recall(real, one_mode)
    assert found.precision > 0.7  # what is made looks real
    assert 0.3 < found.recall < 0.5  # half of what is real is never made
    turned = precision_recall(one_mode, real)
    assert (turned.precision, turned.recall) == (found.recall, found.precision)


def test_identical_sets_have_full_precision_and_recall() -> None:
    x = normal(20, seed=8)
    found = precision_recall(x, x)
    assert (found.precision, found.recall) == (1.0, 1.0)


def test_too_few_images_are_an_error() -> None:
    with pytest.raises(TrainingError, match="3 generated images"):
        precision_recall(normal(9, seed=0), normal(3, seed=1))
