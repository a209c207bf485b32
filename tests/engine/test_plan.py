"""The plan: what happens to every tensor, what it costs, and that grouping is only transport."""

from pathlib import Path

import pytest
import tiny
import torch
from merging import (
    Bench,
    matrices_done,
    micro_bench,
    micro_model,
    outcome,
    tiny_bench,
    tree,
    units,
)

from svdmerge.core.params import Action
from svdmerge.engine.estimate import estimate
from svdmerge.engine.flops import svd_flops
from svdmerge.engine.plan import UNIT_BYTES, decompose_bytes, unit_bytes, write_bytes
from svdmerge.errors import MismatchError, RecipeError, ResourceError


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return tiny_bench(tmp_path)


def test_every_tensor_has_the_default_action_of_its_kind(bench: Bench) -> None:
    actions = bench.plan().actions
    assert actions[tiny.POSITION_IDS] is Action.EQUAL
    assert actions[tiny.WORD_EMBEDDINGS] is Action.BASE
    assert actions["embeddings.position_embeddings.weight"] is Action.BASE
    for name in (tiny.QUERY, tiny.KERNEL, tiny.EXPERT_STACK):
        assert actions[name] is Action.DECOMPOSE
    for name in (tiny.QUERY_BIAS, tiny.SCALAR):
        assert actions[name] is Action.AVERAGE
    assert set(actions) == set(tiny.read_model(bench.base))


def test_a_plan_reads_no_weights_and_writes_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svdmerge.storage.checkpoint import TensorRef

    monkeypatch.setattr(TensorRef, "read_bytes", None)
    before = tree(bench.root)
    estimate(bench.plan())
    assert tree(bench.root) == before


def test_kernels_are_matrices_of_out_by_the_rest_and_experts_one_by_one(bench: Bench) -> None:
    shapes = {p.id: (p.m, p.n) for p in bench.plan().parameters}
    assert shapes[tiny.KERNEL] == (8, 48)
    assert [shapes[f"{tiny.EXPERT_STACK}[{i}]"] for i in range(3)] == [(16, tiny.HIDDEN)] * 3


def test_budgets_are_shares_of_each_rank_or_counts_clamped_to_it(bench: Bench) -> None:
    by_share, by_count = bench.plan(parameters={"k": "10%"}), bench.plan(parameters={"k": 20})
    for p in by_share.parameters:
        if p.action is Action.DECOMPOSE:
            assert by_share.budget(p) == max(1, int(p.rank / 10))
            assert by_count.budget(p) == min(20, p.rank)
            assert by_share.depth(p) == min(16, p.rank)


def test_the_hash_covers_what_numbers_depend_on_and_nothing_else(bench: Bench) -> None:
    plan = bench.plan()
    same = [
        bench.plan(out=str(bench.root / "x")),
        bench.plan(store=str(bench.root / "y")),
        bench.plan(max_shard_size="1KB"),
        bench.plan(models=list(reversed(bench.raw()["models"]))),
    ]
    others = [
        bench.plan(parameters={"k": "30%"}),
        bench.plan(parameters={"k": "20%", "salience": "relative"}),
        bench.plan(parameters={"k": "20%", "scale": 0.5}),
        bench.plan(models=bench.raw()["models"][:2]),
        bench.plan(models=[{"model": m, "weight": 0.5} for m in bench.raw()["models"]]),
        bench.plan(merge_method="average"),
        bench.plan(out_dtype="float16"),
        bench.plan(policies=[{"match": "*.bias", "policy": "base"}]),
        bench.plan(resources={"threads": 2}),
    ]
    assert {p.hash for p in same} == {plan.hash}
    assert len({plan.hash, *(p.hash for p in others)}) == len(others) + 1


def test_another_version_of_a_source_is_another_plan(bench: Bench) -> None:
    before = bench.plan().hash
    tiny.tiny_source(bench.sources[0], bench.base, 77)
    assert bench.plan().hash != before


@pytest.mark.parametrize("unit_size", [1, 4096, UNIT_BYTES])
def test_groups_hold_every_matrix_once_in_order(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, unit_size: int
) -> None:
    monkeypatch.setattr("svdmerge.engine.plan.UNIT_BYTES", unit_size)
    plan = bench.plan()
    assert [p for group in plan.groups for p in group] == list(plan.parameters)
    assert (len(plan.groups) == len(plan.parameters)) == (unit_size == 1)


