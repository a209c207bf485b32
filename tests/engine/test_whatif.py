"""What-if and selection: what is kept at a budget, from stored spectra alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from merging import (
    Bench,
    dense_axis,
    is_kept_as_base,
    micro_bench,
    numbers,
    stack_of,
    tiny_bench,
    tree,
)

from svdmerge.engine.decompose import load_source
from svdmerge.engine.whatif import asked, whatif
from svdmerge.engine.winners import (
    Listed,
    Winners,
    all_values,
    select_matrix,
    short_of,
    unlisted_bound,
)
from svdmerge.errors import RecipeError, StoreError
from svdmerge.storage.shards import Spectrum


def listed(name: str, s: list[float], *, weight: float = 1.0, bound: float = 0.0) -> Listed:
    values = np.array(s, np.float32)
    spectrum = Spectrum(
        parameter="x", sha256=name, m=8, n=8, fro=float(np.linalg.norm(values)), bound=bound,
        base_fro=None, noise=0.0, first=0, s=values, solver="exact",
    )  # fmt: skip
    return Listed(sha256=name, source=f"source {name}", weight=weight, spectra=[spectrum])


def ids(sources: list[Listed], rows: Winners) -> list[tuple[float, str, int]]:
    """Value, content and index of each."""
    contents = [sources[i].sha256 for i in rows.source]
    return list(zip(rows.s.tolist(), contents, rows.index.tolist(), strict=True))


spectrum_lists = st.lists(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0]), min_size=1, max_size=6).map(
        lambda s: sorted(s, reverse=True)
    ),
    min_size=1,
    max_size=4,
)


@given(spectra=spectrum_lists, k=st.integers(1, 12))
def test_the_selection_is_the_head_of_all_values_sorted_with_ties_by_content(
    spectra: list[list[float]], k: int
) -> None:
    sources = [listed(f"{i}", s) for i, s in enumerate(spectra)]
    got = ids(sources, select_matrix(sources, salience="sigma", k=k))
    pool = [(s, f"{i}", j) for i, values in enumerate(spectra) for j, s in enumerate(values) if s]
    assert got == sorted(pool, key=lambda row: (-row[0], row[1], row[2]))[:k]


@given(spectra=spectrum_lists, k=st.integers(1, 12))
def test_what_is_kept_of_a_source_is_a_prefix_of_its_list(
    spectra: list[list[float]], k: int
) -> None:
    rows = select_matrix(
        [listed(f"{i}", s) for i, s in enumerate(spectra)], salience="relative", k=k
    )
    for source, kept in enumerate(rows.kept(len(spectra))):
        assert sorted(rows.index[rows.source == source]) == list(range(kept))


def test_a_weight_lifts_a_sources_values() -> None:
    sources = [listed("a", [2.0, 1.0]), listed("b", [1.5, 1.0], weight=2.0)]
    rows = select_matrix(sources, salience="sigma", k=2)
    assert ids(sources, rows) == [(1.5, "b", 0), (2.0, "a", 0)]
    assert rows.salience.tolist() == [3.0, 2.0]


def test_overlapping_records_of_a_matrix_are_read_as_one_list() -> None:
    first, second = listed("a", [4, 3, 2]).spectra[0], listed("a", [2, 1]).spectra[0]
    from dataclasses import replace

    assert all_values([first, replace(second, first=2)]).tolist() == [4, 3, 2, 1]
    # A gap ends the list: what lies beyond cannot be a prefix.
    assert all_values([first, replace(second, first=5)]).tolist() == [4, 3, 2]


def test_a_bound_beyond_a_gap_says_nothing_of_what_was_lost() -> None:
    """Else a source that lost a block would be taken for known to where the one after it ends."""
    from dataclasses import replace

    first = listed("a", [4, 3, 2], bound=1.9).spectra[0]
    second, third = (
        replace(first, first=n, s=np.array(s, np.float32), bound=b)
        for n, s, b in ((3, [1.8, 1.6], 1.5), (5, [1.4], 0.1))
    )
    assert unlisted_bound([first, second, third]) == 0.1
    assert unlisted_bound([first, third]) == 1.9
    assert unlisted_bound([second, third]) == first.fro
    # What was found again of an exact solver's list, and what it found nothing after.
    whole = replace(second, s=np.array([1.8, 1.6, 1.4, 0.1], np.float32), bound=0.0)
    assert unlisted_bound([first, whole, third]) == 0.0
    assert unlisted_bound([first, replace(first, first=3, s=first.s[:0], bound=0.0)]) == 0.0
    other = listed("b", [1.7, 1.0])
    damaged = replace(other, source="damaged", sha256="a", spectra=[first, third])
    stored = {other.source: 2, "damaged": 3}
    sources = [
        source for source, _ in short_of([damaged, other], stored=stored, salience="sigma", k=4)
    ]
    assert sources == ["damaged"]


@pytest.mark.parametrize("salience", ["sigma", "relative"])
def test_whatif_keeps_what_a_run_keeps_at_that_budget(tmp_path: Path, salience: str) -> None:
    bench = tiny_bench(tmp_path)
    bench.run(parameters={"k": 2, "salience": salience})
    budgets: list[int | float] = [1, 3, 0.25, 20, 1.0]
    outcomes = whatif(bench.plan(parameters={"k": 2, "salience": salience}), budgets=budgets)
    for k, told in zip(budgets, outcomes, strict=True):
        report = bench.run(parameters={"k": k, "salience": salience})
        assert report.kept == told.kept
        assert told.certain
    assert [o.energy for o in outcomes] == sorted(o.energy for o in outcomes)
    single = whatif(bench.plan(models=bench.raw()["models"][:1]), budgets=[1.0])[0]
    assert single.energy == pytest.approx(1.0, abs=1e-6)


def test_whatif_writes_nothing(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path)
    bench.run()
    before = tree(tmp_path)
    whatif(bench.plan(), budgets=[1, 2])
    assert tree(tmp_path) == before


def test_whatif_of_what_is_not_decomposed_says_what_to_run(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path)
    with pytest.raises(StoreError) as caught:
        whatif(bench.plan(), budgets=[1])
    assert "svdmerge decompose" in str(caught.value)
    assert str(bench.plan().sources[0].reference) in str(caught.value)


def test_whatif_is_not_certain_where_unstored_values_might_win(tmp_path: Path) -> None:
    """A store with first blocks lists few values: neither weights nor an unfilled budget may hide
    that."""

    def model(folder: str, seed: int, start: torch.Tensor | float = 0.0) -> Path:
        generator = torch.Generator().manual_seed(seed)
        dense = torch.randn(220, 180, generator=generator, dtype=torch.float64)
        u, _, vh = torch.linalg.svd(dense, full_matrices=False)
        return tiny.write_model(
            tmp_path / folder, {"a.weight": start + (u * 0.9 ** torch.arange(180)) @ vh}
        )

    base = model("base", 0)
    start = tiny.read_model(base)["a.weight"]
    sources = (model("one", 1, start), model("two", 2, start))
    bench = Bench(root=tmp_path, base=base, sources=sources, admit=True)
    changes = {"parameters": {"k": 4}}
    bench.run(**changes)
    told = whatif(bench.plan(**changes), budgets=[4, 8, 24, 40, 90])
    assert [o.certain for o in told] == [True, True, True, False, False]
    weighted = changes | {"models": [str(sources[0]), {"model": str(sources[1]), "weight": 1e6}]}
    # All of 16 listed values of the second win first, and its 17th might well have too.
    told = whatif(bench.plan(**weighted), budgets=[10, 20])
    assert [o.certain for o in told] == [True, False]


def test_whatif_of_a_model_with_an_empty_matrix(tmp_path: Path) -> None:
    models = [{"a.weight": torch.randn(6, 5), "e.weight": torch.zeros(0, 5)} for _ in range(2)]
    bench = Bench(
        root=tmp_path,
        base=tiny.write_model(tmp_path / "base", models[0]),
        sources=(tiny.write_model(tmp_path / "source", models[1]),),
        admit=True,
    )
    report = bench.run(parameters={"k": 2})
    (told,) = whatif(bench.plan(parameters={"k": 2}), budgets=[2])
    assert told.kept == report.kept
    assert told.certain


def left_out(bench: Bench, k: int, *, sources: list[Path]) -> dict[str, np.ndarray]:
    """Per matrix the sum of the sources' whole differences less what a run at k keeps of it."""
    base = numbers(bench.base)
    merged = dense_axis(base, [numbers(s) for s in sources], k=k)
    rests: dict[str, np.ndarray] = {}
    for name, start in base.items():
        if not is_kept_as_base(name, start):
            deltas = [stack_of(name, numbers(s)[name] - start) for s in sources]
            rests |= {m: sum(d[m] for d in deltas) - merged[m] for m in deltas[0]}
    return rests


