import pytest
import torch
from spectra import SHAPES, SPECTRA, Planted, planted
from torch import Tensor

from svdmerge.core import svd
from svdmerge.core.components import RankOneComponents
from svdmerge.core.svd import exact, seed_of

EPS = torch.finfo(torch.float64).eps

cases = pytest.mark.parametrize(
    ("kind", "m", "n"), [(kind, m, n) for kind in SPECTRA for m, n in SHAPES]
)


def case(kind: str, m: int, n: int) -> Planted:
    return planted(SPECTRA[kind](min(m, n)), m=m, n=n, seed=m + n)


def rounding(p: Planted) -> float:
    """What float64 may be off by, in a value or a norm, for a matrix of this size and scale."""
    return 8 * EPS * max(p.matrix.shape) * float(p.s[0])


def off_orthonormal(columns: Tensor) -> float:
    identity = torch.eye(columns.shape[1], dtype=columns.dtype)
    return float((columns.T @ columns - identity).abs().max())


def assert_signs_are_fixed(c: RankOneComponents) -> None:
    top = c.u.gather(0, c.u.abs().argmax(dim=0, keepdim=True))
    assert bool((top >= 0).all())


# --- exact ---


@cases
def test_exact_finds_the_planted_values_and_rebuilds_the_matrix(kind: str, m: int, n: int) -> None:
    p = case(kind, m, n)
    c = exact(p.matrix)
    assert len(c) == min(m, n)
    assert torch.all((c.s - p.s).abs() <= rounding(p))
    assert torch.linalg.matrix_norm(c.dense() - p.matrix) <= 4 * rounding(p)


@cases
def test_exact_gives_torchs_values_in_descending_order(kind: str, m: int, n: int) -> None:
    p = case(kind, m, n)
    c = exact(p.matrix)
    assert torch.all((c.s - torch.linalg.svdvals(p.matrix)).abs() <= rounding(p))
    assert torch.all(c.s[:-1] >= c.s[1:])
    assert torch.all(c.s >= 0)


@cases
def test_exact_vectors_are_orthonormal_with_fixed_signs(kind: str, m: int, n: int) -> None:
    c = exact(case(kind, m, n).matrix)
    assert off_orthonormal(c.u) <= 100 * EPS * max(m, n)
    assert off_orthonormal(c.vh.T) <= 100 * EPS * max(m, n)
    assert_signs_are_fixed(c)


@pytest.mark.parametrize("kind", ["power-law", "ill-conditioned"])
def test_exact_finds_the_planted_vectors_where_values_stand_apart(kind: str) -> None:
    p = case(kind, 40, 30)
    c = exact(p.matrix)
    for i in range(10):
        gap = float(min(p.s[i] - p.s[i + 1], p.s[i - 1] - p.s[i] if i else p.s[0]))
        # Wedin: a direction turns by at most the perturbation over the gap.
        turn = rounding(p) / gap
        assert abs(float(c.u[:, i] @ p.u[:, i])) >= 1 - turn**2 - 4 * EPS
        assert abs(float(c.vh[i] @ p.vh[i])) >= 1 - turn**2 - 4 * EPS


@pytest.mark.parametrize(("kind", "rank"), [("low-rank", 5), ("rank-deficient", 28), ("zero", 0)])
def test_values_that_are_rounding_alone_are_exactly_zero(kind: str, rank: int) -> None:
    c = exact(case(kind, 40, 30).matrix)
    assert int((c.s > 0).sum()) == rank
    assert torch.equal(c.s[rank:], torch.zeros(30 - rank, dtype=torch.float64))


def test_a_small_value_that_is_not_rounding_is_kept() -> None:
    c = exact(case("ill-conditioned", 40, 30).matrix)
    assert float(c.s[-1]) == pytest.approx(1e-8, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_widened_before_it_is_decomposed(dtype: torch.dtype) -> None:
    matrix = case("power-law", 20, 12).matrix.to(dtype)
    c = exact(matrix)
    assert c.u.dtype == c.s.dtype == c.vh.dtype == torch.float64
    assert torch.allclose(c.dense(), matrix.double(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_an_empty_matrix_has_no_components(shape: tuple[int, int]) -> None:
    assert len(exact(torch.zeros(shape))) == 0


def test_a_matrix_and_its_negative_share_u_and_differ_in_the_sign_of_vh() -> None:
    p = case("power-law", 20, 12)
    one, other = exact(p.matrix), exact(-p.matrix)
    assert torch.allclose(one.u, other.u, rtol=0, atol=1e-12)
    assert torch.allclose(one.vh, -other.vh, rtol=0, atol=1e-12)


def test_exact_gives_the_same_bits_every_time() -> None:
    matrix = case("repeated", 40, 30).matrix
    one, other = exact(matrix), exact(matrix.clone())
    assert torch.equal(one.u, other.u)
    assert torch.equal(one.s, other.s)
    assert torch.equal(one.vh, other.vh)


# --- seeds ---


def test_a_seed_depends_on_name_shape_and_block_and_on_nothing_else() -> None:
    of = {
        seed_of(name, m=m, n=n, block=block)
        for name in ("a", "b", "a\0", "")
        for m, n in ((2, 3), (3, 2), (23, 1), (2, 31))
        for block in (0, 1, 10)
    }
    assert len(of) == 4 * 4 * 3
    assert seed_of("a", m=2, n=3, block=0) == seed_of("a", m=2, n=3, block=0)


def test_a_seed_fits_the_generator() -> None:
    for block in range(200):
        seed = seed_of("encoder.weight", m=768, n=3072, block=block)
        assert 0 <= seed < 2**63
        torch.Generator().manual_seed(seed)


def test_seeds_stay_the_same_from_release_to_release() -> None:
    # Stored blocks were drawn with it: a change here is a new version of the store's schema.
    assert seed_of("encoder.weight", m=768, n=3072, block=1) == 1238995489016112317


# --- factors of a merged difference ---


def test_factors_are_no_deeper_than_the_matrix_and_leave_out_next_to_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    low = full[:, :4] @ torch.randn(4, 9, generator=generator, dtype=torch.float64)
    tail = low + 1e-9 * full
    assert [len(svd.factors(d)) for d in (full, low, tail, 0 * full)] == [9, 4, 4, 0]
    for matrix in (full, low, tail):
        left_out = torch.linalg.matrix_norm(svd.factors(matrix).dense() - matrix)
        assert float(left_out) <= 1e-7 * float(torch.linalg.matrix_norm(matrix))
    assert svd.factors(torch.zeros(0, 5)).dense().shape == (0, 5)
