"""Bootstrap intervals cover what they claim, and noise does not choose a model."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from svdmerge.core.evidence import bootstrap_interval, choose, standard_error, surely_better


def drawn(num: int, *, seed: int, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + torch.randn(num, generator=generator, dtype=torch.float64)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    intervals = [bootstrap_interval(drawn(40, seed=s, mean=0.3)) for s in range(200)]
    covered = sum(low <= 0.3 <= high for low, high in intervals)
    # Of 200 at 94 % (percentile intervals of 40 fall a little short): four deviations either way.
    assert 0.87 <= covered / 200 <= 0.995


def test_the_interval_of_many_is_that_of_the_normal_distribution() -> None:
    x = drawn(400, seed=1)
    low, high = bootstrap_interval(x)
    half = 1.96 * standard_error(x)
    assert low == pytest.approx(float(x.mean()) - half, abs=0.1 * half)
    assert high == pytest.approx(float(x.mean()) + half, abs=0.1 * half)


def test_the_interval_is_the_same_every_time_and_leaves_the_global_generator_alone() -> None:
    x = drawn(20, seed=2)
    torch.manual_seed(5)
    first = bootstrap_interval(x)
    after = torch.rand(1)
    torch.manual_seed(5)
    torch.testing.assert_close(torch.rand(1), after)
    assert bootstrap_interval(x) == first
    assert bootstrap_interval(x, seed=1) != first


def test_a_higher_level_gives_a_wider_interval() -> None:
    x = drawn(30, seed=3)
    (low, high), (lower, higher) = bootstrap_interval(x, level=0.5), bootstrap_interval(x)
    assert lower < low < high < higher


def test_equal_differences_give_an_interval_without_width() -> None:
    assert bootstrap_interval(torch.full((7,), 0.25)) == (0.25, 0.25)


def test_the_standard_error_is_that_of_the_sample() -> None:
    x = drawn(17, seed=4)
    assert standard_error(x) == pytest.approx(float(np.std(x.numpy(), ddof=1)) / math.sqrt(17))


def test_one_example_says_nothing_for_sure() -> None:
    assert standard_error(torch.ones(1)) == math.inf


def test_a_clearly_better_candidate_is_chosen() -> None:
    simple, rich = drawn(50, seed=5, mean=1.0), drawn(50, seed=6)
    assert choose([simple, rich]) == 1
    assert choose([rich, simple]) == 0


def test_within_noise_the_simpler_candidate_is_chosen() -> None:
    simple = drawn(50, seed=7)
    noise = drawn(50, seed=8)
    rich = simple - 1e-3 + (noise - noise.mean())
    assert choose([simple, rich]) == 0
    assert choose([simple, rich], standard_errors=0.0) == 1


def test_of_equals_the_simplest_is_chosen() -> None:
    x = drawn(10, seed=9)
    assert choose([x, x.clone(), x.clone()]) == 0


def test_by_one_example_nothing_richer_is_chosen() -> None:
    assert choose([torch.tensor([3.0]), torch.tensor([1.0])]) == 0


def test_of_many_useless_candidates_hardly_ever_one_is_sure() -> None:
    apart = together = 0
    for seed in range(60):
        useless = drawn(18 * 48, seed=seed).reshape(18, 48)
        apart += any(bootstrap_interval(x)[0] > 0 for x in useless)
        together += any(surely_better(useless))
    # Expected of 60: one in three, and one in forty.
    assert apart >= 12
    assert together <= 4


def test_a_clear_gain_among_many_useless_ones_is_sure() -> None:
    among = drawn(300 * 64, seed=1).reshape(300, 64)
    among[7] += 1.0
    assert [i for i, sure in enumerate(surely_better(among)) if sure] == [7]


def test_a_candidate_alone_is_sure_where_its_interval_is_above_zero() -> None:
    for seed in range(40):
        x = drawn(60, seed=seed, mean=0.25)
        low = bootstrap_interval(x)[0]
        if abs(low) > 0.04:  # the two resample apart, one over its own errors
            assert surely_better(x[None]) == [low > 0]


def test_gains_without_spread_are_sure_and_no_gain_or_a_single_example_is_not() -> None:
    x = torch.stack([torch.full((9,), 0.3), torch.zeros(9), torch.full((9,), -0.3)])
    assert surely_better(x) == [True, False, False]
    assert surely_better(x[:, :1]) == [False] * 3
    assert surely_better(torch.zeros(0, 5)) == []
