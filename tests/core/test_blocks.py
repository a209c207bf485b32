"""Blocks of components and the bounds on what follows: what a selection makes of them is what full
float64 SVDs give."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selections import assert_selected_as_by_full_svds
from spectra import planted
from torch import Tensor

from svdmerge.comparison.rounds import threshold_rounds
from svdmerge.core import certified
from svdmerge.core.block_shape import WIDTH
from svdmerge.core.blocks import EXACT, Block, exact_block, first_blocks, next_block
from svdmerge.core.components import RankOneComponents, concatenate, none
from svdmerge.core.products import Dense

# Above SMALL, so that Lanczos is what is tested.
RANK = 144

Spectrum = Callable[[], Tensor]


def power(exponent: float, *, rank: int = RANK) -> Tensor:
    return torch.arange(1, rank + 1, dtype=torch.float64) ** -exponent


def leading(values: list[float], *, rank: int = RANK) -> Tensor:
    return torch.cat([torch.tensor(values, dtype=torch.float64), torch.zeros(rank - len(values))])


def clustered() -> Tensor:
    """Values that differ by 1e-4 of themselves, on both sides of a block's end."""
    s = power(0.7)
    s[10:24] = s[10] * (1 - 1e-4 * torch.arange(14, dtype=torch.float64))
    return s


def repeated() -> Tensor:
    s = power(0.7)
    s[:4], s[5:9], s[12:20] = 1.0, s[5], s[12]
    return s


SPECTRA: dict[str, Spectrum] = {
    "power law 0.6": lambda: power(0.6),
    "power law 0.9": lambda: power(0.9),
    "low rank": lambda: leading([4.0, 3.0, 2.0, 1.0, 0.5]),
    "low rank, wide": lambda: leading([2.0 - i / 30 for i in range(40)]),
    "repeated": repeated,
    "clustered": clustered,
    "flat": lambda: torch.ones(RANK, dtype=torch.float64),
    "nearly flat": lambda: torch.linspace(1.0, 0.9, RANK, dtype=torch.float64),
    "ill-conditioned": lambda: torch.logspace(0, -8, RANK, dtype=torch.float64),
    "ill-conditioned at the top": lambda: leading([10.0 ** (-i / 2) for i in range(17)]),
    "zero": lambda: leading([]),
}


def matrix(s: Tensor, *, seed: int, m: int = RANK + 16, n: int = RANK) -> Tensor:
    return planted(s, m=m, n=n, seed=seed).matrix


def noise(*, seed: int, m: int = RANK + 16, n: int = RANK) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator, dtype=torch.float64) / (m**0.5 + n**0.5)


def rounded(*, seed: int, m: int = RANK + 16, n: int = RANK) -> Tensor:
    """The difference of two models in bfloat16."""
    base = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    source = base + matrix(power(0.7), seed=seed, m=m, n=n).float()
    return source.bfloat16().double() - base.bfloat16().double()


def block_of(delta: Tensor, stored: RankOneComponents | None = None) -> Block:
    stored = stored or none(*delta.shape)
    fro = float(torch.linalg.vector_norm(delta.double()))
    return next_block(delta, stored=stored, fro=fro, parameter="x")


def filled(delta: Tensor, *, num_blocks: int) -> tuple[RankOneComponents, Block]:
    """Blocks one after another, each from what a store keeps of those before, and the last."""
    stored, block = none(*delta.shape), None
    for _ in range(num_blocks):
        block = block_of(delta, stored)
        stored = concatenate([stored, block.components.to(torch.float32)])
        if block.bound == 0.0:
            break
    assert block is not None
    return stored, block


# --- the selection ---


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("k", [5, 24, 60])
def test_the_selection_is_that_of_full_svds(kind: str, k: int) -> None:
    deltas = [matrix(SPECTRA[kind](), seed=i) for i in range(3)]
    assert_selected_as_by_full_svds([*deltas, matrix(power(0.75), seed=9)], k=k)


@pytest.mark.parametrize("k", [5, 24, 60])
def test_the_selection_from_noise_is_that_of_full_svds(k: int) -> None:
    assert_selected_as_by_full_svds([noise(seed=1), noise(seed=2), matrix(power(0.7), seed=3)], k=k)


