"""Where noise ends and a change begins."""

import pytest
import torch
from spectra import planted
from torch import Tensor

from svdmerge.core.components import none
from svdmerge.core.noise import noise_edge
from svdmerge.core.svd import exact

SHAPES = [(120, 120), (400, 100), (100, 400), (60, 40)]


def gaussian(m: int, n: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator, dtype=torch.float64)


def above(delta: Tensor) -> int:
    """Components above the edge, as far as the first block is known."""
    found = exact(delta)
    return int((found.s > noise_edge(delta, leading=found.slice(0, 16))).sum())


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_noise_alone_ends_just_below_its_edge(m: int, n: int) -> None:
    for seed in range(5):
        delta = gaussian(m, n, seed=seed)
        edge = noise_edge(delta, leading=none(m, n))
        largest = float(torch.linalg.matrix_norm(delta, 2))
        # A quantile of few norms lies further out.
        assert 1.0 <= edge / largest <= 1.1 + 1.2 / min(m, n) ** 0.5


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_a_change_above_the_noise_is_kept_whole_and_nothing_more(rank: int) -> None:
    noise = gaussian(240, 200, seed=0)
    signal = planted(torch.linspace(200.0, 60.0, rank), m=240, n=200, seed=3).matrix
    assert above(noise + signal) == rank


def test_rounding_to_bfloat16_is_noise() -> None:
    """Its size follows the weights': not of one size."""
    weights = gaussian(300, 200, seed=1) * torch.linspace(0.5, 2.0, 200)
    change = planted(torch.linspace(8.0, 4.0, 6), m=300, n=200, seed=2).matrix
    rounded = (weights + change).bfloat16().double() - weights
    assert above(rounded) == 6
    assert above(weights.bfloat16().double() - weights) == 0


def test_a_power_law_without_noise_keeps_what_any_budget_takes_of_one_of_several() -> None:
    delta = planted(torch.arange(1, 401, dtype=torch.float64) ** -0.7, m=400, n=400).matrix
    assert above(delta) >= 30


def test_the_edge_scales_with_the_difference_and_turns_with_it() -> None:
    delta = gaussian(90, 70, seed=4)
    edge = noise_edge(delta, leading=none(90, 70))
    assert noise_edge(1e-6 * delta, leading=none(90, 70)) == pytest.approx(1e-6 * edge)
    assert noise_edge(delta.T, leading=none(70, 90)) == pytest.approx(edge)


def test_nothing_has_no_noise() -> None:
    assert noise_edge(torch.zeros(9, 7), leading=none(9, 7)) == 0.0
    assert noise_edge(torch.zeros(0, 7), leading=none(0, 7)) == 0.0
