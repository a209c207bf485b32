"""Every merge method through the whole pipeline: plan, store, selection, factors, output, tune."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import methods_reference as reference
import numpy as np
import pytest
import tiny
import torch
from merging import (
    Bench,
    factor_deltas,
    is_kept_as_base,
    micro_bench,
    num_kept,
    numbers,
    outcome,
    output_deltas,
    stack_of,
    tiny_bench,
    units,
    weights,
    worst_distance,
)

from svdmerge.core.methods.registry import METHODS, Takes
from svdmerge.engine.estimate import estimate
from svdmerge.engine.whatif import whatif
from svdmerge.errors import RecipeError, ResourceError
from svdmerge.recipe import parse_recipe
from svdmerge.verify import verify

ALL = sorted(METHODS)
WHOLE = [name for name in ALL if METHODS[name].takes is Takes.WHOLE]
WEIGHTS = (1.0, 0.5, 2.0)
SCALE = 0.7


def weighted_models(bench: Bench) -> list[dict[str, Any]]:
    return [{"model": str(s), "weight": w} for s, w in zip(bench.sources, WEIGHTS, strict=True)]


def mean(deltas: Sequence[np.ndarray]) -> np.ndarray:
    return SCALE * np.sum(deltas, axis=0) / len(deltas)


def leading(delta: np.ndarray, k: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(delta, full_matrices=False)
    return (u[:, :k] * s[:k]) @ vh[:k]


def pooled(deltas: Sequence[np.ndarray], k: int) -> list[np.ndarray]:
    """Of each source, its part in the k largest singular values of all."""
    s = [np.linalg.svd(d, compute_uv=False) for d in deltas]
    cut = sorted(np.concatenate(s).tolist(), reverse=True)[k - 1]
    return [leading(d, int((values >= cut).sum())) for d, values in zip(deltas, s, strict=True)]


def expected(method: str, deltas: Sequence[np.ndarray], *, is_matrix: bool) -> np.ndarray:
    """A method's formula for the weighted differences of one matrix or vector."""
    summed = reference.task_arithmetic(deltas, scale=SCALE)
    ones = [1.0] * len(deltas)
    if method == "task_arithmetic":
        return summed
    if method == "ties":
        return reference.ties(deltas, ones, density=0.2, scale=SCALE)
    if not is_matrix or method == "average":
        return mean(deltas)
    rank = min(deltas[0].shape)
    return {
        "axis": lambda: SCALE * np.sum(pooled(deltas, num_kept(0.1, rank)), axis=0),
        "svc": lambda: SCALE * reference.svc(pooled(deltas, num_kept(0.1, rank))),
        "tsv_m": lambda: SCALE * reference.tsv_m(deltas, max(1, rank // len(deltas))),
        "iso_c": lambda: reference.iso_c(deltas, scale=SCALE),
        "knots": lambda: reference.knots(deltas, density=0.2, scale=SCALE),
        "core_space": lambda: reference.core_space(deltas, density=0.2, scale=SCALE),
    }[method]()


def all_expected(bench: Bench, method: str) -> dict[str, np.ndarray]:
    base, sources = numbers(bench.base), [numbers(s) for s in bench.sources]
    found: dict[str, np.ndarray] = {}
    for name, start in base.items():
        if is_kept_as_base(name, start):
            continue
        deltas = [w * (s[name] - start) for w, s in zip(WEIGHTS, sources, strict=True)]
        if not (matrices := stack_of(name, start)):
            found[name] = expected(method, deltas, is_matrix=False)
        for matrix in matrices:
            parts = [stack_of(name, d)[matrix] for d in deltas]
            found[matrix] = expected(method, parts, is_matrix=True)
    return found


def changes(bench: Bench, method: str, **more: Any) -> dict[str, Any]:
    """The method with its published settings, but for the strength."""
    own = {"merge_method": method, "models": weighted_models(bench), "parameters": {"scale": SCALE}}
    return own | more


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return tiny_bench(tmp_path_factory.mktemp("methods"), rank=3)


@pytest.mark.parametrize("method", [m for m in ALL if m != "dare"])
def test_a_run_merges_every_tensor_as_the_formula_says(bench: Bench, method: str) -> None:
    recipe = changes(bench, method)
    bench.run(**recipe)
    formula = all_expected(bench, method)
    assert worst_distance(factor_deltas(bench.plan(**recipe)), formula) <= 2e-6
    assert worst_distance(output_deltas(bench.out, numbers(bench.base)), formula) <= 1e-5
    assert [c.claim for c in verify(str(bench.out)) if c.held is False] == []
    assert f"merge_method: {method}" in (bench.out / "README.md").read_text()


@pytest.mark.parametrize("method", ["knots", "core_space"])
def test_of_low_rank_sources_their_rank_is_enough(bench: Bench, method: str) -> None:
    """What float32 weights leave beyond the rank is noise, and takes no part either way."""
    whole, enough = {"scale": SCALE}, {"scale": SCALE, "k": 3}
    rules = [{"match": name, "policy": "base"} for name in (tiny.KERNEL, tiny.EXPERT_STACK)]
    found: list[dict[str, np.ndarray]] = []
    for parameters in (whole, enough):
        recipe = changes(bench, method, parameters=parameters, policies=rules)
        bench.run(**recipe)
        found.append(factor_deltas(bench.plan(**recipe)))
    assert worst_distance(found[1], found[0]) <= 1e-5


def test_a_dare_run_keeps_its_share_of_a_source_and_rescales_it(bench: Bench) -> None:
    bench.run(**changes(bench, "dare", models=[str(bench.sources[0])]))
    base, source = numbers(bench.base), numbers(bench.sources[0])
    kept: list[np.ndarray] = []
    for name, start in base.items():
        delta = source[name] - start
        # Small entries drown in the output's float32, beside weights of size 1.
        large = np.abs(delta) > 1e-3
        if is_kept_as_base(name, start) or not large.any():
            continue
        ratio = (numbers(bench.out)[name] - start)[large] / (SCALE / 0.1 * delta[large])
        assert np.all((np.abs(ratio) < 1e-3) | (np.abs(ratio - 1) < 1e-3)), name
        kept.append(ratio > 0.5)
    assert float(np.concatenate(kept).mean()) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("method", ALL)
def test_neither_order_of_sources_nor_store_changes_a_bit(tmp_path: Path, method: str) -> None:
    bench = micro_bench(tmp_path)
    recipe = changes(bench, method)
    bench.run(**recipe)
    first = weights(bench.out)
    fresh = {"store": str(tmp_path / "fresh"), "out": str(tmp_path / "again")}
    bench.run(**(recipe | fresh | {"models": weighted_models(bench)[::-1]}))
    assert weights(tmp_path / "again") == first


def test_all_methods_share_a_store_and_none_spoils_anothers(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path)
    found = {m: _outcome(bench, m) for m in ALL}
    for method in reversed(ALL):
        assert _outcome(bench, method, store=str(tmp_path / "fresh")) == found[method]
    assert len({tuple(f.values()) for f in found.values()}) == len(ALL)


def _outcome(bench: Bench, method: str, **more: Any) -> dict[str, bytes]:
    # Of a single component per matrix, svc would be axis.
    k = {"k": "50%"} if "k" in METHODS[method].parameters else {}
    bench.run(**changes(bench, method, parameters=k), **more)
    return outcome(bench.out)


def test_what_one_whole_method_stored_serves_the_others(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path)
    bench.run(**changes(bench, "average"))
    for method in ("iso_c", "ties"):
        assert units(bench.run(**changes(bench, method))) == 0, method


def test_a_policy_of_average_is_an_average_whatever_the_method(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path)
    rule = [{"match": "[ab].*", "policy": "average"}]
    bench.run(**changes(bench, "average"), policies=rule)
    plain = weights(bench.out)
    for method in ("ties", "knots"):
        bench.run(**changes(bench, method), policies=rule)
        assert weights(bench.out) == plain


@pytest.mark.parametrize("method", ALL)
def test_a_source_that_changed_nothing_is_no_fault(tmp_path: Path, method: str) -> None:
    base = tiny.tiny_base(tmp_path / "base")
    untouched = [*tiny.shapes()]
    sources = tuple(
        tiny.tiny_source(tmp_path / f"s{i}", base, i, untouched=untouched[: i * 100])
        for i in (0, 1)
    )
    bench = Bench(root=tmp_path, base=base, sources=sources)
    bench.run(merge_method=method)
    bench.run(merge_method=method, models=[str(sources[1])])
    start, merged = numbers(base), numbers(bench.out)
    assert all(np.array_equal(merged[name], start[name]) for name in start)


# --- plan, estimate, what-if ---


@pytest.mark.parametrize("method", ALL)
def test_the_plan_says_what_happens_and_what_it_costs(bench: Bench, method: str) -> None:
    recipe = changes(bench, method)
    found = estimate(bench.plan(**recipe))
    actions = {t.name: t.action for t in found.tensors}
    is_whole = METHODS[method].takes is Takes.WHOLE
    assert actions[tiny.QUERY] == ("whole" if is_whole else "decompose")
    by_entries = method in ("task_arithmetic", "ties", "dare")
    assert actions[tiny.QUERY_BIAS] == ("elementwise" if by_entries else "average")
    assert actions[tiny.WORD_EMBEDDINGS] == "base"
    report = bench.run(**recipe, store=str(bench.root / f"store-{method}"))
    stored = next(s for s in report.stages if s.name == "decompose").bytes_stored
    # Arrow's headers weigh on blocks this small; of low rank less is stored than might be.
    assert 0.3 * found.store_bytes <= stored <= 3 * found.store_bytes


def test_sources_that_divide_a_budget_store_no_more_than_their_part(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base", {"a.weight": random_matrix(60, 96, 0)})
    sources = tuple(
        tiny.write_model(tmp_path / f"s{i}", {"a.weight": random_matrix(60, 96, i)})
        for i in (1, 2, 3, 4)
    )
    bench = Bench(root=tmp_path, base=base, sources=sources, admit=True)
    plan = bench.plan(merge_method="tsv_m", parameters={})
    assert [(plan.of_each(p), plan.depth(p)) for p in plan.parameters] == [(15, 16)]
    report = bench.run(merge_method="tsv_m", parameters={})
    assert set(report.kept.values()) == {15}
    report = bench.run(merge_method="knots", parameters={"k": 5})
    assert set(report.kept.values()) == {5}


def random_matrix(m: int, n: int, seed: int) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def test_memory_of_a_merge_is_checked_before_anything_starts(bench: Bench) -> None:
    need = estimate(bench.plan(merge_method="ties")).peak_task_bytes
    with pytest.raises(ResourceError, match="merging it needs"):
        bench.plan(merge_method="ties", resources={"memory": need - 1})
    bench.plan(merge_method="ties", resources={"memory": need})


@pytest.mark.parametrize("method", ["svc", "tsv_m", "knots"])
def test_whatif_keeps_what_a_run_of_the_method_keeps(tmp_path: Path, method: str) -> None:
    bench = micro_bench(tmp_path)
    bench.run(merge_method=method, parameters={"k": 6})
    told = whatif(bench.plan(merge_method=method, parameters={"k": 6}), budgets=[3, 6])
    for k, answer in zip((3, 6), told, strict=True):
        report = bench.run(merge_method=method, parameters={"k": k})
        assert report.kept == answer.kept
        assert answer.certain


@pytest.mark.parametrize("method", WHOLE)
def test_whatif_of_a_method_without_a_budget_is_refused(bench: Bench, method: str) -> None:
    with pytest.raises(RecipeError, match="whole differences"):
        whatif(bench.plan(merge_method=method), budgets=[3])


# --- the recipe ---


LEAST: Mapping[str, Any] = {"base_model": "base", "models": ["one", "two"]}
SETTINGS: Mapping[str, Any] = {
    "k": 3, "salience": "relative", "scope": "layer", "svd": "exact", "density": 0.5, "scale": 2.0,
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("method", ALL)
def test_a_parameter_is_used_or_refused_by_name(method: str, name: str) -> None:
    raw = {**LEAST, "merge_method": method, "parameters": {name: SETTINGS[name]}}
    if name in METHODS[method].parameters:
        recipe = parse_recipe(raw)
        assert getattr(recipe.parameters, name) == SETTINGS[name]
        assert parse_recipe(recipe.dump()) == recipe
    else:
        with pytest.raises(RecipeError, match=f"parameters.{name}: {method} does not use it"):
            parse_recipe(raw)


@pytest.mark.parametrize("method", ALL)
def test_defaults_are_the_published_ones_and_are_written_out(method: str) -> None:
    recipe, described = parse_recipe({**LEAST, "merge_method": method}), METHODS[method]
    assert set(recipe.dump()["parameters"]) == described.parameters
    assert recipe.parameters.density == described.density
    if "k" in described.parameters:
        assert recipe.parameters.k == described.k


@pytest.mark.parametrize(("given", "density"), [("20%", 0.2), (0.3, 0.3), ("1", 1.0), (1, 1.0)])
def test_a_density_is_a_share(given: object, density: float) -> None:
    recipe = parse_recipe({**LEAST, "merge_method": "ties", "parameters": {"density": given}})
    assert recipe.parameters.density == density


@pytest.mark.parametrize("density", [0, "0%", 1.5, 20, "120%", "half", True, None])
def test_a_density_that_is_no_share_is_refused_by_name(density: object) -> None:
    raw = {**LEAST, "merge_method": "ties", "parameters": {"density": density}}
    with pytest.raises(RecipeError, match=r"parameters\.density"):
        parse_recipe(raw)
