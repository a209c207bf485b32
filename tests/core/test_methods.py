from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svdmerge.core.components import RankOneComponents, none
from svdmerge.core.methods.average import average
from svdmerge.core.methods.axis import axis
from svdmerge.core.methods.merging import FROM_COMPONENTS, FROM_DIFFERENCES
from svdmerge.core.methods.registry import METHODS
from svdmerge.core.params import Action
from svdmerge.core.svd import exact
from svdmerge.recipe import Recipe


def deltas(num: int, *shape: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(num)]


def test_every_method_of_the_recipe_is_described_and_computed() -> None:
    assert set(METHODS) == set(get_args(Recipe.model_fields["merge_method"].annotation))
    by_components = {name for name, m in METHODS.items() if m.matrices is Action.DECOMPOSE}
    assert set(FROM_COMPONENTS) == by_components
    assert set(FROM_DIFFERENCES) == set(METHODS) - by_components


# --- axis ---


@settings(max_examples=40)
@given(
    weights=st.lists(st.floats(0.01, 10.0), min_size=1, max_size=4),
    scale=st.floats(0.01, 10.0),
    k=st.integers(1, 6),
)
def test_axis_is_the_weighted_and_scaled_sum_of_what_is_kept(
    weights: list[float], scale: float, k: int
) -> None:
    parts = [exact(d).slice(0, k) for d in deltas(len(weights), 9, 6)]
    merged = axis(parts, weights=weights, scale=scale).dense()
    expected = sum(scale * w * p.dense() for w, p in zip(weights, parts, strict=True))
    assert isinstance(expected, torch.Tensor)
    size = float(torch.linalg.matrix_norm(expected))
    assert float(torch.linalg.matrix_norm(merged - expected)) <= 1e-12 * size


def test_axis_of_one_whole_source_is_that_source() -> None:
    (d,) = deltas(1, 9, 6)
    merged = axis([exact(d)], weights=[1.0], scale=1.0)
    assert torch.allclose(merged.dense(), d, rtol=0, atol=1e-13)
    assert torch.allclose(merged.s, exact(d).s, rtol=1e-13, atol=0)


def test_axis_takes_stored_float32_and_gives_float64_factors() -> None:
    parts = [exact(d).slice(0, 2).to(torch.float32) for d in deltas(3, 9, 6)]
    merged = axis(parts, weights=[1.0, 1.0, 1.0], scale=1.0)
    assert merged.u.dtype == merged.s.dtype == merged.vh.dtype == torch.float64
    total = sum(p.to(torch.float64).dense() for p in parts)
    assert isinstance(total, torch.Tensor)
    assert torch.allclose(merged.dense(), total, rtol=0, atol=1e-12)


def test_a_source_of_which_nothing_is_kept_adds_nothing() -> None:
    (d,) = deltas(1, 9, 6)
    kept = exact(d).slice(0, 3)
    alone = axis([kept], weights=[2.0], scale=1.0)
    beside = axis([none(9, 6), kept, none(9, 6)], weights=[5.0, 2.0, 1.0], scale=1.0)
    assert torch.allclose(alone.dense(), beside.dense(), rtol=0, atol=1e-14)


def test_nothing_kept_at_all_is_no_difference() -> None:
    assert len(axis([none(9, 6)], weights=[1.0], scale=1.0)) == 0


def test_a_weight_too_many_or_too_few_is_an_error() -> None:
    parts = [exact(d) for d in deltas(2, 4, 4)]
    for weights in ([1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="zip"):
            axis(parts, weights=weights, scale=1.0)


def test_axis_leaves_its_inputs_alone() -> None:
    part = exact(deltas(1, 5, 4)[0])
    before = RankOneComponents(u=part.u.clone(), s=part.s.clone(), vh=part.vh.clone())
    axis([part, part], weights=[2.0, 3.0], scale=0.5)
    assert torch.equal(part.u, before.u)
    assert torch.equal(part.s, before.s)
    assert torch.equal(part.vh, before.vh)


# --- average ---


@given(
    weights=st.lists(st.floats(0.01, 10.0), min_size=1, max_size=6),
    scale=st.floats(0.01, 10.0),
    seed=st.integers(0, 1000),
)
def test_average_is_the_weighted_mean_added_in_the_order_given(
    weights: list[float], scale: float, seed: int
) -> None:
    parts = deltas(len(weights), 1, 7, seed=seed)
    got = average(zip(parts, weights, strict=True), num_sources=len(parts), scale=scale)
    total = torch.zeros(1, 7, dtype=torch.float64)
    for part, weight in zip(parts, weights, strict=True):
        total = total + weight * part
    assert torch.equal(got, total * (scale / len(parts)))


def test_the_order_given_is_the_order_added() -> None:
    one, tiny = torch.tensor([[1.0]]), torch.tensor([[2.0**-53]])
    ascending = average([(tiny, 1.0), (tiny, 1.0), (one, 1.0)], num_sources=1, scale=1.0)
    descending = average([(one, 1.0), (tiny, 1.0), (tiny, 1.0)], num_sources=1, scale=1.0)
    assert ascending.item() == 1.0 + 2.0**-52
    assert descending.item() == 1.0


def test_sources_that_are_not_there_count_as_zeros() -> None:
    (d,) = deltas(1, 1, 7)
    assert torch.equal(average([(d, 1.0)], num_sources=4, scale=1.0), d / 4)


def test_half_precision_is_averaged_in_float64() -> None:
    parts = [(torch.full((1, 3), 0.1, dtype=torch.bfloat16), 1.0)] * 300
    got = average(parts, num_sources=300, scale=1.0)
    assert got.dtype == torch.float64
    assert torch.allclose(got, parts[0][0].double(), rtol=1e-13, atol=0)


def test_sources_are_taken_one_at_a_time_and_left_as_they_were() -> None:
    kept = deltas(3, 1, 5)
    before = [d.clone() for d in kept]
    alive: list[int] = []

    def stream() -> Iterator[tuple[torch.Tensor, float]]:
        for i, d in enumerate(kept):
            alive.append(i)
            yield d, 1.0

    average(stream(), num_sources=3, scale=2.0)
    assert alive == [0, 1, 2]
    assert all(torch.equal(d, b) for d, b in zip(kept, before, strict=True))


def test_an_average_of_no_sources_is_an_error() -> None:
    with pytest.raises(ValueError, match="no sources"):
        average([], num_sources=0, scale=1.0)
