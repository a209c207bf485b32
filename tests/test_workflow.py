"""The whole workflow: what comes out, and that it depends on nothing it should not depend on."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import (
    Bench,
    dense_axis,
    distance,
    factor_deltas,
    inventory_of,
    micro_bench,
    micro_model,
    numbers,
    outcome,
    output_deltas,
    tiny_bench,
    tree,
    units,
    weights,
    worst_distance,
)
from safetensors.torch import load_file

from svdmerge.engine import tasks
from svdmerge.engine.decompose import load_source, pending
from svdmerge.engine.runtime import InProcess, open_runtime
from svdmerge.errors import ContentError, OutputError, ResourceError, StoreError
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import PROVENANCE
from svdmerge.workflow import Run, run

BEFORE_CAST, IN_FLOAT32 = 1e-5, 2e-5


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return tiny_bench(tmp_path)


def expected_deltas(bench: Bench, **options: Any) -> dict[str, np.ndarray]:
    sources = [numbers(s) for s in bench.sources]
    return dense_axis(numbers(bench.base), sources, **({"k": 0.2} | options))


def assert_is_axis(bench: Bench, changes: dict[str, Any], **options: Any) -> None:
    expected = expected_deltas(bench, **options)
    assert worst_distance(factor_deltas(bench.plan(**changes)), expected) <= BEFORE_CAST
    in_output = output_deltas(bench.out, numbers(bench.base))
    assert worst_distance(in_output, expected) <= IN_FLOAT32


# --- the numbers ---


@pytest.mark.parametrize(("written", "k"), [("10%", 0.1), (5, 5), (0.5, 0.5), (10_000, 10_000)])
def test_every_merged_difference_equals_a_dense_float64_axis(
    bench: Bench, written: str | int | float, k: float | int
) -> None:
    changes = {"parameters": {"k": written}}
    bench.run(**changes)
    assert_is_axis(bench, changes, k=k)


@pytest.mark.parametrize("salience", ["sigma", "relative"])
def test_weights_and_scale_and_salience_mean_what_they_say(bench: Bench, salience: str) -> None:
    loud = tiny.tiny_source(bench.root / "loud", bench.base, 9, scale=0.5)
    bench = Bench(root=bench.root, base=bench.base, sources=(*bench.sources, loud))
    by_source = [0.5, 2.0, 1.0, 0.3]
    changes = {
        "models": [
            {"model": str(s), "weight": w} for s, w in zip(bench.sources, by_source, strict=True)
        ],
        "parameters": {"k": "20%", "salience": salience, "scale": 0.7},
    }
    bench.run(**changes)
    assert_is_axis(bench, changes, source_weights=by_source, scale=0.7, salience=salience)


def test_relative_salience_takes_the_slots_of_a_loud_source_away(bench: Bench) -> None:
    loud = str(tiny.tiny_source(bench.root / "loud", bench.base, 9, scale=1.0))
    models = [*map(str, bench.sources), {"model": loud, "admit": True}]
    by_sigma = bench.run(models=models, parameters={"k": "20%", "salience": "sigma"})
    by_share = bench.run(models=models, parameters={"k": "20%", "salience": "relative"})
    assert by_sigma.kept[loud] == sum(by_sigma.kept.values())
    assert by_share.kept[loud] < 0.5 * sum(by_share.kept.values())


@settings(max_examples=15)
@given(
    k=st.one_of(st.integers(1, 12), st.floats(0.05, 1.0)),
    by_source=st.lists(st.floats(0.1, 4.0), min_size=3, max_size=3),
    salience=st.sampled_from(["sigma", "relative"]),
    scale=st.floats(0.1, 2.0),
)
def test_any_budget_weights_and_scale_give_the_dense_axis(
    tmp_path: Path, k: int | float, by_source: list[float], salience: str, scale: float
) -> None:
    bench = micro_bench(tmp_path)
    changes = {
        "models": [
            {"model": str(s), "weight": w} for s, w in zip(bench.sources, by_source, strict=True)
        ],
        "parameters": {"k": k, "salience": salience, "scale": scale},
    }
    bench.run(**changes)
    expected = expected_deltas(bench, k=k, source_weights=by_source, salience=salience, scale=scale)
    assert worst_distance(factor_deltas(bench.plan(**changes)), expected) <= BEFORE_CAST


def test_vectors_and_scalars_are_weighted_averages(bench: Bench) -> None:
    models = [{"model": str(s), "weight": w} for s, w in zip(bench.sources, (1, 2, 3), strict=True)]
    bench.run(models=models)
    base, merged = numbers(bench.base), numbers(bench.out)
    sources = [numbers(s) for s in bench.sources]
    for name in (tiny.QUERY_BIAS, tiny.SCALAR, "patch.projection.bias"):
        mean = sum(w * (s[name] - base[name]) for w, s in zip((1, 2, 3), sources, strict=True)) / 3
        assert distance(merged[name] - base[name], np.asarray(mean)) <= IN_FLOAT32


def test_embeddings_and_integers_are_bit_equal_to_the_base(bench: Bench) -> None:
    bench.run()
    base, merged = tiny.read_model(bench.base), tiny.read_model(bench.out)
    for name in (tiny.POSITION_IDS, tiny.WORD_EMBEDDINGS, "embeddings.position_embeddings.weight"):
        assert torch.equal(merged[name], base[name])
        assert merged[name].dtype == base[name].dtype


def test_names_shapes_and_dtypes_are_the_bases(tmp_path: Path) -> None:
    base = tiny.tiny_base(tmp_path / "base", dtype=torch.bfloat16)
    source = tiny.tiny_source(tmp_path / "source", base, 1, dtype=torch.float32)
    bench = Bench(root=tmp_path, base=base, sources=(source,))
    bench.run()
    started, merged = tiny.read_model(base), tiny.read_model(bench.out)
    assert {n: (t.shape, t.dtype) for n, t in merged.items()} == {
        n: (t.shape, t.dtype) for n, t in started.items()
    }


def test_one_source_at_full_budget_comes_back(bench: Bench) -> None:
    only = Bench(root=bench.root, base=bench.base, sources=bench.sources[:1])
    only.run(parameters={"k": "100%"})
    source, merged = numbers(only.sources[0]), numbers(only.out)
    base = numbers(only.base)
    for name in source:
        kept_as_base = "embed" in name or name == tiny.POSITION_IDS
        expected = base[name] if kept_as_base else source[name]
        assert distance(merged[name], expected) <= 1e-6, name


def test_each_slice_of_an_expert_stack_has_its_own_budget(bench: Bench) -> None:
    bench.run(parameters={"k": 3})
    kept = pq.read_table(bench.out / PROVENANCE).column("parameter").to_pylist()
    for i in range(tiny.EXPERTS):
        assert kept.count(f"{tiny.EXPERT_STACK}[{i}]") == 3
    assert kept.count(tiny.KERNEL) == 3


def test_average_is_the_weighted_mean_of_all_differences(bench: Bench) -> None:
    models = [{"model": str(s), "weight": w} for s, w in zip(bench.sources, (1, 2, 3), strict=True)]
    report = bench.run(merge_method="average", models=models, parameters={"scale": 0.5})
    base, merged = numbers(bench.base), numbers(bench.out)
    sources = [numbers(s) for s in bench.sources]
    for name in (tiny.QUERY, tiny.KERNEL, tiny.EXPERT_STACK, tiny.QUERY_BIAS):
        total = sum(w * (s[name] - base[name]) for w, s in zip((1, 2, 3), sources, strict=True))
        assert distance(merged[name] - base[name], 0.5 * total / 3) <= IN_FLOAT32
    assert np.array_equal(merged[tiny.WORD_EMBEDDINGS], base[tiny.WORD_EMBEDDINGS])
    assert set(report.kept.values()) == {0}


def test_both_methods_share_a_store_without_mixing(bench: Bench) -> None:
    bench.run()
    axis = outcome(bench.out)
    bench.run(merge_method="average")
    bench.run()
    assert outcome(bench.out) == axis
    fresh = {"store": str(bench.root / "other-store")}
    bench.run(merge_method="average", **fresh)
    average = outcome(bench.out)
    bench.run(merge_method="average")
    assert outcome(bench.out) == average


def test_the_adaptive_solver_merges_as_the_exact_one_and_stores_little(tmp_path: Path) -> None:
    def model(folder: str, seed: int, start: torch.Tensor | float = 0.0, size: float = 1.0) -> Path:
        generator = torch.Generator().manual_seed(seed)
        dense = torch.randn(220, 180, generator=generator, dtype=torch.float64)
        u, _, vh = torch.linalg.svd(dense, full_matrices=False)
        change = (u * size * torch.arange(1, 181) ** -0.7) @ vh
        return tiny.write_model(tmp_path / folder, {"a.weight": start + change})

    base = model("base", 0)
    start = tiny.read_model(base)["a.weight"].double()
    sources = tuple(model(f"{i}", i, start, size=3.0 if i == 1 else 1.0) for i in (1, 2, 3, 4))
    bench = Bench(root=tmp_path, base=base, sources=sources, admit=True)
    changes = {"parameters": {"k": 36}}
    bench.run(**changes)
    assert_is_axis(bench, changes, k=36)
    plan = bench.plan(**changes)
    held = {Path(s.reference).name: load_source(plan, s).held("a.weight") for s in plan.sources}
    # One block of each; the loud one's seventeenth component counts too.
    assert held == {"1": 48, "2": 16, "3": 16, "4": 16}


# --- policies, dtypes, files ---


def test_a_policy_decides_before_the_defaults(bench: Bench) -> None:
    policies = [
        {"match": tiny.QUERY, "policy": "base"},
        {"match": "*.key.weight", "policy": "average"},
        {"match": "*", "policy": "base"},
    ]
    bench.run(policies=policies)
    base, merged = numbers(bench.base), numbers(bench.out)
    changed = {name for name in base if not np.array_equal(base[name], merged[name])}
    keys = {f"encoder.layer.{i}.attention.self.key.weight" for i in range(tiny.LAYERS)}
    assert changed == keys
    sources = [numbers(s) for s in bench.sources]
    for name in keys:
        mean = sum(s[name] - base[name] for s in sources) / 3
        assert distance(merged[name] - base[name], mean) <= IN_FLOAT32


def test_an_embedding_is_decomposed_if_a_policy_says_so(bench: Bench) -> None:
    changes = {"policies": [{"match": tiny.WORD_EMBEDDINGS, "policy": "decompose"}]}
    bench.run(**changes)
    rank = min(tiny.VOCAB, tiny.HIDDEN)
    kept = pq.read_table(bench.out / PROVENANCE).column("parameter").to_pylist()
    assert kept.count(tiny.WORD_EMBEDDINGS) == int(0.2 * rank)


def test_a_merge_where_everything_stays_the_bases_is_the_base(bench: Bench) -> None:
    bench.run(policies=[{"match": "*", "policy": "base"}])
    base, merged = tiny.read_model(bench.base), tiny.read_model(bench.out)
    assert all(torch.equal(merged[name], base[name]) for name in base)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_out_dtype_casts_floats_and_leaves_integers(bench: Bench, dtype: str) -> None:
    bench.run()
    full = tiny.read_model(bench.out)
    bench.run(out_dtype=dtype)
    cast = tiny.read_model(bench.out)
    assert cast[tiny.POSITION_IDS].dtype == torch.int64
    for name in (tiny.QUERY, tiny.WORD_EMBEDDINGS, tiny.SCALAR):
        assert cast[name].dtype == getattr(torch, dtype)
        assert torch.allclose(cast[name].float(), full[name], rtol=8e-3, atol=1e-3)


def test_small_shards_come_with_an_index_that_counts_bytes(bench: Bench) -> None:
    bench.run()
    single = tiny.read_model(bench.out)
    bench.run(max_shard_size="8KB")
    files = {f.name: load_file(f) for f in bench.out.glob("*.safetensors")}
    index = json.loads((bench.out / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    num = len(files)
    assert sorted(files) == [f"model-{i + 1:05d}-of-{num:05d}.safetensors" for i in range(num)]
    assert index["weight_map"] == {name: file for file, part in files.items() for name in part}
    sizes = {
        file: sum(t.numel() * t.element_size() for t in part.values())
        for file, part in files.items()
    }
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(size <= 8000 or len(files[file]) == 1 for file, size in sizes.items())
    sharded = tiny.read_model(bench.out)
    assert set(sharded) == set(single)
    assert all(torch.equal(sharded[name], single[name]) for name in single)


def test_sharded_inputs_give_the_bytes_of_single_files(tmp_path: Path) -> None:
    single = tiny_bench(tmp_path / "single")
    base = tiny.tiny_base(tmp_path / "base", shards=3)
    sources = tuple(tiny.tiny_source(tmp_path / f"s{i}", base, i, shards=2) for i in (1, 2, 3))
    sharded = Bench(root=tmp_path, base=base, sources=sources)
    single.run()
    sharded.run(max_shard_size="1GB")
    assert weights(sharded.out) == weights(single.out)


def test_side_files_of_the_base_are_copied_and_indexes_are_not(bench: Bench) -> None:
    (bench.base / "vocab.txt").write_text("a\nb\n")
    (bench.base / "pytorch_model.bin.index.json").write_text("{}")
    bench.run()
    assert (bench.out / "vocab.txt").read_text() == "a\nb\n"
    assert (bench.out / "config.json").read_bytes() == (bench.base / "config.json").read_bytes()
    assert not (bench.out / "pytorch_model.bin.index.json").exists()


def test_claims_of_a_base_that_svdmerge_made_are_not_copied(bench: Bench) -> None:
    """With `tune.json` a merged model would pass for a tuned one, which a tuning may replace."""
    for name in ("tune.json", "targets.json", "adapter_config.json", "peft_manifest.json"):
        (bench.base / name).write_text("{}")
    (bench.base / "tokenizer.json").write_text("{}")
    bench.run()
    assert (bench.out / "tokenizer.json").exists()
    assert [p.name for p in bench.out.glob("*.json") if p.read_text() == "{}"] == ["tokenizer.json"]


def test_module_folders_of_the_base_are_copied_from_inside_it_only(bench: Bench) -> None:
    (bench.base / "1_Pooling").mkdir()
    (bench.base / "1_Pooling/config.json").write_text('{"mean": true}')
    (bench.root / "config.json").write_text('{"outside": true}')
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "../"}, {"path": ".."}, "odd"]
    (bench.base / "modules.json").write_text(json.dumps(modules))
    before = tree(bench.root)
    bench.run()
    assert (bench.out / "1_Pooling/config.json").read_text() == '{"mean": true}'
    after = tree(bench.root)
    new = {name for name in after if before.get(name) != after[name]}
    assert all(name.startswith(("out/", "store/")) for name in new)


def test_tensors_only_a_source_has_are_reported_and_left_out(bench: Bench) -> None:
    odd = tiny.tiny_source(
        bench.root / "odd", bench.base, 8, changes={"classifier.weight": torch.ones(2, tiny.HIDDEN)}
    )
    report = bench.run(models=[str(bench.sources[0]), str(odd)])
    assert len(report.warnings) == 1
    assert str(odd) in report.warnings[0]
    assert "classifier.weight" in report.warnings[0]
    assert "classifier.weight" not in tiny.read_model(bench.out)


def test_empty_tensors_and_untouched_matrices_pass_through(tmp_path: Path) -> None:
    empty = {"empty.bias": torch.zeros(0), "empty.weight": torch.zeros(0, 5)}
    base = micro_model(tmp_path / "base", seed=0, **empty)
    start = tiny.read_model(base)
    kept = empty | {"b.weight": start["b.weight"]}
    sources = tuple(micro_model(tmp_path / f"s{i}", seed=i, base=base, **kept) for i in (1, 2))
    bench = Bench(root=tmp_path, base=base, sources=sources)
    report = bench.run()
    merged = tiny.read_model(bench.out)
    assert torch.equal(merged["b.weight"], start["b.weight"])
    assert merged["empty.weight"].shape == (0, 5)
    assert "b.weight" not in pq.read_table(bench.out / PROVENANCE).column("parameter").to_pylist()
    assert report.status == "done"
    assert bench.run().status == "unchanged"


# --- the same bits ---


def test_a_repeated_run_in_a_fresh_store_gives_the_same_bytes(bench: Bench) -> None:
    bench.run()
    first = tree(bench.out)
    shutil.rmtree(bench.store)
    bench.run()
    assert tree(bench.out) == first


def test_the_order_of_sources_does_not_matter(bench: Bench) -> None:
    bench.run()
    first = outcome(bench.out)
    shutil.rmtree(bench.out)
    models = list(reversed(bench.raw()["models"]))
    bench.run(models=models, store=str(bench.root / "other-store"))
    assert outcome(bench.out) == first


def test_another_order_of_sources_is_the_same_plan(bench: Bench) -> None:
    bench.run()
    assert bench.run(models=list(reversed(bench.raw()["models"]))).status == "unchanged"


def test_moved_and_renamed_sources_give_the_same_numbers(bench: Bench) -> None:
    """Also where two sources share tensors, so that only their place could decide the order."""
    twin = tiny.tiny_source(bench.root / "twin", bench.base, 1)
    models = [*bench.sources, twin]
    by_source = [1.0, 0.8, 0.6, 1.7]

    def merged(places: list[Path]) -> tuple[dict[str, bytes], Any]:
        listed = [{"model": str(p), "weight": w} for p, w in zip(places, by_source, strict=True)]
        bench.run(models=listed)
        table = pq.read_table(bench.out / PROVENANCE).drop_columns(["model", "source"])
        return weights(bench.out), table

    first, kept = merged(models)
    for name in ("zebra", "apple", "x1", "x2"):
        moved = [bench.root / name / f"{name}-{i}" for i in range(len(models))]
        for old, new in zip(models, moved, strict=True):
            shutil.copytree(old, new)
        again, kept_again = merged(moved)
        assert again == first
        assert kept_again.equals(kept)


def test_ray_and_this_process_give_the_same_bytes(
    bench: Bench, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdmerge.engine.plan.UNIT_BYTES", 4096)
    bench.run()
    first = tree(bench.out)
    shutil.rmtree(bench.out)
    report = run(bench.recipe(store=str(bench.root / "ray-store")), address="local")
    # One name differs: the recipe tells its store.
    differing = {n for n, sha in tree(bench.out).items() if first.get(n) != sha}
    assert differing == {"svdmerge_recipe.yml", "README.md", "svdmerge_manifest.json"}
    assert units(report) > len(bench.sources)
    assert tree(bench.root / "ray-store", below="commits").keys() == {
        str(Path(p)) for p in tree(bench.store, below="commits")
    }
    assert tree(bench.root / "ray-store", below="components") == tree(
        bench.store, below="components"
    )


def test_one_ray_worker_gives_the_bytes_of_two(bench: Bench, ray_session: None) -> None:
    """Units that take both processors run one after another."""
    from dataclasses import replace

    from svdmerge.engine import decompose as stage

    # A function inside a function travels to workers by value: they do not know the tests.
    def with_one_thread(unit: Any) -> Any:
        from svdmerge.engine.tasks import decompose

        torch.set_num_threads(1)
        return decompose(unit)

    two = run(bench.recipe(store=str(bench.root / "two")), address="local")
    first = outcome(bench.out)
    shutil.rmtree(bench.out)
    with pytest.MonkeyPatch.context() as patch:
        made = stage._unit  # pyright: ignore[reportPrivateUsage]
        patch.setattr(stage, "_unit", lambda *a, **k: replace(made(*a, **k), threads=2))
        # Two threads would be another numerics class: they are taken back in the worker.
        patch.setattr(stage.tasks, "decompose", with_one_thread)
        one = run(bench.recipe(store=str(bench.root / "one")), address="local")
    assert outcome(bench.out) == first
    assert units(one) == units(two) == len(bench.sources)


# --- resuming ---


def test_running_again_decomposes_nothing_and_says_unchanged(bench: Bench) -> None:
    assert bench.run().status == "done"
    before = tree(bench.out)
    report = bench.run()
    assert report.status == "unchanged"
    assert units(report) == 0
    stored = sorted((bench.store / "runs").rglob("run.json"))
    assert len(stored) == 2
    told = [json.loads(path.read_text()) for path in stored]
    assert [t["status"] for t in told] == ["done", "unchanged"]
    assert told[1]["stages"] == []
    assert tree(bench.out) == before


def test_the_same_plan_into_another_folder_decomposes_and_merges_nothing(bench: Bench) -> None:
    bench.run()
    report = bench.run(out=str(bench.root / "elsewhere"))
    assert (units(report), units(report, "merge")) == (0, 0)
    assert outcome(bench.root / "elsewhere") == outcome(bench.out)


def test_a_lost_output_is_written_again_from_the_store(bench: Bench) -> None:
    bench.run()
    first = tree(bench.out)
    shutil.rmtree(bench.out)
    report = bench.run()
    assert units(report) == 0
    assert tree(bench.out) == first


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "stray"])
def test_a_damaged_output_is_rewritten_by_the_next_run(bench: Bench, damage: str) -> None:
    bench.run()
    first = tree(bench.out)
    file = bench.out / "model.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[-100] ^= 1
        file.write_bytes(data)
    elif damage == "truncated":
        file.write_bytes(data[:-4])
    elif damage == "missing":
        file.unlink()
    else:
        shutil.copy(file, bench.out / "another.safetensors")
    report = bench.run()
    assert report.status == "done"
    assert units(report) == 0
    assert tree(bench.out) == first


def test_a_foreign_output_folder_is_refused_and_left_alone(bench: Bench) -> None:
    bench.out.mkdir()
    (bench.out / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError) as caught:
        bench.run()
    assert str(bench.out) in str(caught.value)
    assert "thesis.tex" in str(caught.value)
    assert "another `out`" in str(caught.value)
    assert tree(bench.out).keys() == {"thesis.tex"}
    assert not bench.store.exists()


def test_an_output_of_another_run_is_replaced_whole(bench: Bench) -> None:
    bench.run(max_shard_size="8KB")
    assert len(list(bench.out.glob("*.safetensors"))) > 2
    bench.run()
    assert [f.name for f in bench.out.glob("*.safetensors*")] == ["model.safetensors"]
    leftovers = [p.name for p in bench.root.iterdir() if p.name.startswith(".")]
    assert leftovers == []


def test_leftovers_of_a_killed_writer_do_not_reach_the_output(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.run()
    first = tree(bench.out)
    shutil.rmtree(bench.out)
    from svdmerge.engine import assemble

    whole = assemble.write_model

    def littering(plan: Any, out: Folder, **options: Any) -> Any:
        path = Path(out.path(".tmp123.partial"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half a file of a killed worker")
        return whole(plan, out, **options)

    monkeypatch.setattr(assemble, "write_model", littering)
    bench.run()
    assert tree(bench.out) == first


def test_a_manifest_lists_every_file_with_its_sha256(bench: Bench) -> None:
    bench.run(max_shard_size="8KB")
    manifest = json.loads((bench.out / "svdmerge_manifest.json").read_text())
    found = tree(bench.out)
    del found["svdmerge_manifest.json"]
    assert {name: claim["sha256"] for name, claim in manifest["files"].items()} == found


def test_provenance_names_every_kept_component(bench: Bench) -> None:
    report = bench.run()
    table = pq.read_table(bench.out / PROVENANCE)
    rows = [r for r in table.to_pylist() if not r["parameter"].endswith("#flat")]
    by_model: dict[str, int] = {}
    for row in rows:
        by_model[row["model"]] = by_model.get(row["model"], 0) + 1
    assert by_model == {name: num for name, num in report.kept.items() if num}
    expected = expected_deltas(bench)
    for parameter in (tiny.QUERY, tiny.KERNEL):
        ours = [r for r in rows if r["parameter"] == parameter]
        assert [r["rank"] for r in ours] == list(range(len(ours)))
        assert [r["salience"] for r in ours] == sorted((r["salience"] for r in ours), reverse=True)
        assert len(ours) == np.linalg.matrix_rank(expected[parameter])


# --- other places ---


def test_a_store_and_an_output_in_memory_need_no_files(bench: Bench, memory_uri: str) -> None:
    bench.run()
    bench.run(store=f"{memory_uri}/store", out=f"{memory_uri}/out")
    out = Folder.at(f"{memory_uri}/out")
    assert out.read("model.safetensors") == weights(bench.out)["model.safetensors"]
    again = bench.run(store=f"{memory_uri}/store", out=f"{memory_uri}/out")
    assert again.status == "unchanged"


def test_other_processes_are_not_sent_to_this_ones_memory(
    bench: Bench, memory_uri: str, ray_session: None
) -> None:
    with pytest.raises(ResourceError, match="lies in this process's memory"):
        run(bench.recipe(store=f"{memory_uri}/store"), address="local")


def test_a_bucket_holds_the_store_and_the_output(bench: Bench, s3_uri: str) -> None:
    bench.run()
    changes = {"store": f"{s3_uri}/store", "out": f"{s3_uri}/out"}
    bench.run(**changes)
    out = Folder.at(f"{s3_uri}/out")
    assert out.read("model.safetensors") == weights(bench.out)["model.safetensors"]
    assert out.read(PROVENANCE) == outcome(bench.out)[PROVENANCE]
    assert bench.run(**changes).status == "unchanged"


def test_relative_places_are_those_of_the_working_directory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bench.root)
    bench.run(store="there/store", out="there/out")
    assert (bench.root / "there/out/model.safetensors").exists()


# --- stages one by one ---


def test_stages_called_one_by_one_give_what_run_gives(bench: Bench) -> None:
    bench.run()
    first = outcome(bench.out)
    shutil.rmtree(bench.out)
    recipe = bench.recipe(store=str(bench.root / "staged"))
    for stage in ("decompose", "select", "assemble"):
        with open_runtime("none") as runtime:
            getattr(Run(recipe, runtime=runtime), stage)()
    assert outcome(bench.out) == first


@pytest.mark.parametrize("stage", ["select", "assemble"])
def test_a_stage_before_its_time_says_which_command_comes_first(bench: Bench, stage: str) -> None:
    attempt = Run(bench.recipe(), runtime=InProcess())
    with pytest.raises(StoreError, match="Run `svdmerge"):
        getattr(attempt, stage)()
    assert not bench.out.exists()


def test_the_process_keeps_its_threads(bench: Bench) -> None:
    before = torch.get_num_threads()
    bench.run(resources={"threads": 2})
    assert torch.get_num_threads() == before


def test_a_value_that_the_output_dtype_cannot_hold_is_told_and_nothing_is_published(
    tmp_path: Path,
) -> None:
    bench = tiny_bench(tmp_path)
    for folder in (bench.base, *bench.sources):
        tensors = tiny.read_model(folder)
        tensors[tiny.QUERY] = tensors[tiny.QUERY] + 1e6
        tiny.write_model(folder, tensors)
    with pytest.raises(ContentError, match=tiny.QUERY):
        bench.run(out_dtype="float16")
    assert not bench.out.exists()


def test_another_configuration_of_the_base_is_another_output(bench: Bench) -> None:
    """It decides which tensors are embeddings, and is copied."""
    bench.run()
    config = bench.base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": tiny.INNER}))
    assert bench.run().status == "done"
    first = outcome(bench.out)
    assert (bench.out / "config.json").read_bytes() == config.read_bytes()
    bench.run(store=str(bench.root / "fresh"), out=str(bench.root / "fresh-out"))
    assert outcome(bench.root / "fresh-out") == first
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dropout": 0.5}))
    assert bench.run().status == "done"


def test_only_the_recipes_own_output_is_tuned(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path)
    tune = {"task": "tensor", "train": "train.parquet", "test": "test.parquet"}
    bench.run(parameters={"k": 6})
    attempt = Run(bench.recipe(parameters={"k": 2}, tune=tune), runtime=InProcess())
    before = tree(bench.out)
    with pytest.raises(StoreError, match="output of another recipe"):
        attempt.attempt(attempt.tune)
    assert tree(bench.out) == before


def test_a_run_in_between_with_other_depths_of_alike_units_hides_nothing(tmp_path: Path) -> None:
    """Units of the same matrices and the same greatest depth, but another matrix is less deep."""
    base = {"a.weight": torch.zeros(48, 48), "b.weight": torch.zeros(40, 40)}
    torch.manual_seed(0)
    models = [{n: torch.randn_like(t) for n, t in base.items()} for _ in range(2)]
    bench = Bench(
        root=tmp_path,
        base=tiny.write_model(tmp_path / "base", base),
        sources=tuple(tiny.write_model(tmp_path / f"source-{i}", m) for i, m in enumerate(models)),
        admit=True,
    )
    plan, shares = bench.plan(parameters={"k": 20}), {"parameters": {"k": 0.41}}
    assert [plan.depth(p) for p in plan.parameters] == [32, 32]
    assert [bench.plan(**shares).depth(p) for p in plan.parameters] == [32, 16]
    planned = list(pending(plan, inventory_of(plan)))
    bench.run(**shares)
    for unit in planned:
        tasks.decompose(unit)
    assert list(pending(plan, inventory_of(plan))) == []
    assert bench.run(parameters={"k": 20}).status == "done"
