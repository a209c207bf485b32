"""The inventory: how deep the store is, by records alone, and which sidecars to read."""

from pathlib import Path

import pytest
from merging import inventory_of, micro_bench

from svdmerge.engine.decompose import load_source
from svdmerge.errors import StoreError


def test_an_inventory_tells_what_the_commits_do(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path)
    bench.run(parameters={"k": 2})
    bench.run(parameters={"k": 18}, models=bench.raw()["models"][:1])
    plan = bench.plan()
    inventory = inventory_of(plan)
    for source in plan.sources:
        committed = load_source(plan, source)
        for p in plan.parameters:
            assert inventory.depth(source.revision, p) == committed.depth(p.source_id)
            assert inventory.is_known(source.revision, p)


def test_only_sidecars_of_the_matrices_asked_for_are_named(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path)
    bench.run(parameters={"k": 2})
    bench.run(parameters={"k": 18}, models=bench.raw()["models"][:1])
    plan = bench.plan()
    inventory, revisions = inventory_of(plan), [s.revision for s in plan.sources]
    (a,) = (p for p in plan.parameters if p.id == "a.weight")
    (b,) = (p for p in plan.parameters if p.id == "b.weight")
    # The first records hold both; of the larger one a source had more components to store.
    assert [len(inventory.sidecars(revisions, [p])) for p in (a, b)] == [4, 3]
    assert inventory.sidecars(revisions, [a, b]) == inventory.sidecars(revisions, [a])
    assert inventory.sidecars(revisions[:1], [b])[0].revision == revisions[0]


def test_nothing_is_known_of_an_empty_store_and_a_malformed_record_is_told(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path)
    plan = bench.plan()
    empty = inventory_of(plan)
    assert not any(empty.is_known(s.revision, p) for s in plan.sources for p in plan.parameters)
    bench.run()
    record = next((bench.store / "commits").rglob("*.json"))
    record.write_text("{half")
    with pytest.raises(StoreError, match="malformed"):
        inventory_of(plan)