@pytest.mark.parametrize("solver", ["adaptive", "exact"])
def test_what_is_left_out_is_within_the_bounds_and_these_are_no_looser_than_sums(
    tmp_path: Path, solver: str
) -> None:
    bench = tiny_bench(tmp_path)
    parameters = {"k": 2, "svd": solver}
    bench.run(parameters=parameters)
    for told in whatif(bench.plan(parameters=parameters), budgets=[2, 7]):
        rests = left_out(bench, int(told.k), sources=list(bench.sources))
        frobenius = np.sqrt(sum(np.linalg.norm(r) ** 2 for r in rests.values()))
        spectral = max(np.linalg.norm(r, 2) for r in rests.values())
        assert frobenius <= told.frobenius <= 2 * frobenius
        assert spectral <= told.spectral <= 4 * spectral
    # Of one source nothing is bounded but known: the rest of its own spectrum.
    only = bench.raw()["models"][:1]
    (alone,) = whatif(bench.plan(models=only, parameters=parameters), budgets=[3])
    rests = left_out(bench, 3, sources=list(bench.sources[:1]))
    frobenius = np.sqrt(sum(np.linalg.norm(r) ** 2 for r in rests.values()))
    assert alone.frobenius == pytest.approx(frobenius, rel=1e-5)
    assert alone.spectral == pytest.approx(
        max(np.linalg.norm(r, 2) for r in rests.values()), rel=1e-5
    )


