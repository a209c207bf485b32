"""Tick: nothing new costs nothing, what is new is merged, judged and released; rollback."""

import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import (
    Bench,
    matrices_done,
    micro_bench,
    micro_model,
    tiny_bench,
    units,
    weights,
)
from safetensors.torch import load_file, save_file
from targeted import target_bench, tune_section
from tiny import tiny_source

from svdmerge.errors import OutputError, RecipeError, StoreError
from svdmerge.rollback import rollback
from svdmerge.storage.checkpoint import TensorRef
from svdmerge.storage.releases import Release
from svdmerge.tick import TickResult, releases_of, tick
from svdmerge.verify import verify


def pattern(bench: Bench, **changes: Any) -> dict[str, Any]:
    """A recipe that takes whatever source there is."""
    return {"models": [f"{bench.root}/source-*"]} | changes


def ticked(bench: Bench, **changes: Any) -> TickResult:
    return tick(bench.recipe(**pattern(bench, **changes)), address="none")


def released(bench: Bench, **changes: Any) -> Release:
    found = ticked(bench, **changes)
    assert found.status == "released", found.why
    assert found.release is not None
    return found.release


def content(release: Release) -> dict[str, bytes]:
    return weights(Path(release.model))


def fresh(bench: Bench, **changes: Any) -> dict[str, bytes]:
    """The weights of a merge of what there is now, in a store of its own."""
    root = bench.root / "fresh"
    shutil.rmtree(root, ignore_errors=True)
    bench.run(**pattern(bench, store=str(root / "store"), out=str(root / "out"), **changes))
    return weights(root / "out")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return micro_bench(tmp_path)


# --- nothing new, something new ---


