"""Scope `global` and quotas: one budget over all matrices, by an independent greedy reference."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from merging import (
    Bench,
    factor_deltas,
    inventory_of,
    is_kept_as_base,
    num_kept,
    numbers,
    outcome,
    stack_of,
    tree,
    units,
    worst_distance,
)

from svdmerge.engine import select
from svdmerge.engine.decompose import load_source
from svdmerge.engine.estimate import estimate
from svdmerge.engine.plan import merge_bytes
from svdmerge.engine.whatif import asked, whatif
from svdmerge.errors import RecipeError, ResourceError
from svdmerge.recipe import parse_recipe
from svdmerge.storage.hf_model import PROVENANCE
from svdmerge.verify import verify
from svdmerge.workflow import run

GLOBAL = {"parameters": {"k": "20%", "scope": "global"}}


def power_law(m: int, n: int, *, seed: int, size: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(m, n, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    return (u * size * torch.arange(1, len(s) + 1) ** -0.7) @ vh


SHAPES = {"loud.weight": (90, 70), "usual.weight": (60, 80), "quiet.weight": (66, 66)}
# Of each source: of the loud matrix nearly all is kept, of the quiet one nothing.
SIZES = {"loud.weight": 8.0, "usual.weight": 1.0, "quiet.weight": 0.01}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return made(tmp_path)


def made(root: Path) -> Bench:
    """Three sources of three matrices of different size, and a vector."""
    base = {n: torch.randn(s, generator=torch.Generator()) for n, s in SHAPES.items()}
    base["a.bias"] = torch.zeros(5)

    def source(i: int) -> Path:
        changes = {
            name: power_law(m, n, seed=10 * i + j, size=SIZES[name] * (0.7 + 0.3 * i))
            for j, (name, (m, n)) in enumerate(SHAPES.items())
        }
        tensors = {n: (base[n].double() + d).float() for n, d in changes.items()}
        return tiny.write_model(
            root / f"source-{i}", tensors | {"a.bias": torch.full((5,), float(i))}
        )

    return Bench(
        root=root,
        base=tiny.write_model(root / "base", base),
        sources=tuple(source(i) for i in (1, 2, 3)),
    )


def reference(
    bench: Bench, *, k: float, salience: str = "sigma", weights: tuple[float, ...] = (1, 1, 1),
    quotas: tuple[float, ...] = (1, 1, 1), scope: str = "global",
) -> tuple[dict[str, np.ndarray], Counter[str], Counter[str]]:  # fmt: skip
    """Merged differences, and components kept by matrix and by source: every value of every matrix
    in one sorted list, gone through from the top while there are slots. Dense, float64."""
    base, sources = numbers(bench.base), [numbers(s) for s in bench.sources]
    rows: list[tuple[float, str, int, int]] = []
    svds: dict[tuple[str, int], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    slots: dict[str, int] = {}
    for name, start in base.items():
        for i, source in enumerate(sources):
            if is_kept_as_base(name, start):
                continue
            for matrix, d in stack_of(name, source[name] - start).items():
                u, s, vh = np.linalg.svd(d, full_matrices=False)
                svds[matrix, i] = (u, s, vh)
                slots[matrix] = num_kept(k, len(s))
                unit = np.linalg.norm(d) if salience == "relative" else 1.0
                rows += [(weights[i] * x / unit, matrix, i, j) for j, x in enumerate(s)]
    merged = {m: np.zeros((len(u), vh.shape[1])) for (m, _), (u, _, vh) in svds.items()}
    of_matrix, of_both = Counter[str](), Counter[tuple[str, int]]()
    rank = {m: min(d.shape) for m, d in merged.items()}
    cap = rank if scope == "global" else slots
    for _, matrix, i, j in sorted(rows, key=lambda row: -row[0]):
        full = of_matrix[matrix] == cap[matrix] or of_matrix.total() == sum(slots.values())
        most = max(1, int(quotas[i] * slots[matrix] + 1e-9)) if quotas[i] < 1 else 10**9
        if full or of_both[matrix, i] == most:
            continue
        u, s, vh = svds[matrix, i]
        merged[matrix] += weights[i] * s[j] * np.outer(u[:, j], vh[j])
        of_matrix[matrix] += 1
        of_both[matrix, i] += 1
    of_source = Counter[str]()
    for (_, i), n in of_both.items():
        of_source[str(bench.sources[i])] += n
    return merged, of_matrix, of_source


def kept_by_matrix(bench: Bench) -> Counter[str]:
    names = pq.read_table(bench.out / PROVENANCE)["parameter"].to_pylist()
    return Counter(name for name in names if not name.endswith("#flat"))


def assert_is_reference(bench: Bench, changes: dict[str, Any], **options: Any) -> None:
    report = bench.run(**changes)
    merged, of_matrix, of_source = reference(bench, **options)
    assert kept_by_matrix(bench) == of_matrix
    assert Counter(report.kept) == of_source
    found = factor_deltas(bench.plan(**changes))
    kept = {m: d for m, d in merged.items() if of_matrix[m]}
    assert worst_distance({m: found[m] for m in kept}, kept) <= 1e-5
    assert all(not found[m].any() for m in merged if not of_matrix[m])


@pytest.mark.parametrize("solver", ["adaptive", "exact"])
@pytest.mark.parametrize("k", [0.02, 0.2, 0.6, 1.0])
def test_one_budget_is_spent_over_all_matrices(bench: Bench, k: float, solver: str) -> None:
    changes = {"parameters": {"k": k, "scope": "global", "svd": solver}}
    assert_is_reference(bench, changes, k=k)
    assert [c.claim for c in verify(str(bench.out)) if c.held is False] == []


def test_a_matrix_keeps_from_nothing_to_its_rank(bench: Bench) -> None:
    bench.run(**GLOBAL)
    assert kept_by_matrix(bench)["quiet.weight"] == 0
    bench.run(parameters={"k": 0.6, "scope": "global"})
    assert kept_by_matrix(bench)["loud.weight"] == 70


def test_salience_relative_and_weights_count_over_all_matrices(bench: Bench) -> None:
    models = [
        {"model": str(s), "weight": w} for s, w in zip(bench.sources, (1.0, 3.0, 0.2), strict=True)
    ]
    changes = {"parameters": {"k": 0.1, "scope": "global", "salience": "relative"}}
    assert_is_reference(
        bench, changes | {"models": models}, k=0.1, salience="relative", weights=(1.0, 3.0, 0.2)
    )


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_quota_bounds_what_a_source_takes_of_each_matrix(bench: Bench, scope: str) -> None:
    models: list[Any] = [*map(str, bench.sources[:2])]
    models.append({"model": str(bench.sources[2]), "quota": "25%"})
    changes = {"models": models, "parameters": {"k": 0.2, "scope": scope}}
    assert_is_reference(bench, changes, k=0.2, quotas=(1, 1, 0.25), scope=scope)
    told = whatif(bench.plan(**changes), budgets=[0.2])[0]
    assert Counter(told.kept) == reference(bench, k=0.2, quotas=(1, 1, 0.25), scope=scope)[2]


def test_a_quota_is_part_of_the_plan_and_a_method_without_ranking_refuses_it(bench: Bench) -> None:
    models: list[Any] = [str(bench.sources[0]), {"model": str(bench.sources[1]), "quota": 0.5}]
    assert bench.plan(models=models).hash != bench.plan(models=[*map(str, bench.sources[:2])]).hash
    raw = bench.raw(models=models, merge_method="tsv_m")
    with pytest.raises(RecipeError, match="leave `quota` out"):
        parse_recipe(raw)
    with pytest.raises(RecipeError, match=r"quota.*share"):
        parse_recipe(bench.raw(models=[{"model": "a", "quota": 20}]))


def test_the_same_bits_for_any_number_of_tasks_and_workers(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    bench.run(**GLOBAL)
    expected = outcome(bench.out)
    monkeypatch.setattr(select, "SPECTRA_PER_UNIT", 1)
    for address in ("none", "local"):
        models = list(reversed(bench.raw()["models"]))
        places = {"store": str(tmp_path / f"s-{address}"), "out": str(tmp_path / f"o-{address}")}
        run(bench.recipe(**GLOBAL | places, models=models), address=address)
        assert outcome(tmp_path / f"o-{address}") == expected


def test_equal_values_are_taken_by_content_then_matrix(tmp_path: Path) -> None:
    """Copies of one matrix in every place: nothing but the order of ties decides."""
    names = [f"{letter}.weight" for letter in "abcd"]
    change = torch.diag(torch.tensor([3.0, 3.0, 1.0, 1.0, 1.0, 1.0]))
    bench = Bench(
        root=tmp_path,
        base=tiny.write_model(tmp_path / "base", {n: torch.zeros(6, 6) for n in names}),
        sources=(tiny.write_model(tmp_path / "source", {n: change.clone() for n in names}),),
        admit=True,
    )
    bench.run(parameters={"k": 2, "scope": "global"})
    assert kept_by_matrix(bench) == dict.fromkeys(names, 2)
    bench.run(parameters={"k": 3, "scope": "global"})
    # 12 in all: eight threes, then the ones of the first matrix by name, as many as it has.
    assert kept_by_matrix(bench) == {
        "a.weight": 6, "b.weight": 2, "c.weight": 2, "d.weight": 2,
    }  # fmt: skip


def test_only_what_may_exceed_the_common_cut_is_deepened(tmp_path: Path) -> None:
    shapes = {"loud.weight": (220, 180), "quiet.weight": (200, 200)}
    base = {n: torch.zeros(s) for n, s in shapes.items()}

    def source(i: int) -> Path:
        sizes = {"loud.weight": 1.0, "quiet.weight": 0.05}
        changes = {
            n: power_law(*shapes[n], seed=i + 10 * j, size=sizes[n] * (1 + 0.1 * i)).float()
            for j, n in enumerate(shapes)
        }
        return tiny.write_model(tmp_path / f"source-{i}", changes)

    bench = Bench(
        root=tmp_path,
        base=tiny.write_model(tmp_path / "base", base),
        sources=tuple(source(i) for i in (1, 2, 3)),
        admit=True,
    )
    changes = {"parameters": {"k": 0.2, "scope": "global"}}
    report = bench.run(**changes)
    _, of_matrix, of_source = reference(bench, k=0.2)
    assert (kept_by_matrix(bench), Counter(report.kept)) == (of_matrix, of_source)
    plan = bench.plan(**changes)
    held = {n: [load_source(plan, s).held(n) for s in plan.sources] for n in shapes}
    assert max(held["quiet.weight"]) == 16
    assert min(held["loud.weight"]) > 16
    assert max(held["loud.weight"]) <= 64
    merged = numbers(bench.out)["loud.weight"]
    bench.run(parameters={"k": of_matrix["loud.weight"]})
    assert np.array_equal(numbers(bench.out)["loud.weight"], merged)


def test_a_layers_store_serves_the_global_scope_and_the_other_way_round(bench: Bench) -> None:
    assert units(bench.run()) > 0
    bench.run(**GLOBAL)
    before = tree(bench.store, below="components")
    assert units(bench.run()) == 0
    assert units(bench.run(**GLOBAL | {"out": str(bench.root / "again")})) == 0
    assert tree(bench.store, below="components") == before


def test_the_plan_counts_with_as_much_as_a_matrix_could_keep(bench: Bench) -> None:
    small, large = (
        bench.plan(parameters={"k": 1}),
        bench.plan(parameters={"k": 1} | {"scope": "global"}),
    )
    assert [large.num_given(p) for p in large.parameters] == [p.rank for p in large.parameters]
    assert merge_bytes(large, large.parameters) > merge_bytes(small, small.parameters)
    assert estimate(large).peak_task_bytes > estimate(small).peak_task_bytes
    with pytest.raises(ResourceError, match="resources"):
        bench.plan(
            parameters={"k": 1, "scope": "global"},
            resources={"memory": estimate(large).peak_task_bytes - 1},
        )


def test_a_global_scope_does_not_go_with_a_target(bench: Bench) -> None:
    tune = {"task": "tensor", "train": "a.parquet", "test": "b.parquet"}
    raw = bench.raw(parameters={"scope": "global", "scale": "auto"}, tune=tune)
    with pytest.raises(RecipeError, match="leave `scope: global` out"):
        parse_recipe(raw)


def test_whatif_of_the_global_scope_is_what_a_run_keeps(bench: Bench) -> None:
    bench.run(parameters={"k": 0.3})
    plan = asked(bench.plan(parameters={"k": 0.3}), scope="global")
    for told in whatif(plan, budgets=[0.05, 0.3]):
        report = bench.run(parameters={"k": told.k, "scope": "global"})
        assert report.kept == told.kept
        assert told.certain
    assert inventory_of(plan).holdings.keys() == {s.revision for s in plan.sources}