def test_nothing_is_left_out_of_one_source_kept_whole(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path, num_sources=1)
    bench.run()
    (told,) = whatif(bench.plan(), budgets=[1.0])
    assert told.frobenius == told.spectral == 0.0


def test_a_subset_of_sources_another_salience_and_scope_are_what_a_run_of_them_keeps(
    tmp_path: Path,
) -> None:
    bench = tiny_bench(tmp_path)
    bench.run()
    first, second, third = bench.raw()["models"]
    plan = bench.plan()
    one = whatif(asked(plan, only=["source-1", third], salience="relative"), budgets=[3])
    other = whatif(asked(plan, without=["source-2"], salience="relative"), budgets=[3])
    assert one == other
    report = bench.run(models=[first, third], parameters={"k": 3, "salience": "relative"})
    assert report.kept == one[0].kept
    assert second not in one[0].kept
    (told,) = whatif(asked(plan, scope="global"), budgets=[0.2])
    assert told.kept == bench.run(parameters={"k": 0.2, "scope": "global"}).kept


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ({"only": ["source-9"]}, "source-9: no source is called so"),
        ({"without": ["source-1", "source-2", "source-3"]}, "no source is left"),
    ],
)
def test_a_wrong_question_is_refused_by_name(
    tmp_path: Path, question: dict[str, Any], told: str
) -> None:
    with pytest.raises(RecipeError, match=told):
        asked(tiny_bench(tmp_path).plan(), **question)


def test_a_method_that_ranks_nothing_has_no_other_salience(tmp_path: Path) -> None:
    plan = tiny_bench(tmp_path).plan(merge_method="tsv_m")
    with pytest.raises(RecipeError, match="--salience: tsv_m does not use it"):
        asked(plan, salience="relative")


def test_the_factors_and_components_of_a_run_have_the_told_sizes(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path)
    bench.run(parameters={"k": 5})
    (told,) = whatif(bench.plan(parameters={"k": 5}), budgets=[5])
    plan = bench.plan(parameters={"k": 5})
    matrices = [p for p in plan.parameters if p.action == "decompose"]
    assert told.factor_bytes == sum(4 * min(5, p.rank) * (p.m + p.n + 1) for p in matrices)
    held = [
        4 * load_source(plan, s).held(p.id) * (p.m + p.n + 1)
        for s in plan.sources
        for p in matrices
    ]
    assert told.store_bytes == sum(held)
