"""Every merge method beside its formula in methods_reference.py, and what must not change it."""

import hashlib
from collections.abc import Sequence

import methods_reference as reference
import numpy as np
import pytest
import torch
from torch import Tensor

from svdmerge.core.components import RankOneComponents
from svdmerge.core.methods.core_space import core_space
from svdmerge.core.methods.dare import dare, drop, seed_of
from svdmerge.core.methods.iso_c import iso_c
from svdmerge.core.methods.knots import knots
from svdmerge.core.methods.svc import svc
from svdmerge.core.methods.task_arithmetic import task_arithmetic
from svdmerge.core.methods.ties import ties, trim
from svdmerge.core.methods.tsv_m import tsv_m
from svdmerge.core.svd import exact

SHAPES = [(9, 14), (14, 9), (10, 10), (1, 12), (12, 1)]
WEIGHTS = (1.0, 0.5, 2.0)


def random_deltas(
    m: int, n: int, *, seed: int, num: int = 3, rank: int | None = None
) -> list[Tensor]:
    """Differences of different loudness, of full rank or low."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    if rank is None:
        return [(1 + i / 2) * draw(m, n) for i in range(num)]
    return [(1 + i / 2) * draw(m, rank) @ draw(rank, n) for i in range(num)]


def cases(*, rank: int | None = None) -> list[tuple[list[Tensor], list[float]]]:
    """Wide, tall, one source, two equal ones, one that changed nothing."""
    found = [
        (random_deltas(m, n, seed=seed, rank=rank), list(WEIGHTS))
        for m, n in SHAPES
        for seed in (1, 2)
    ]
    one, other, third = random_deltas(8, 11, seed=3, rank=rank)
    found.append(([one], [0.7]))
    found.append(([one, one.clone()], [1.0, 1.0]))
    found.append(([one, torch.zeros_like(one), third], [1.0, 1.0, 3.0]))
    found.append(([one, other, one.clone()], [1.0, 2.0, 0.5]))
    return found


CASES, LOW_RANK = cases(), cases(rank=3)


def weighted(deltas: Sequence[Tensor], weights: Sequence[float]) -> list[np.ndarray]:
    return [w * d.numpy() for d, w in zip(deltas, weights, strict=True)]


def leading(deltas: Sequence[Tensor], *, of_each: int) -> list[RankOneComponents]:
    """What selection gives: never a component that is zero."""
    found = [exact(d) for d in deltas]
    return [c.slice(0, min(of_each, int((c.s > 0).sum()))) for c in found]


def assert_same(got: Tensor, expected: np.ndarray, *, tolerance: float = 1e-10) -> None:
    size = float(np.linalg.norm(expected)) or 1.0
    assert float(np.linalg.norm(got.numpy() - expected)) <= tolerance * size


def assert_is_svd(c: RankOneComponents) -> None:
    """Orthonormal, and largest first: what tuning relies on."""
    eye = torch.eye(len(c), dtype=torch.float64)
    assert torch.allclose(c.u.T @ c.u, eye, rtol=0, atol=1e-9)
    assert torch.allclose(c.vh @ c.vh.T, eye, rtol=0, atol=1e-9)
    assert torch.equal(c.s, c.s.sort(descending=True).values)
    assert len(c) == 0 or float(c.s[-1]) > 0


# --- whole differences ---


@pytest.mark.parametrize(("deltas", "weights"), CASES)
def test_task_arithmetic_is_the_scaled_sum(deltas: list[Tensor], weights: list[float]) -> None:
    got = task_arithmetic(zip(deltas, weights, strict=True), scale=0.3)
    assert_same(got, reference.task_arithmetic(weighted(deltas, weights), scale=0.3))


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(("deltas", "weights"), CASES)
def test_ties_trims_elects_and_averages(
    deltas: list[Tensor], weights: list[float], density: float
) -> None:
    pairs = list(zip(deltas, weights, strict=True))
    got = ties(lambda: iter(pairs), density=density, scale=1.5)
    dense = [d.numpy() for d in deltas]
    assert_same(got, reference.ties(dense, weights, density=density, scale=1.5))


def test_ties_by_hand() -> None:
    rows = [[4.0, -3.0, 0.1, 2.0, -1.0], [-1.0, -5.0, 0.2, 3.0, 1.0], [2.0, 4.0, 0.3, 0.2, 1.0]]
    pairs = [(torch.tensor([row], dtype=torch.float64), 1.0) for row in rows]
    got = ties(lambda: iter(pairs), density=0.6, scale=1.0)
    # Kept: 4 -3 . 2 . | . -5 . 3 (and both that tie at 1: -1, 1) | 2 4 . . 1
    assert got.tolist() == [[3.0, -4.0, 0.0, 2.5, 1.0]]


def test_an_entry_whose_signs_cancel_stays_the_bases() -> None:
    pairs = [(torch.tensor([[1.0, 2.0]]), 1.0), (torch.tensor([[-1.0, 2.0]]), 1.0)]
    assert ties(lambda: iter(pairs), density=1.0, scale=1.0).tolist() == [[0.0, 2.0]]


def test_a_trim_keeps_at_least_one_entry_and_all_that_tie_with_the_last() -> None:
    delta = torch.tensor([[1.0, -3.0, 3.0, 0.5]])
    assert trim(delta, density=0.01).tolist() == [[0.0, -3.0, 3.0, 0.0]]
    assert trim(torch.zeros(1, 0), density=0.5).shape == (1, 0)


def masks(deltas: Sequence[Tensor], contents: Sequence[str], density: float) -> list[np.ndarray]:
    """What each source keeps, drawn as the seed's definition says."""
    found: list[np.ndarray] = []
    for delta, content in zip(deltas, contents, strict=True):
        digest = hashlib.sha256(f"layer.weight\0{content}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        draws = torch.rand(delta.shape, generator=generator, dtype=torch.float64)
        found.append(draws.numpy() < density)
    return found


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("deltas", "weights"), CASES)
def test_dare_drops_rescales_and_adds(
    deltas: list[Tensor], weights: list[float], density: float
) -> None:
    contents = [hashlib.sha256(d.numpy().tobytes()).hexdigest() for d in deltas]
    got = dare(
        zip(deltas, weights, strict=True),
        seeds=[seed_of("layer.weight", content=c) for c in contents],
        density=density,
        scale=0.3,
    )
    kept = masks(deltas, contents, density)
    terms = [
        mask * d / (1 - (1 - density))
        for mask, d in zip(kept, weighted(deltas, weights), strict=True)
    ]
    assert_same(got, reference.task_arithmetic(terms, scale=0.3))