def test_grouping_changes_no_byte_and_one_grouping_reuses_anothers_store(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.run()
    first = outcome(bench.out)
    small, large = {"store": str(bench.root / "small")}, {"store": str(bench.store)}
    monkeypatch.setattr("svdmerge.engine.plan.UNIT_BYTES", 2000)
    report = bench.run(out=str(bench.root / "out-small"), **small)
    assert units(report) > 10 * len(bench.sources)
    assert outcome(bench.root / "out-small") == first

    again = {"parameters": {"k": "22%"}}  # another plan of the same depth
    report = bench.run(out=str(bench.root / "out-2"), **large, **again)
    assert units(report) == 0
    monkeypatch.undo()
    report = bench.run(out=str(bench.root / "out-3"), **small, **again)
    assert units(report) == 0
    assert outcome(bench.root / "out-2") == outcome(bench.root / "out-3")


def test_a_matrix_too_large_for_a_task_is_named_with_the_memory_it_needs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where small matrices come first: the memory it asks for is enough for all."""
    big = {"encoder.huge.weight": torch.zeros(300, 400), "aaa.weight": torch.zeros(150, 200)}
    base = tiny.write_model(bench.base, tiny.read_model(bench.base) | big)
    source = tiny.tiny_source(bench.root / "source", base, 1)
    monkeypatch.setattr("svdmerge.engine.plan.UNIT_BYTES", 1)
    models = {"models": [str(source)]}
    with pytest.raises(ResourceError) as caught:
        bench.plan(resources={"memory": "1MiB"}, **models)
    what, why, fix = caught.value.args
    assert "encoder.huge.weight" in what
    assert "300 x 400" in what
    assert "1.0 MiB (resources.memory)" in why
    enough = fix.split("memory: ")[1].split("}")[0]
    bench.plan(resources={"memory": enough}, **models)


def test_the_estimate_adds_up(bench: Bench) -> None:
    plan = bench.plan()
    found = estimate(plan)
    assert found.num_sources == 3
    assert found.num_units == 3 * len(plan.groups)
    assert sum(found.actions.values()) == len(plan.base.tensors) == len(found.tensors)
    assert found.peak_task_bytes == max(unit_bytes(plan, g) for g in plan.groups)
    read = sum(p.numel * 4 for p in plan.parameters if p.action is not Action.EQUAL)
    assert found.read_bytes == 2 * 3 * (read + 8 * tiny.POSITIONS)
    assert found.output_bytes == plan.base.nbytes
    lines = {t.name: t for t in found.tensors}
    assert (lines[tiny.QUERY].action, lines[tiny.QUERY].k) == ("decompose", 4)
    assert lines[tiny.WORD_EMBEDDINGS].k is None


def test_the_estimate_of_what_is_stored_and_read_is_what_a_run_does(bench: Bench) -> None:
    found = estimate(bench.plan())
    report = bench.run()
    stage = next(s for s in report.stages if s.name == "decompose")
    assert stage.num_units == found.num_units
    assert stage.bytes_read == pytest.approx(found.read_bytes, rel=0.01)
    # Arrow's headers weigh on blocks this small.
    assert found.store_bytes <= stage.bytes_stored <= 3 * found.store_bytes


def test_memory_and_flops_grow_with_the_matrix_and_not_with_sources(bench: Bench) -> None:
    from svdmerge.core.params import matrices

    small, large = (
        matrices("x", shape=s, action=Action.DECOMPOSE)[0] for s in ((64, 64), (128, 256))
    )
    assert decompose_bytes(small, depth=16) < decompose_bytes(large, depth=16)
    assert svd_flops(small) < svd_flops(large)
    alone = bench.plan(models=bench.raw()["models"][:1])
    assert estimate(alone).peak_task_bytes == estimate(bench.plan()).peak_task_bytes


def test_a_policy_of_error_refuses_the_tensor_by_name(bench: Bench) -> None:
    with pytest.raises(RecipeError, match=r"query\.weight: refused by"):
        bench.plan(policies=[{"match": "*.query.weight", "policy": "error"}])


# --- growing a store ---


def test_a_larger_budget_only_deepens_what_is_stored(tmp_path: Path) -> None:
    """Bytes stored before stay, and the outcome is that of a store filled at once."""
    bench = tiny_bench(tmp_path)
    # One source outweighs the others, and gives all.
    first, *others = (str(source) for source in bench.sources)
    models = {"models": [{"model": first, "weight": 1e6}, *others]}
    bench.run(parameters={"k": 4}, **models)
    before = tree(bench.store, below="components") | tree(bench.store, below="commits")
    report = bench.run(parameters={"k": 20}, **models)
    after = tree(bench.store, below="components") | tree(bench.store, below="commits")
    assert before.items() < after.items()
    wide = [p for p in bench.plan().parameters if p.rank > 16]
    assert matrices_done(report) == len(wide)
    deepened = outcome(bench.out)
    fresh = {"store": str(tmp_path / "fresh"), "out": str(tmp_path / "fresh-out")}
    bench.run(parameters={"k": 20}, **models, **fresh)
    assert outcome(tmp_path / "fresh-out") == deepened


def test_a_smaller_budget_decomposes_nothing(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path)
    bench.run(parameters={"k": 20})
    assert units(bench.run(parameters={"k": 3})) == 0
    shallow = outcome(bench.out)
    bench.run(parameters={"k": 3}, store=str(tmp_path / "fresh"), out=str(tmp_path / "fresh-out"))
    assert outcome(tmp_path / "fresh-out") == shallow


def test_a_ninth_source_decomposes_only_itself(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path, num_sources=9)
    models = bench.raw()["models"]
    bench.run(models=models[:8])
    before = tree(bench.store, below="components")
    report = bench.run(models=models)
    assert units(report) == len(bench.plan().groups) == 1
    assert before.items() < tree(bench.store, below="components").items()
    nine = outcome(bench.out)
    bench.run(models=models, store=str(tmp_path / "fresh"), out=str(tmp_path / "fresh-out"))
    assert outcome(tmp_path / "fresh-out") == nine


def test_removing_a_source_decomposes_nothing(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path)
    bench.run()
    assert units(bench.run(models=bench.raw()["models"][1:])) == 0


def test_a_lost_shard_is_computed_again_with_the_same_bytes(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path)
    bench.run()
    first, stored = outcome(bench.out), tree(bench.store, below="components")
    shard = next((bench.store / "components").rglob("*.arrow"))
    shard.unlink()
    report = bench.run(parameters={"k": "21%"})  # another plan: this one is done
    assert units(report) == 1
    assert tree(bench.store, below="components") == stored
    bench.run()
    assert outcome(bench.out) == first


def test_integers_of_another_dtype_are_told_from_headers(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path)
    steps = torch.tensor([7], dtype=torch.int32)
    micro_model(bench.sources[1], seed=2, base=bench.base, steps=steps)
    with pytest.raises(MismatchError, match=r"steps is I32 \[1\]"):
        bench.plan()


def test_two_matrices_of_one_name_are_told(tmp_path: Path) -> None:
    stack = {"experts.w": torch.zeros(2, 6, 5), "experts.w[0]": torch.zeros(6, 5)}
    bench = Bench(
        root=tmp_path,
        base=tiny.write_model(tmp_path / "base", stack),
        sources=(tiny.write_model(tmp_path / "source", stack),),
    )
    with pytest.raises(MismatchError, match=r"a matrix called experts\.w\[0\]"):
        bench.plan()


def test_copying_an_embedding_needs_its_own_size_and_casting_it_is_in_the_plan(
    tmp_path: Path,
) -> None:
    """An embedding is the largest tensor of most models, and usually only copied."""
    big = {"wte": torch.zeros(256, 1024), "a.weight": torch.zeros(8, 8)}
    bench = Bench(
        root=tmp_path,
        base=tiny.write_model(tmp_path / "base", big),
        sources=(tiny.write_model(tmp_path / "source", big),),
    )
    plan = bench.plan(resources={"memory": "1MiB"})
    assert write_bytes(plan)["wte"] == 1 << 20
    assert write_bytes(plan)["a.weight"] == 32 * 64 + 16 * (8 + 8)  # one component
    assert estimate(plan).peak_task_bytes == 1 << 20
    with pytest.raises(ResourceError, match=r"wte \[256, 1024\]: writing it needs 6\.0 MiB"):
        bench.plan(resources={"memory": "1MiB"}, out_dtype="bfloat16")
    report = bench.run(resources={"memory": "6MiB"}, out_dtype="bfloat16")
    assert report.status == "done"
