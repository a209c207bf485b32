"""The selection's benchmark: its store is selected from as any, its streams as if stored."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from merging import inventory_of

from svdmerge.comparison.selecting import (
    contest,
    fill,
    hollow_model,
    made_spectrum,
    stream_units,
    streamed,
    weigh,
)
from svdmerge.engine.decompose import pending
from svdmerge.engine.plan import Plan, make_plan
from svdmerge.engine.runtime import InProcess
from svdmerge.engine.select import choose_components, common_cut
from svdmerge.engine.whatif import asked
from svdmerge.progress import SILENT
from svdmerge.recipe import parse_recipe


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    names = ("base", "one", "two", "three")
    models = [str(hollow_model(tmp_path / n, num_matrices=4, rank=40)) for n in names]
    recipe = {
        "base_model": models[0],
        "models": models[1:],
        "parameters": {"svd": "exact"},
        "store": str(tmp_path / "store"),
    }
    return make_plan(parse_recipe(recipe))


def test_a_filled_store_is_whole_and_selected_from_by_both_scopes(plan: Plan) -> None:
    assert fill(plan) == 3 * 4 * 40
    inventory = inventory_of(plan)
    assert list(pending(plan, inventory)) == []
    values = {p.id: [made_spectrum(i, p).s for i in range(3)] for p in plan.parameters}
    for scope in ("layer", "global"):
        table = choose_components(
            asked(plan, scope=scope), inventory, runtime=InProcess(), progress=SILENT
        )
        every = [(x, p) for p, parts in values.items() for s in parts for x in s.tolist()]
        if scope == "global":
            expected = sorted(every, reverse=True)[:16]
        else:
            expected = [row for p in values for row in sorted(every, reverse=True) if row[1] == p]
            expected = [r for p in values for r in [x for x in expected if x[1] == p][:4]]
        rows = zip(table["s"].to_pylist(), table["parameter"].to_pylist(), strict=True)
        assert sorted(rows) == sorted(expected)


def test_the_cut_of_streamed_values_is_that_of_all_of_them_sorted() -> None:
    units = stream_units(20 * 5 * 30, num_sources=5, rank=30)
    assert [u.num_matrices for u in units] == [16, 4]
    cut = common_cut(
        units, total=60, weigh=weigh, contest=contest, runtime=InProcess(), progress=SILENT
    )
    found = [
        (float(value), b.parameter.id)
        for unit in units
        for b, listed in streamed(unit)
        for x in listed
        for value in x.spectra[0].s
    ]
    best = sorted(found, reverse=True)[:60]
    assert {p: n for p, n in cut.kept.items() if n} == Counter(p for _, p in best)
    assert np.float32(cut.floor) == np.float32(best[-1][0])