def test_dare_keeps_the_share_and_the_mean_and_draws_anew_for_every_parameter() -> None:
    ones = torch.ones(300, 300, dtype=torch.float64)
    one, other = (drop(ones, seed=seed_of(p, content="c"), density=0.1) for p in ("a", "b"))
    for dropped in (one, other):
        assert float((dropped != 0).double().mean()) == pytest.approx(0.1, abs=0.005)
        assert float(dropped.mean()) == pytest.approx(1.0, abs=0.05)
    both = float(((one != 0) & (other != 0)).double().mean())
    assert both == pytest.approx(0.01, abs=0.003)


@pytest.mark.parametrize(("deltas", "weights"), CASES)
def test_iso_c_flattens_the_spectrum_of_the_sum(deltas: list[Tensor], weights: list[float]) -> None:
    summed = task_arithmetic(zip(deltas, weights, strict=True), scale=0.8)
    got = iso_c(summed)
    assert_same(got.dense(), reference.iso_c(weighted(deltas, weights), scale=0.8))
    assert torch.equal(got.s, got.s[:1].expand_as(got.s))


@pytest.mark.parametrize("deltas", [random_deltas(12, 9, seed=1, num=1, rank=2)])
def test_iso_c_leaves_the_null_space_of_the_sum_alone(deltas: list[Tensor]) -> None:
    got, s = iso_c(deltas[0]), exact(deltas[0]).s
    assert len(got) == 2
    assert float(got.s[0]) == pytest.approx(float(s.sum()) / 9, rel=1e-12)
    assert len(iso_c(torch.zeros(4, 3, dtype=torch.float64))) == 0


# --- components ---


@pytest.mark.parametrize("quota", [1, 3])
@pytest.mark.parametrize(("deltas", "weights"), CASES)
def test_tsv_m_orthogonalises_the_leading_vectors(
    deltas: list[Tensor], weights: list[float], quota: int
) -> None:
    got = tsv_m(leading(deltas, of_each=quota), weights=weights, scale=1.0)
    assert_same(got.dense(), reference.tsv_m(weighted(deltas, weights), quota))
    assert_is_svd(got)


