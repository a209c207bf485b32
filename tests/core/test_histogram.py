"""Histograms of saliences: bins in the values' order, exact sums, the bin of the cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from svdmerge.core.histogram import NUM_BINS, Histogram, bins_of

saliences = arrays.arrays(
    np.float64, st.integers(0, 60), elements=st.floats(0, 1e300) | st.sampled_from([1.0, 2.0, 3.0])
)


@given(saliences)
def test_bins_are_in_the_order_of_the_values_and_none_is_out_of_range(values: np.ndarray) -> None:
    bins = bins_of(np.sort(values))
    assert np.all(np.diff(bins) >= 0)
    assert len(bins) == 0 or (bins[0] >= 0 and bins[-1] < NUM_BINS)


def test_a_bin_is_narrow() -> None:
    values = np.geomspace(1e-30, 1e30, 200_001)
    bins = bins_of(values)
    first, last = np.unique(bins, return_index=True)[1][:-1], np.unique(bins, return_index=True)[1]
    assert (values[last[1:] - 1] / values[first]).max() <= 1 + 1 / 1024


@given(st.lists(saliences, max_size=5), st.randoms())
def test_any_grouping_of_parts_gives_the_same_histogram(
    parts: list[np.ndarray], random: st.DataObject
) -> None:
    whole = Histogram.of(parts)
    shuffled = list(parts)
    random.shuffle(shuffled)  # pyright: ignore[reportAttributeAccessIssue]
    tree = Histogram.merged(
        [Histogram.of(shuffled[:1]), Histogram.merged(Histogram.of([p]) for p in shuffled[1:])]
    )
    assert tree.bins.tolist() == whole.bins.tolist()
    assert tree.counts.tolist() == whole.counts.tolist()
    assert whole.counts.sum() == sum(len(p) for p in parts)


@given(saliences.filter(len), st.integers(1, 80))
def test_the_kth_value_lies_in_the_cuts_bin_and_fewer_than_k_above(
    values: np.ndarray, k: int
) -> None:
    cut, num_above = Histogram.of([values]).cut(k)
    bins = bins_of(values)
    assert num_above == (bins > cut).sum() < k
    kth = np.sort(values)[::-1][min(k, len(values)) - 1]
    assert bins_of(np.array([kth]))[0] == cut


@pytest.mark.parametrize("parts", [[], [np.zeros(0)]])
def test_nothing_has_no_cut(parts: list[np.ndarray]) -> None:
    assert Histogram.of(parts).cut(3) == (0, 0)
