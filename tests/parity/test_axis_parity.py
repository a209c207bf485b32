import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Merged, adapted, merge_matrix, merge_vector

from svdmerge.core.components import RankOneComponents, none
from svdmerge.core.delta import delta
from svdmerge.core.methods.average import average
from svdmerge.core.methods.axis import axis
from svdmerge.core.params import budget
from svdmerge.core.salience import sigma
from svdmerge.core.svd import exact
from svdmerge.core.topk import top_k


def models(
    m: int, n: int, num_sources: int, *, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A random base and fine-tunes of it of different loudness."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(m, n, generator=generator)
    sources = [
        base + 0.1 * (1 + i / 3) * torch.randn(m, n, generator=generator)
        for i in range(num_sources)
    ]
    return base.to(dtype), [source.to(dtype) for source in sources]


def select(parts: list[RankOneComponents], *, k: int) -> list[tuple[int, int]]:
    """(source, index) of the top k, best first."""
    s = np.concatenate([sigma(p.s.numpy(), fro=0.0, noise=0.0) for p in parts])
    tie = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
    index = np.concatenate([np.arange(len(p)) for p in parts])
    return [(int(tie[p]), int(index[p])) for p in top_k(s, tie=tie, index=index, k=k)]


def merge(
    base: torch.Tensor,
    sources: list[torch.Tensor],
    *,
    k: int,
    stored: torch.dtype = torch.float64,
) -> tuple[RankOneComponents, list[tuple[int, int]]]:
    """The library's way: decompose, select ids, assemble from prefixes. Through the stored type."""
    m, n = base.shape
    parts = [exact(delta(source, base=base)).to(stored) for source in sources]
    ids = select(parts, k=k)
    lengths = [sum(1 for source, _ in ids if source == i) for i in range(len(parts))]
    kept = [
        p.slice(0, length) if length else none(m, n)
        for p, length in zip(parts, lengths, strict=True)
    ]
    return axis(kept, weights=[1.0] * len(kept), scale=1.0), ids


def reference(base: torch.Tensor, sources: list[torch.Tensor], *, k: int) -> Merged:
    return merge_matrix(base.double().numpy(), [s.double().numpy() for s in sources], k)


def assert_same(got: RankOneComponents, expected: Merged, *, tolerance: float) -> None:
    scale = float(expected.s[0])
    assert np.linalg.norm(got.dense().numpy() - expected.delta) <= tolerance * scale
    rank = len(got)
    assert np.abs(got.s.numpy() - expected.s[:rank]).max() <= tolerance * scale
    assert np.all(expected.s[rank:] <= tolerance * scale)


@settings(max_examples=60)
@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    num_sources=st.integers(1, 6),
    share=st.sampled_from([0.05, 0.1, 0.3, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_axis_equals_the_dense_reference(
    m: int, n: int, num_sources: int, share: float, seed: int
) -> None:
    base, sources = models(m, n, num_sources, seed=seed)
    k = budget(share, rank=min(m, n))
    expected = reference(base, sources, k=k)
    got, ids = merge(base, sources, k=k)
    assert ids == expected.kept
    assert_same(got, expected, tolerance=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_axis_equals_the_dense_reference_for_every_float_type(dtype: torch.dtype) -> None:
    base, sources = models(40, 30, 4, seed=1, dtype=dtype)
    got, ids = merge(base, sources, k=6)
    expected = reference(base, sources, k=6)
    assert ids == expected.kept
    assert_same(got, expected, tolerance=1e-12)


def test_axis_through_float32_factors_equals_the_reference_to_float32() -> None:
    base, sources = models(64, 48, 8, seed=2)
    got, ids = merge(base, sources, k=10, stored=torch.float32)
    expected = reference(base, sources, k=10)
    assert ids == expected.kept
    assert_same(got, expected, tolerance=1e-6)


def test_what_is_kept_of_each_source_is_a_prefix_of_its_list() -> None:
    base, sources = models(30, 40, 5, seed=3)
    for source in range(5):
        kept = [index for s, index in reference(base, sources, k=12).kept if s == source]
        assert kept == list(range(len(kept)))


def test_the_second_svd_is_not_the_kept_components_themselves() -> None:
    base, sources = models(30, 40, 5, seed=3)
    expected = reference(base, sources, k=8)
    got, _ = merge(base, sources, k=8)
    raw = sorted((exact(delta(s, base=base)).s for s in sources), key=lambda s: -float(s[0]))
    assert float(got.s[0]) > float(raw[0][0]) * (1 + 1e-6)
    assert float(got.s[0]) == pytest.approx(float(expected.s[0]), rel=1e-12)


def test_copies_of_one_source_add_up_as_the_formula_says() -> None:
    base, (source,) = models(20, 16, 1, seed=4)
    expected = reference(base, [source] * 3, k=6)
    got, _ = merge(base, [source] * 3, k=6)
    assert_same(got, expected, tolerance=1e-12)
    assert torch.allclose(got.s, 3 * exact(delta(source, base=base)).s[:2], rtol=1e-12, atol=0)


def test_trained_singular_values_land_where_the_formula_puts_them() -> None:
    base, sources = models(20, 16, 3, seed=5)
    expected = reference(base, sources, k=6)
    got, _ = merge(base, sources, k=6)
    trained = expected.s[:4] * np.array([2.0, 0.5, 0.0, -1.0])
    s = got.s.clone()
    s[:4] = torch.from_numpy(trained)
    weight = base.double() + RankOneComponents(u=got.u, s=s, vh=got.vh).dense()
    wanted = adapted(base.double().numpy(), expected, 4, trained)
    assert np.linalg.norm(weight.numpy() - wanted) <= 1e-11 * np.linalg.norm(expected.delta)


@settings(max_examples=40)
@given(length=st.integers(1, 30), num_sources=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_vectors_are_the_mean_of_their_differences(
    length: int, num_sources: int, seed: int
) -> None:
    base, sources = models(1, length, num_sources, seed=seed)
    got = average(((delta(s, base=base), 1.0) for s in sources), num_sources=num_sources, scale=1.0)
    expected = merge_vector(base.numpy(), [s.numpy() for s in sources])
    assert np.abs(got.numpy() - expected).max() <= 1e-14