def test_tsv_m_of_orthogonal_sources_is_their_sum() -> None:
    one, other = torch.zeros(2, 6, 8, dtype=torch.float64)
    one[0, 0], one[1, 1], other[2, 2], other[3, 3] = 4.0, 3.0, 2.0, 1.0
    got = tsv_m(leading([one, other], of_each=3), weights=[1.0, 1.0], scale=2.0)
    assert_same(got.dense(), 2 * (one + other).numpy())


def test_tsv_m_of_two_equal_sources_is_the_source() -> None:
    (delta,) = random_deltas(7, 9, seed=5, num=1)
    kept = leading([delta, delta], of_each=3)
    got = tsv_m(kept, weights=[1.0, 1.0], scale=1.0)
    assert_same(got.dense(), kept[0].dense().numpy())


@pytest.mark.parametrize("of_each", [1, 4])
@pytest.mark.parametrize(("deltas", "weights"), CASES)
def test_svc_divides_what_was_counted_often(
    deltas: list[Tensor], weights: list[float], of_each: int
) -> None:
    kept = leading(deltas, of_each=of_each)
    got = svc(kept, weights=weights, num_sources=len(kept), scale=0.5)
    parts = weighted([c.dense() for c in kept], weights)
    assert_same(got.dense(), 0.5 * reference.svc(parts), tolerance=1e-8)
    assert_is_svd(got)


@pytest.mark.parametrize(("deltas", "weights"), CASES)
def test_a_source_of_which_nothing_is_kept_counts_once_in_svc(
    deltas: list[Tensor], weights: list[float]
) -> None:
    kept = leading(deltas, of_each=3)
    got = svc(kept, weights=weights, num_sources=len(kept) + 2, scale=1.0)
    parts = weighted([c.dense() for c in kept], weights)
    absent = [np.zeros_like(parts[0])] * 2
    assert_same(got.dense(), reference.svc([*parts, *absent]), tolerance=1e-8)


def test_svc_of_copies_is_one_of_them_and_of_orthogonal_sources_their_sum() -> None:
    (delta,) = random_deltas(7, 9, seed=5, num=1)
    copies = [exact(delta)] * 4
    got = svc(copies, weights=[1.0] * 4, num_sources=4, scale=1.0)
    assert_same(got.dense(), delta.numpy())
    one, other = torch.zeros(2, 6, 8, dtype=torch.float64)
    one[0, 0], other[2, 2] = 4.0, 2.0
    kept = leading([one, other], of_each=1)
    got = svc(kept, weights=[1.0, 1.0], num_sources=2, scale=1.0)
    assert_same(got.dense(), (one + other).numpy())


@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize(("deltas", "weights"), LOW_RANK)
def test_knots_merges_right_factors_in_one_left_basis(
    deltas: list[Tensor], weights: list[float], density: float
) -> None:
    kept = leading(deltas, of_each=3)
    got = knots(kept, weights=weights, density=density, scale=0.6)
    expected = reference.knots(weighted(deltas, weights), density=density, scale=0.6)
    assert_same(got.dense(), expected, tolerance=1e-6)
    assert_is_svd(got)


@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize(("deltas", "weights"), LOW_RANK)
def test_core_space_merges_small_cores(
    deltas: list[Tensor], weights: list[float], density: float
) -> None:
    kept = leading(deltas, of_each=3)
    got = core_space(kept, weights=weights, density=density, scale=0.6)
    expected = reference.core_space(weighted(deltas, weights), density=density, scale=0.6)
    assert_same(got.dense(), expected, tolerance=1e-6)
    assert_is_svd(got)


@pytest.mark.parametrize("merge", [knots, core_space])
def test_a_low_rank_source_alone_comes_through_shared_bases_whole(merge: object) -> None:
    assert callable(merge)
    (delta,) = random_deltas(20, 15, seed=7, num=1, rank=3)
    # What a float32 checkpoint leaves of a low-rank change: noise of full rank, which is dropped.
    noisy = delta + 1e-7 * random_deltas(20, 15, seed=8, num=1)[0]
    got = merge([exact(noisy)], weights=[1.0], density=1.0, scale=1.0)
    assert len(got) == 3
    assert_same(got.dense(), delta.numpy(), tolerance=1e-6)
