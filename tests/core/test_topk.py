from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdmerge.core.topk import top_k


@dataclass(frozen=True)
class Pool:
    """Candidates of several sources."""

    salience: np.ndarray
    tie: np.ndarray
    index: np.ndarray

    def take(self, positions: np.ndarray) -> "Pool":
        return Pool(self.salience[positions], self.tie[positions], self.index[positions])

    def ids(self, positions: np.ndarray) -> list[tuple[int, int]]:
        return [(int(self.tie[p]), int(self.index[p])) for p in positions]

    def top(self, k: int) -> np.ndarray:
        return top_k(self.salience, tie=self.tie, index=self.index, k=k)


@st.composite
def pools(draw: st.DrawFn) -> Pool:
    """Few distinct saliences, so that ties are the rule; zeros among them."""
    lists = draw(
        st.lists(
            st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.0 + 1e-16, 1.5, 3.0, 1e30]), max_size=8),
            max_size=5,
        )
    )
    return Pool(
        np.array([s for part in lists for s in part], np.float64),
        np.array([t for t, part in enumerate(lists) for _ in part], np.int64),
        np.array([i for part in lists for i in range(len(part))], np.int64),
    )


def naive(pool: Pool, k: int) -> list[int]:
    """The same by sorting everything."""
    live = [p for p in range(len(pool.salience)) if pool.salience[p] > 0]
    live.sort(key=lambda p: (-pool.salience[p], pool.tie[p], pool.index[p]))
    return live[:k]


@given(pools(), st.integers(1, 50))
def test_it_is_the_head_of_a_full_sort(pool: Pool, k: int) -> None:
    assert pool.top(k).tolist() == naive(pool, k)


@given(pools(), st.integers(1, 50))
def test_the_best_of_each_sources_best_are_the_best_of_all(pool: Pool, k: int) -> None:
    parts = [np.flatnonzero(pool.tie == source) for source in np.unique(pool.tie)]
    survivors = [part[pool.take(part).top(k)] for part in parts]
    union = np.concatenate(survivors) if survivors else np.array([], np.int64)
    assert pool.take(union).ids(pool.take(union).top(k)) == pool.ids(pool.top(k))


@given(pools(), st.integers(1, 50), st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(pool: Pool, k: int, random) -> None:
    order = list(range(len(pool.salience)))
    random.shuffle(order)
    shuffled = pool.take(np.array(order, np.int64))
    assert shuffled.ids(shuffled.top(k)) == pool.ids(pool.top(k))


@given(pools(), st.integers(1, 50), st.integers(1, 50))
def test_a_larger_k_only_lengthens_the_list(pool: Pool, one: int, other: int) -> None:
    short, long = sorted((one, other))
    assert pool.top(long)[: len(pool.top(short))].tolist() == pool.top(short).tolist()


@given(pools(), st.integers(1, 50))
def test_zeros_are_never_chosen(pool: Pool, k: int) -> None:
    chosen = pool.salience[pool.top(k)]
    assert (chosen > 0).all()
    assert len(chosen) == min(k, int((pool.salience > 0).sum()))


def test_ties_break_by_source_and_then_by_index() -> None:
    pool = Pool(np.ones(6), np.array([2, 0, 1, 0, 1, 2]), np.array([0, 1, 0, 0, 1, 1]))
    assert pool.ids(pool.top(4)) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_nothing_to_choose_from_is_nothing_chosen() -> None:
    empty = np.array([], np.int64)
    assert len(top_k(np.array([], np.float64), tie=empty, index=empty, k=3)) == 0
    assert len(Pool(np.zeros(3), np.zeros(3, np.int64), np.arange(3)).top(2)) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_saliences_of_a_million_candidates_are_chosen_alike_in_both_precisions(dtype: type) -> None:
    salience = np.random.default_rng(0).permutation(1_000_000).astype(dtype)
    tie, index = np.zeros(len(salience), np.int64), np.arange(len(salience))
    chosen = top_k(salience, tie=tie, index=index, k=100)
    assert salience[chosen].tolist() == list(range(999_999, 999_899, -1))
