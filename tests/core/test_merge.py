import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import orthonormal

from svdmerge.core.components import RankOneComponents, concatenate, none
from svdmerge.core.merge import recompress
from svdmerge.core.svd import exact


def source(m: int, n: int, k: int, *, seed: int) -> RankOneComponents:
    """k components as AXIS keeps them of one source."""
    generator = torch.Generator().manual_seed(seed)
    s = torch.rand(k, generator=generator, dtype=torch.float64).sort(descending=True).values
    u, v = orthonormal(m, k, seed=seed + 1000), orthonormal(n, k, seed=seed + 2000)
    return RankOneComponents(u=u, s=s, vh=v.T)


def negative(c: RankOneComponents) -> RankOneComponents:
    return RankOneComponents(u=-c.u, s=c.s, vh=c.vh)


def assert_is_svd_of_the_sum(got: RankOneComponents, parts: RankOneComponents) -> None:
    """Equal to the dense SVD of the sum to 1e-12 of its norm; orthonormal; descending."""
    dense = parts.to(torch.float64).dense()
    reference = torch.linalg.svdvals(dense)
    scale = float(reference[0]) if reference.numel() else 0.0
    rank = len(got)
    assert got.u.dtype == got.s.dtype == got.vh.dtype == torch.float64
    assert rank <= len(reference)
    assert torch.all((got.s - reference[:rank]).abs() <= 1e-12 * scale)
    assert torch.all(reference[rank:] <= 1e-12 * scale)
    assert torch.linalg.matrix_norm(got.dense() - dense) <= 1e-12 * scale
    identity = torch.eye(rank, dtype=torch.float64)
    assert torch.allclose(got.u.T @ got.u, identity, rtol=0, atol=1e-12)
    assert torch.allclose(got.vh @ got.vh.T, identity, rtol=0, atol=1e-12)
    assert torch.all(got.s > 0)
    assert torch.all(got.s[:-1] >= got.s[1:])


@settings(max_examples=60)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    num_sources=st.integers(1, 5),
    k=st.integers(1, 8),
    seed=st.integers(0, 10**6),
)
def test_it_is_the_dense_svd_of_the_sum(
    m: int, n: int, num_sources: int, k: int, seed: int
) -> None:
    kept = [source(m, n, min(k, m, n), seed=seed + 7 * i) for i in range(num_sources)]
    parts = concatenate(kept)
    assert_is_svd_of_the_sum(recompress(parts), parts)


@settings(max_examples=30)
@given(m=st.integers(1, 12), n=st.integers(1, 12), k=st.integers(1, 30), seed=st.integers(0, 99))
def test_components_of_any_sign_length_and_angle_are_summed(
    m: int, n: int, k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, s, vh = (torch.randn(*d, generator=generator).double() for d in ((m, k), (k,), (k, n)))
    parts = RankOneComponents(u=u, s=s, vh=vh)
    assert_is_svd_of_the_sum(recompress(parts), parts)


def test_a_single_component_comes_back() -> None:
    parts = source(9, 7, 1, seed=3)
    got = recompress(parts)
    assert len(got) == 1
    assert float(got.s[0]) == pytest.approx(float(parts.s[0]), rel=1e-14)
    assert torch.allclose(got.dense(), parts.dense(), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6), (1, 5), (5, 1)])
def test_more_components_than_the_rank_become_as_many_as_the_rank(m: int, n: int) -> None:
    parts = concatenate([source(m, n, min(m, n), seed=i) for i in range(4)])
    got = recompress(parts)
    assert len(got) == min(m, n)
    assert_is_svd_of_the_sum(got, parts)


def test_shared_directions_merge_into_one() -> None:
    one = source(12, 10, 3, seed=1)
    parts = concatenate([one, one, one])
    got = recompress(parts)
    assert len(got) == 3
    assert torch.allclose(got.s, 3 * one.s, rtol=1e-12, atol=0)


def test_a_sum_of_deficient_rank_has_that_rank() -> None:
    one, other = source(12, 10, 2, seed=1), source(12, 10, 3, seed=2)
    parts = concatenate([one, other, one, other, one])
    got = recompress(parts)
    assert len(got) == 5
    assert_is_svd_of_the_sum(got, parts)


def test_components_of_value_zero_add_nothing() -> None:
    c = source(8, 6, 4, seed=0)
    zero = RankOneComponents(u=c.u, s=torch.zeros_like(c.s), vh=c.vh)
    assert len(recompress(zero)) == 0
    assert len(recompress(concatenate([c, zero]))) == 4


def test_no_components_have_no_svd() -> None:
    got = recompress(none(8, 6))
    assert (got.u.shape, got.s.shape, got.vh.shape) == ((8, 0), (0,), (0, 6))


def test_sources_that_cancel_leave_nothing() -> None:
    c = source(9, 7, 5, seed=4)
    assert len(recompress(concatenate([c, negative(c)]))) == 0


def test_what_is_left_of_a_cancellation_is_not_drowned_in_rounding() -> None:
    loud, quiet = source(9, 7, 3, seed=4), source(9, 7, 1, seed=5)
    got = recompress(concatenate([loud, quiet, negative(loud)]))
    assert len(got) == 1
    assert float(got.s[0]) == pytest.approx(float(quiet.s[0]), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_differences_keep_their_rank(scale: float) -> None:
    c = source(9, 7, 5, seed=4)
    scaled = RankOneComponents(u=c.u, s=scale * c.s, vh=c.vh)
    assert len(recompress(scaled)) == 5


def test_a_full_svd_recompressed_is_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    c = exact(torch.randn(11, 8, generator=generator))
    got = recompress(c)
    assert torch.allclose(got.s, c.s, rtol=1e-12, atol=0)
    assert torch.allclose(got.dense(), c.dense(), rtol=0, atol=1e-13)


def test_the_same_components_give_the_same_bits() -> None:
    parts = concatenate([source(12, 10, 4, seed=i) for i in range(3)])
    one, other = recompress(parts), recompress(parts)
    assert torch.equal(one.u, other.u)
    assert torch.equal(one.s, other.s)
    assert torch.equal(one.vh, other.vh)