def test_one_source_a_thousand_times_larger_gives_all() -> None:
    deltas = [matrix(power(0.7), seed=i) for i in range(3)]
    deltas[1] *= 1000
    assert_selected_as_by_full_svds(deltas, k=30)
    assert {source for source, _ in threshold_rounds(deltas, k=30).kept} == {1}


@pytest.mark.parametrize("shape", [(RANK, 400), (400, RANK), (RANK, RANK)])
def test_wide_and_tall_matrices_alike(shape: tuple[int, int]) -> None:
    m, n = shape
    deltas = [matrix(power(0.6 + i / 10), seed=i, m=m, n=n) for i in range(3)]
    assert_selected_as_by_full_svds(deltas, k=30)


@pytest.mark.parametrize("k", [5, 30, 60])
def test_the_selection_from_bfloat16_is_that_of_full_svds(k: int) -> None:
    assert_selected_as_by_full_svds([rounded(seed=i) for i in range(3)], k=k)


@pytest.mark.parametrize("place", [4, WIDTH - 1, WIDTH, 2 * WIDTH - 1])
@pytest.mark.parametrize("apart", [2e-5, 5e-6])
@pytest.mark.parametrize("larger", [0, 1])
def test_what_stands_as_close_to_the_cut_is_told_apart(
    place: int, apart: float, larger: int
) -> None:
    """One value of each source there, of which the larger one alone is selected: by its float64
    value, for products in float32 are off by as much."""
    values = [power(0.7), power(0.7)]
    for i, s in enumerate(values):
        s[place] *= 1.0 + apart if i == larger else 1.0
    deltas = [matrix(s, seed=i) for i, s in enumerate(values)]
    kept = threshold_rounds(deltas, k=2 * place + 1).kept
    assert [(i, place) in kept for i in range(2)] == [larger == 0, larger == 1]


MATRICES: dict[str, Callable[[int], Tensor]] = {
    "noise": lambda seed: noise(seed=seed),
    "rounded": lambda seed: rounded(seed=seed),
} | {kind: lambda seed, s=s: matrix(s(), seed=seed) for kind, s in SPECTRA.items()}