def test_a_tick_with_nothing_new_reads_no_weight_and_writes_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = released(bench)
    assert first.n == 1
    before = sorted(p for p in bench.root.rglob("*"))

    def fail(*args: object, **options: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(TensorRef, "read_bytes", fail)
    again = ticked(bench)
    assert (again.status, again.release) == ("unchanged", first)
    assert sorted(p for p in bench.root.rglob("*")) == before


def test_the_first_release_is_what_a_run_makes_and_can_be_verified(bench: Bench) -> None:
    first = released(bench)
    assert content(first) == fresh(bench)
    assert all(check.held for check in verify(first.model))
    assert set(first.sources) == {str(s) for s in bench.sources}


def test_one_more_source_decomposes_its_own_units_alone(bench: Bench) -> None:
    first = ticked(bench)
    assert first.run is not None
    per_source = units(first.run) // len(bench.sources)
    micro_model(bench.root / "source-9", seed=9, base=bench.base)
    second = ticked(bench)
    assert second.run is not None
    assert second.release is not None
    assert units(second.run) == per_source
    assert second.release.added == (str(bench.root / "source-9"),)
    assert second.release.n == 2
    assert content(second.release) == fresh(bench)


def test_only_matrices_whose_selection_changed_are_merged_again(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path)
    first = ticked(bench)
    # It wins a place in no matrix of layer 1, but moves every average.
    tiny_source(bench.root / "source-9", bench.base, 9, scale=1e-4)
    second = ticked(bench)
    assert first.run is not None
    assert second.run is not None
    assert second.release is not None
    vectors = sum(1 for p in bench.plan().parameters if p.action == "average")
    assert 0 < matrices_done(second.run, "merge") <= vectors < matrices_done(first.run, "merge")
    assert content(second.release) == fresh(bench)


def test_a_source_that_goes_or_changes_in_place_is_told(bench: Bench) -> None:
    released(bench)
    micro_model(bench.sources[0], seed=77, base=bench.base)
    changed = released(bench)
    assert changed.changed == (str(bench.sources[0]),)
    shutil.rmtree(bench.sources[1])
    gone = released(bench)
    assert gone.removed == (str(bench.sources[1]),)
    assert "1 removed" in gone.why
    assert content(gone) == fresh(bench)


def test_another_recipe_releases_anew_and_says_so(bench: Bench) -> None:
    released(bench)
    again = released(bench, parameters={"k": 3})
    assert "another recipe" in again.why


def arrivals(rng: random.Random, bench: Bench) -> Iterator[None]:
    """Sources that appear, change and go, in random order; two stay at least."""
    number = 100
    while True:
        there = sorted(bench.root.glob("source-*"))
        what = rng.choice(["add", "change", "remove"]) if len(there) > 2 else "add"
        number += 1
        if what == "add":
            micro_model(bench.root / f"source-{number}", seed=number, base=bench.base)
        elif what == "change":
            micro_model(rng.choice(there), seed=number, base=bench.base)
        else:
            shutil.rmtree(rng.choice(there))
        yield


def test_fifty_ticks_in_random_order_end_as_a_fresh_merge(bench: Bench) -> None:
    rng = random.Random(7)
    changes = arrivals(rng, bench)
    last = released(bench)
    for _ in range(50):
        for _ in range(rng.randint(0, 2)):
            next(changes)
        found = ticked(bench)
        assert found.release is not None
        last = found.release
    assert last.n > 20
    assert content(last) == fresh(bench)
    assert len(list(bench.out.iterdir())) == 10  # the models that are kept


# --- sources that cannot be used ---


def test_a_source_that_cannot_be_used_stops_the_release_or_is_left_out(bench: Bench) -> None:
    first = released(bench)
    bad = bench.root / "source-8"
    bad.mkdir()
    (bad / "pytorch_model.bin").write_bytes(b"pickle")
    stopped = ticked(bench)
    assert (stopped.status, stopped.release, stopped.is_news) == ("refused", first, True)
    assert "pickle" in stopped.why
    assert not ticked(bench).is_news
    assert ticked(bench, tick={"unfit": "skip"}).status == "unchanged"
    micro_model(bench.root / "source-9", seed=9, base=bench.base)
    skipped = released(bench, tick={"unfit": "skip"})
    assert list(skipped.skipped) == [str(bad)]
    assert str(bad) not in skipped.sources


def test_a_source_with_nan_is_refused_once_and_not_read_again(bench: Bench) -> None:
    first = released(bench)
    bad = micro_model(
        bench.root / "source-9", seed=9, base=bench.base, **{"a.bias": torch.full((24,), torch.nan)}
    )
    refused = ticked(bench)
    assert (refused.status, refused.release) == ("refused", first)
    assert str(bad) in refused.why
    assert "NaN" in refused.why
    again = ticked(bench)
    assert (again.status, again.run, again.why) == ("refused", None, refused.why)
    micro_model(bad, seed=9, base=bench.base)
    assert released(bench).added == (str(bad),)


def test_a_pattern_that_matches_nothing_is_an_error_not_a_release(bench: Bench) -> None:
    released(bench)
    for source in bench.sources:
        shutil.rmtree(source)
    with pytest.raises(RecipeError, match="matches nothing"):
        ticked(bench)


def test_a_named_source_that_is_gone_stops_the_release(bench: Bench) -> None:
    recipe = {"models": [str(s) for s in bench.sources]}
    released(bench, **recipe)
    shutil.rmtree(bench.sources[2])
    found = ticked(bench, **recipe)
    assert found.status == "refused"
    assert str(bench.sources[2]) in found.why


# --- the gate ---


def gated(bench: Bench, **changes: Any) -> dict[str, Any]:
    examples = tune_section(bench.root)
    return {
        "parameters": {"k": "100%"},
        "models": [str(bench.root / "helper*")],
        "gate": {"margin": 0.05, "examples": examples},
    } | changes


def corrupted(good: Path, bad: Path) -> Path:
    """A copy whose weights are noise of ten times their size."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: 10 * t.std() * torch.randn(t.shape, generator=generator)
        for name, t in load_file(good / "model.safetensors").items()
    }
    bad.mkdir()
    save_file(tensors, bad / "model.safetensors")
    (bad / "config.json").write_text("{}")
    return bad


def test_the_gate_refuses_a_release_with_a_corrupted_source_and_says_why(tmp_path: Path) -> None:
    bench = target_bench(tmp_path / "target")
    first = released(bench, **gated(bench))
    assert first.measures["this"] > 0.9
    bad = corrupted(bench.root / "helper", bench.root / "helper-noise")
    refused = ticked(bench, **gated(bench))
    assert (refused.status, refused.release) == ("refused", first)
    assert str(bad) in refused.why
    assert "at most 0.05 worse" in refused.why
    assert len(list(bench.out.iterdir())) == 1
    again = ticked(bench, **gated(bench))
    assert (again.status, again.run) == ("refused", None)
    wide = {"gate": {"margin": 1.0, "examples": tune_section(bench.root)}}
    assert released(bench, **gated(bench, **wide)).n == 2


def test_a_tuned_model_is_released_beside_its_merged_one(tmp_path: Path) -> None:
    bench = target_bench(tmp_path / "target")
    changes = gated(bench, tune=tune_section(bench.root), gate={})
    first = released(bench, **changes)
    assert first.tuned is not None
    assert (Path(first.tuned) / "tune.json").exists()
    assert ticked(bench, **changes).status == "unchanged"
    with pytest.raises(RecipeError, match=r"tune\.out"):
        ticked(bench, **(changes | {"tune": tune_section(bench.root, out=str(bench.root / "t"))}))


# --- rollback ---


def test_rollback_releases_the_older_content_and_ticks_leave_it(bench: Bench) -> None:
    first = released(bench)
    micro_model(bench.root / "source-9", seed=9, base=bench.base)
    second = released(bench)
    back = rollback(bench.recipe(**pattern(bench))).release
    assert back is not None
    assert (back.n, back.content, back.model) == (3, first.content, first.model)
    assert back.removed == second.added
    held = ticked(bench)
    assert (held.status, held.release) == ("held", back)
    assert "rolled back" in held.why
    forward = rollback(bench.recipe(**pattern(bench)), 2).release
    assert forward is not None
    assert (forward.n, forward.content) == (4, second.content)
    assert ticked(bench).status == "unchanged"
    micro_model(bench.root / "source-8", seed=8, base=bench.base)
    assert released(bench).n == 5


def test_rollback_refuses_what_is_not_there(bench: Bench) -> None:
    recipe = bench.recipe(**pattern(bench))
    with pytest.raises(StoreError, match="holds no other release"):
        rollback(recipe)
    first = released(bench)
    with pytest.raises(StoreError, match="there is no release 5"):
        rollback(recipe, 5)
    micro_model(bench.root / "source-9", seed=9, base=bench.base)
    second = released(bench)
    next(Path(first.model).glob("*.safetensors")).unlink()
    with pytest.raises(OutputError, match="gone or not whole"):
        rollback(recipe)
    assert releases_of(recipe).current() == second


# --- places ---


def test_places_of_other_releases_and_of_runs_are_refused(bench: Bench) -> None:
    released(bench)
    with pytest.raises(RecipeError, match="another `out`"):
        ticked(bench, out=str(bench.root / "elsewhere"))
    with pytest.raises(OutputError, match="holds something else"):
        bench.run()
    bench.run(out=str(bench.root / "run"))
    with pytest.raises(RecipeError, match="is the output of a run"):
        ticked(bench, out=str(bench.root / "run"), tick={"releases": str(bench.root / "r")})


def test_a_release_whose_model_is_gone_is_made_again(bench: Bench) -> None:
    first = released(bench)
    shutil.rmtree(first.model)
    again = released(bench)
    assert (again.n, again.content) == (2, first.content)


# --- two at once ---


def test_of_two_ticks_at_once_one_releases_and_the_other_follows(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svdmerge import workflow as module

    real, others = module.Run.all, list[TickResult]()

    def interrupted(run: Any) -> Any:
        monkeypatch.setattr(module.Run, "all", real)
        others.append(ticked(bench))
        return real(run)

    monkeypatch.setattr(module.Run, "all", interrupted)
    late = ticked(bench)
    assert [o.status for o in others] == ["released"]
    # It was begun before: what the other knows is no older.
    assert late.status == "unchanged"
    assert late.release == others[0].release
    assert len(list(bench.out.iterdir())) == 1


def test_a_tick_that_slept_through_anothers_release_cannot_undo_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svdmerge import workflow as module

    real = module.Run.all

    def interrupted(run: Any) -> Any:
        monkeypatch.setattr(module.Run, "all", real)
        micro_model(bench.root / "source-9", seed=9, base=bench.base)
        released(bench)
        return real(run)

    monkeypatch.setattr(module.Run, "all", interrupted)
    with pytest.raises(OutputError, match="release 1 came between"):
        ticked(bench)
    current = releases_of(bench.recipe(**pattern(bench))).current()
    assert current is not None
    assert content(current) == fresh(bench)


def test_a_release_number_is_given_once_whoever_asks(bench: Bench) -> None:
    first = released(bench)
    releases = releases_of(bench.recipe(**pattern(bench)))
    epochs = [releases.take_epoch() for _ in range(3)]
    assert epochs == sorted(set(epochs))
    drafts = [replace(first, n=2, epoch=epoch, why=str(epoch)) for epoch in epochs]
    assert releases.publish(drafts[1])
    assert releases.publish(drafts[1])  # an answer that was lost
    with pytest.raises(OutputError, match="came between"):
        releases.publish(drafts[0])
    assert not releases.publish(drafts[2])  # it must be judged again, as number 3
    assert releases.current() == drafts[1]


# --- errors are told ---


def test_a_failed_tick_releases_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = released(bench)
    micro_model(bench.root / "source-9", seed=9, base=bench.base)

    def fail(*args: object, **options: object) -> None:
        raise StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("svdmerge.workflow.Run.all", fail)
        with pytest.raises(StoreError):
            ticked(bench)
    assert releases_of(bench.recipe(**pattern(bench))).current() == first
    assert released(bench).n == 2
