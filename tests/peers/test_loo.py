"""Weights of sources from leave-one-out errors."""

import math

import pytest
import torch

from svdmerge.errors import TrainingError
from svdmerge.peers.loo import loo_weights


def test_weights_are_the_formula_and_sum_to_one() -> None:
    press = torch.tensor([0.2, 0.21, 0.25], dtype=torch.float64)
    found = loo_weights(press, num_examples=16, num_classes=2)
    raw = [math.exp(-(16 * 2 / 8) * p / 0.2) for p in press.tolist()]
    expected = torch.tensor([r / sum(raw) for r in raw], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_the_errors_unit_cancels_and_many_examples_pick_one_source() -> None:
    press = torch.tensor([3.0, 2.0, 2.1])
    few = loo_weights(press, num_examples=4, num_classes=2)
    torch.testing.assert_close(few, loo_weights(100 * press, num_examples=4, num_classes=2))
    many = loo_weights(press, num_examples=3000, num_classes=150)
    torch.testing.assert_close(many, torch.tensor([0.0, 1.0, 0.0]))


def test_perfect_sources_share_all_the_weight() -> None:
    found = loo_weights(torch.tensor([0.0, 1.0, 0.0]), num_examples=4, num_classes=2)
    torch.testing.assert_close(found, torch.tensor([0.5, 0.0, 0.5]))


@pytest.mark.parametrize("press", [[], [0.1, math.nan], [math.inf], [-0.1, 0.2]])
def test_errors_that_are_none_are_refused(press: list[float]) -> None:
    with pytest.raises(TrainingError, match="leave-one-out errors"):
        loo_weights(torch.tensor(press), num_examples=4, num_classes=2)