sources = st.lists(
    st.tuples(
        st.sampled_from(sorted(MATRICES)),
        st.floats(-2.0, 2.0),  # log10 of the scale
        st.integers(0, 10**6),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=500, deadline=None)
@given(drawn=sources, k=st.integers(1, 48))
def test_the_selection_of_any_sources_is_that_of_full_svds(
    drawn: list[tuple[str, float, int]], k: int
) -> None:
    deltas = [MATRICES[kind](seed) * 10**scale for kind, scale, seed in drawn]
    assert_selected_as_by_full_svds(deltas, k=k)


def test_half_a_bound_would_miss_components(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the bound is for: here the next values lie just above the cut."""
    many = matrix(leading([i**-0.5 for i in range(1, 41)]), seed=1)
    few = [matrix(leading([0.15] * 20), seed=seed) for seed in (2, 3)]
    assert_selected_as_by_full_svds([many, *few], k=40)
    honest = certified.remainder_bounds
    monkeypatch.setattr(
        certified, "remainder_bounds", lambda *a, **o: [b / 2 for b in honest(*a, **o)]
    )
    with pytest.raises(AssertionError):
        assert_selected_as_by_full_svds([many, *few], k=40)


# --- the components ---


@pytest.mark.parametrize("kind", SPECTRA)
def test_values_vectors_and_residuals_are_the_matrixs(kind: str) -> None:
    delta = matrix(SPECTRA[kind](), seed=4)
    stored, _ = filled(delta, num_blocks=3)
    c, largest = stored.to(torch.float64), max(float(torch.linalg.matrix_norm(delta, 2)), 1e-30)
    exact = torch.linalg.svdvals(delta)[: len(c)]
    found = torch.from_numpy(np.minimum.accumulate(c.s.numpy()))
    assert torch.all((found - exact).abs() <= 1e-5 * largest)
    for residual in (delta @ c.vh.T - c.u * c.s, delta.T @ c.u - c.vh.T * c.s):
        assert float(torch.linalg.vector_norm(residual, dim=0).max() if len(c) else 0) <= (
            1e-4 * largest
        )
    for vectors in (c.u, c.vh.T):
        identity = torch.eye(len(c), dtype=torch.float64)
        assert torch.all((vectors.T @ vectors - identity).abs() <= 1e-4)


def test_the_smallest_values_an_exact_solver_finds_have_the_matrixs_vectors_too() -> None:
    """They are as small as what rounding leaves along the components that were known."""
    delta = matrix(torch.logspace(0, -13.2, 54, dtype=torch.float64), seed=1)
    stored, block = filled(delta, num_blocks=2)
    assert (block.solver, len(stored) > 50) == (EXACT, True)
    c = block.components
    for residual in (delta @ c.vh.T - c.u * c.s, delta.T @ c.u - c.vh.T * c.s):
        assert torch.linalg.vector_norm(residual, dim=0).max() <= 1e-5


def test_a_matrix_of_low_rank_is_found_whole_and_nothing_after_it() -> None:
    stored, block = filled(matrix(leading([3.0, 2.0, 1.0]), seed=1), num_blocks=3)
    assert len(stored) == 3
    assert block.bound == 0.0


def test_a_matrix_of_low_rank_in_float32_is_not_called_whole_beyond_its_rounding() -> None:
    delta = matrix(leading([3.0, 2.0, 1.0]), seed=1).float()
    block = block_of(delta)
    assert len(block.components) == 3
    assert float(torch.linalg.svdvals(delta.double())[3]) <= block.bound <= 1e-5


def test_where_lapack_fails_one_solver_the_next_one_takes_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")  # pyright: ignore[reportPrivateImportUsage]

    delta = matrix(power(0.8), seed=1)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    nothing = none(*delta.shape)
    for first in (nothing, exact_block(delta, stored=nothing).components.slice(0, 5)):
        block = block_of(delta, first.to(torch.float32))
        assert (block.solver, block.bound) == (EXACT, 0.0)
        assert torch.all((block.components.s - power(0.8)[len(first) :]).abs() <= 1e-10)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-5, 1e12, 1e30])
def test_no_scale_costs_a_digit(scale: float) -> None:
    """Differences of layers that were all but frozen have values whose squares, or the residuals
    beside them, are no normal numbers of float32."""
    delta = matrix(power(0.8), seed=1)
    for block in (
        block_of(scale * delta),
        first_blocks(
            torch.stack([scale * delta, delta]), parameters=["x", "y"],
            fros=[f * float(torch.linalg.vector_norm(delta)) for f in (scale, 1.0)],
        )[0],
    ):  # fmt: skip
        values = power(0.8)[: len(block.components)] * scale
        assert len(block.components) == WIDTH
        assert torch.all((block.components.s - values).abs() <= 1e-7 * scale)
        assert float(power(0.8)[WIDTH]) <= block.bound / scale <= 1.3 * float(power(0.8)[WIDTH])


def test_zero_has_no_components() -> None:
    block = block_of(torch.zeros(200, 150))
    assert (len(block.components), block.bound) == (0, 0.0)


@pytest.mark.parametrize("kind", ["flat", "nearly flat", "noise"])
def test_what_does_not_fall_goes_to_the_exact_solver(kind: str) -> None:
    delta = noise(seed=1) if kind == "noise" else matrix(SPECTRA[kind](), seed=1)
    stored, block = filled(delta, num_blocks=2)
    assert block.solver == EXACT
    assert len(stored) == RANK


def test_small_sides_go_to_the_exact_solver_at_once() -> None:
    block = block_of(matrix(power(0.7, rank=40), seed=1, m=300, n=40))
    assert block.solver == EXACT
    assert torch.equal(
        block.components.s,
        exact_block(
            matrix(power(0.7, rank=40), seed=1, m=300, n=40), stored=none(300, 40)
        ).components.s,
    )


def test_deepening_what_was_stored_gives_the_bits_of_filling_at_once() -> None:
    delta = matrix(power(0.7, rank=600), seed=1, m=620, n=600)
    at_once, _ = filled(delta, num_blocks=3)
    first, _ = filled(delta, num_blocks=1)
    later = block_of(delta.clone(), first)
    assert later.solver == "lanczos float32"
    both = concatenate([first, later.components.to(torch.float32)])
    for one, other in ((both.u, at_once.u), (both.s, at_once.s), (both.vh, at_once.vh)):
        size = 2 * WIDTH
        whole = one[:size] if one.shape[0] == size else one[:, :size]
        assert torch.equal(whole, other[:size] if one.shape[0] == size else other[:, :size])


def test_a_block_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    block_of(matrix(power(0.7), seed=1))
    assert torch.equal(torch.rand(3), expected)


# --- when to leave to the exact solver ---


def steps_taken(monkeypatch: pytest.MonkeyPatch, delta: Tensor) -> int:
    """Products with blocks of columns that the first block takes."""
    taken, honest = list[int](), Dense.step

    def counted(self: Dense, x: Tensor) -> tuple[Tensor, Tensor]:
        taken.append(x.shape[-1])
        return honest(self, x)

    monkeypatch.setattr(Dense, "step", counted)
    block_of(delta)
    return len(taken)


def test_what_is_flat_is_left_after_three_steps_without_a_certificate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert steps_taken(monkeypatch, noise(seed=1, m=320, n=300)) == 3


def test_few_components_above_faint_noise_are_found_in_as_many_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = planted(torch.linspace(1.0, 0.3, 8), m=320, n=300, seed=1).matrix
    delta = few + 1e-3 * noise(seed=1, m=320, n=300)
    assert len(block_of(delta).components) == 8
    # Three of the bound.
    assert steps_taken(monkeypatch, delta) == 3 + 3


def test_noise_under_few_components_is_left_once_it_is_seen_not_to_converge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = planted(torch.linspace(1.0, 0.6, 5), m=620, n=600, seed=1).matrix
    delta = few + 0.05 * noise(seed=1, m=620, n=600)
    stored, block = filled(delta, num_blocks=1)
    assert len(stored) == 5
    assert 0.045 <= block.bound <= 0.07
    assert block_of(delta, stored).solver == EXACT
    assert steps_taken(monkeypatch, delta) <= 12 + 3


def test_a_power_law_is_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, block = filled(matrix(power(0.5, rank=600), seed=1, m=600, n=600), num_blocks=2)
    assert (len(stored), block.solver) == (2 * WIDTH, "lanczos float32")


# --- stacks ---


@pytest.mark.parametrize(("m", "n"), [(160, 144), (144, 160), (40, 30)])
def test_matrices_of_a_stack_give_what_each_gives_by_itself(m: int, n: int) -> None:
    """Steep ones stop early, noise is left, and zero has nothing, whatever lies beside them."""
    deltas = [matrix(power(e, rank=min(m, n)), seed=3, m=m, n=n) for e in (0.5, 0.9, 1.5)]
    deltas += [noise(seed=4, m=m, n=n), torch.zeros(m, n, dtype=torch.float64)]
    names = [f"p{i}" for i in range(len(deltas))]
    fros = [float(torch.linalg.vector_norm(d)) for d in deltas]
    stacked = first_blocks(torch.stack(deltas), fros=fros, parameters=names)
    for delta, fro, name, block in zip(deltas, fros, names, stacked, strict=True):
        alone = next_block(delta, stored=none(m, n), fro=fro, parameter=name)
        assert (block.solver, len(block.components)) == (alone.solver, len(alone.components))
        assert block.bound == pytest.approx(alone.bound, rel=1e-4)
        largest = float(torch.linalg.matrix_norm(delta, 2))
        assert torch.all((block.components.s - alone.components.s).abs() <= 1e-6 * largest)
        apart = block.components.dense() - alone.components.dense()
        assert float(torch.linalg.matrix_norm(apart)) <= 1e-4 * largest


# --- the bound ---


@pytest.mark.parametrize("kind", [k for k in SPECTRA if k not in ("zero", "flat", "nearly flat")])
def test_the_bound_is_never_below_what_follows(kind: str) -> None:
    for seed in range(12):
        delta = matrix(SPECTRA[kind](), seed=seed)
        block = block_of(delta)
        values = torch.linalg.svdvals(delta)
        after = float(values[len(block.components)])
        assert block.bound >= after - 1e-12 * float(values[0])


@pytest.mark.parametrize("exponent", [0.6, 0.75, 0.9])
def test_the_bound_is_close_on_power_laws(exponent: float) -> None:
    for seed in range(8):
        block = block_of(matrix(power(exponent), seed=seed))
        assert block.bound <= 1.4 * float(power(exponent)[len(block.components)])
