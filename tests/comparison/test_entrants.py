"""Every way to use sources on one tiny target: all run, and what helps is found."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from targeted import target_bench, tune_section

from svdmerge.comparison.problem import Problem
from svdmerge.comparison.trained import TRAINED
from svdmerge.comparison.untrained import UNTRAINED, best_source, chosen_mix, mix_model, single
from svdmerge.core.gate import Mix
from svdmerge.recipe import TuneConfig
from svdmerge.workflow import prepare, run_stage


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """Three sources, one of which helps."""
    bench = target_bench(tmp_path_factory.mktemp("problem") / "bench")
    recipe = bench.recipe(parameters={"k": "100%"})
    run_stage(recipe, "decompose", address="none")
    cache = bench.root / "features"
    cache.mkdir()
    return Problem(
        "tiny",
        prepare(recipe, address="none"),
        TuneConfig(**tune_section(bench.root)),
        cache=cache,
        max_test=30,
        threads=1,
    )


@pytest.fixture(scope="module")
def rows(problem: Problem) -> list[int]:
    return problem.drawn(per_class=8, seed=0)


def accuracy(hits: torch.Tensor) -> float:
    return float(hits.double().mean())


@pytest.mark.parametrize("name", list(UNTRAINED))
def test_every_untrained_entrant_gives_a_hit_or_miss_for_each_test_example(
    problem: Problem, rows: list[int], name: str
) -> None:
    found = UNTRAINED[name](problem, rows)
    assert found.hits.dtype == torch.bool
    assert len(found.hits) == len(problem.test) == 30
    assert found.trained == 0
    assert set(found.sources) <= set(problem.sources)
    again = UNTRAINED[name](problem, rows)
    assert torch.equal(again.hits, found.hits)


@pytest.mark.parametrize("name", ["svdmerge", "best single source"])
def test_what_chooses_sources_finds_the_one_that_helps(
    problem: Problem, rows: list[int], name: str
) -> None:
    found = UNTRAINED[name](problem, rows)
    assert "helper" in found.sources
    assert accuracy(found.hits) > 0.9 > accuracy(UNTRAINED["probe"](problem, rows).hits)


def test_tuning_is_kept_or_nothing_is_changed(problem: Problem, rows: list[int]) -> None:
    found = TRAINED["svdmerge, tuned if it helps"](problem, rows)
    untuned = UNTRAINED["svdmerge"](problem, rows)
    assert bool(found.trained) == bool(found.steps) == (found.detail != "nothing is changed")
    if not found.trained:
        assert torch.equal(found.hits, untuned.hits)


@pytest.mark.parametrize("name", ["BitFit", "LoRA, rank 1"])
def test_a_trained_entrant_counts_its_values_and_steps_and_leaves_the_base(
    problem: Problem, rows: list[int], name: str
) -> None:
    before = {n: t.clone() for n, t in problem.base.items()}
    found = TRAINED[name](problem, rows)
    assert found.trained > 0
    assert found.steps > 0
    assert len(found.hits) == len(problem.test)
    kept = problem.extracted({}, part="test", rows=range(3))
    assert all(torch.equal(t, before[n]) for n, t in problem.base.items())
    first = problem.features("base", dict, part="test", rows=range(3))
    torch.testing.assert_close(kept, first)


def test_a_source_by_name_is_the_whole_source(problem: Problem, rows: list[int]) -> None:
    helper = next(s for s in problem.sources.values() if s.reference.endswith("helper"))
    stored = load_file(Path(helper.reference) / "model.safetensors")
    found = problem.base | dict(problem.source_weights("helper"))
    for name, tensor in stored.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)
    assert single("helper")(problem, rows).sources == ("helper",)


def test_the_mix_of_one_whole_source_is_that_source(problem: Problem, rows: list[int]) -> None:
    pooled = problem.pooled({"helper": 1.0}, total=1.0)
    whole = problem.source_weights("helper")
    for name, weight in whole.items():
        torch.testing.assert_close(pooled[name], weight, atol=1e-5, rtol=0)
    assert mix_model(problem, Mix())[0] == "base"
    assert best_source(problem, rows) == "helper"
    assert list(chosen_mix(problem, rows).weights) == ["helper"]


def test_features_are_kept_by_row_and_only_missing_ones_are_computed(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = problem.features("kept", dict, part="train", rows=[3, 1])
    more = problem.features("kept", dict, part="train", rows=[1, 7, 3])
    torch.testing.assert_close(more[[2, 0]], first)

    def never(*arguments: object, **other: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(Problem, "extracted", never)
    held = problem.features("kept", dict, part="train", rows=[7, 1])
    torch.testing.assert_close(held, more[[1, 0]])


def test_draws_are_of_every_class_alike_and_differ_by_seed(problem: Problem) -> None:
    few = problem.drawn(per_class=4, seed=1)
    assert torch.bincount(problem.labels(few)).tolist() == [4, 4, 4]
    assert few == problem.drawn(per_class=4, seed=1)
    assert few != problem.drawn(per_class=4, seed=2)
    assert len(problem.drawn(per_class=None, seed=0)) == 60


def test_weights_are_the_bases_again_after_features_of_others(problem: Problem) -> None:
    before = problem.extracted({}, part="test", rows=[0, 1])
    changed = problem.extracted(problem.source_weights("noise-2"), part="test", rows=[0, 1])
    assert not torch.allclose(before, changed)
    assert torch.equal(problem.extracted({}, part="test", rows=[0, 1]), before)
