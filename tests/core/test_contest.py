"""The last slots: a total order, whoever cuts the lists first."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from svdmerge.core.contest import Rivals, merged

pairs = st.lists(
    st.tuples(
        st.lists(st.sampled_from([1.0, 1.25, 1.5, 2.0]), max_size=6).map(np.array),
        st.sampled_from(["aa x", "aa y", "bb x", "cc z"]),
    ),
    max_size=8,
)


def head(parts: list[tuple[np.ndarray, str]], k: int) -> list[tuple[float, str]]:
    """The first k by salience, then key, sorted whole."""
    every = [(-float(s), key) for salience, key in parts for s in salience]
    return [(-s, key) for s, key in sorted(every)[:k]]


def as_list(rivals: Rivals) -> list[tuple[float, str]]:
    names = [rivals.keys[i] for i in rivals.key]
    return sorted(zip(rivals.salience.tolist(), names, strict=True), key=lambda x: (-x[0], x[1]))


@given(pairs, st.integers(1, 12))
def test_the_first_are_those_of_all_sorted_by_salience_then_key(
    parts: list[tuple[np.ndarray, str]], k: int
) -> None:
    first = Rivals.of(parts).first(k)
    assert as_list(first) == head(parts, k)
    counts = Counter(key.split(" ")[1] for _, key in head(parts, k))
    assert first.by_parameter() == counts


@given(pairs, st.integers(1, 12), st.integers(1, 4))
def test_parts_cut_to_their_own_first_give_the_same(
    parts: list[tuple[np.ndarray, str]], k: int, step: int
) -> None:
    cut = [Rivals.of(parts[i : i + step]).first(k) for i in range(0, len(parts), step)]
    assert as_list(merged(cut, k=k)) == head(parts, k)
