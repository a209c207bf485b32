"""A source of another base is refused with the numbers, or admitted by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from merging import Bench, command, inventory_of, micro_bench, micro_model, outcome, tiny_bench
from safetensors.torch import save_file

from svdmerge.core.kinship import Kinship
from svdmerge.engine import kinship
from svdmerge.engine.runtime import InProcess
from svdmerge.errors import MismatchError
from svdmerge.progress import SILENT


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Three fine-tunes, and a model that shares nothing with the base but its shapes."""
    made = micro_bench(tmp_path)
    stranger = micro_model(tmp_path / "stranger", seed=9)
    return Bench(root=tmp_path, base=made.base, sources=(*made.sources, stranger))


def admitting(bench: Bench) -> list[Any]:
    return [*map(str, bench.sources[:3]), {"model": str(bench.sources[3]), "admit": True}]


@pytest.mark.parametrize("method", ["axis", "ties", "tsv_m"])
def test_a_source_of_another_base_is_refused_with_the_numbers(bench: Bench, method: str) -> None:
    with pytest.raises(MismatchError) as caught:
        bench.run(merge_method=method)
    what, why, fix = caught.value.args
    assert str(bench.sources[3]) in what
    assert str(bench.base) in what
    assert "times the base's norm, the others' median 0.0" in why
    assert ("effective rank" in why) == (method != "ties")
    assert "admit: true" in fix
    assert not bench.out.exists()
    assert not list(bench.store.rglob("selection.arrow"))


def test_selecting_alone_refuses_it_too(bench: Bench) -> None:
    recipe = bench.write_recipe()
    assert command("decompose", recipe, "--address", "none").returncode == 0
    done = command("select", recipe, "--address", "none")
    assert done.returncode == 1
    assert "not fine-tuned from" in done.stderr


def test_admitted_by_name_it_is_merged_and_told(bench: Bench) -> None:
    report = bench.run(models=admitting(bench))
    assert report.status == "done"
    (told,) = report.warnings
    assert told.startswith(f"{bench.sources[3]}: is admitted, though its difference is 1.")
    stored = next((bench.store / "runs").rglob("run.json"))
    norms = {n: k["norm"] for n, k in json.loads(stored.read_text())["kinship"].items()}
    assert norms.pop(str(bench.sources[3])) > 1
    assert all(0.08 < norm < 0.12 for norm in norms.values())


def test_admitting_changes_no_byte_of_the_merge(bench: Bench) -> None:
    bench.run(models=list(map(str, bench.sources[:3])))
    first = outcome(bench.out)
    models = [{"model": str(s), "admit": True} for s in bench.sources[:3]]
    bench.run(models=models)
    assert outcome(bench.out) == first


def test_the_numbers_are_those_of_the_weights(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path)
    bench.run(parameters={"k": "100%", "svd": "exact"})
    plan = bench.plan(parameters={"k": "100%", "svd": "exact"})
    found = kinship.stored_kinships(
        plan, inventory_of(plan), runtime=InProcess(), progress=SILENT
    )  # fmt: skip
    start, own = (tiny.read_model(p) for p in (bench.base, bench.sources[0]))
    squares, ranks = torch.zeros(2, dtype=torch.float64), list[float]()
    for p in (p for p in plan.parameters if p.is_factored):
        base, source = (
            t[p.tensor].double().reshape(-1)[p.start : p.start + p.numel].reshape(p.m, p.n)
            for t in (start, own)
        )
        s = torch.linalg.svdvals(source - base)
        squares += torch.stack([(s**2).sum(), (base**2).sum()])
        ranks.append(float((s**2).sum() / s[0] ** 2 / len(s)))
    got = found[str(bench.sources[0])]
    assert got is not None
    assert got.norm == pytest.approx(float((squares[0] / squares[1]) ** 0.5), rel=1e-9)
    assert got.effective_rank == pytest.approx(float(torch.tensor(ranks).quantile(0.5)), rel=1e-5)


def test_an_adapter_is_not_judged(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path)
    (tmp_path / "lora").mkdir()
    pair = {"a.lora_A.weight": 50 * torch.randn(2, 18), "a.lora_B.weight": torch.randn(24, 2)}
    head = {"b.weight": 50 * torch.randn(9, 20)}  # saved whole
    save_file(pair | head, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    models = [str(bench.sources[0]), str(tmp_path / "lora")]
    report = bench.run(models=models)
    assert report.kinship[str(tmp_path / "lora")] is None
    assert isinstance(report.kinship[str(bench.sources[0])], Kinship)
    looked = kinship.deep_plan(bench.plan(models=models, store=str(tmp_path / "empty")))
    assert looked.kinships[str(tmp_path / "lora")] is None


# --- plan --deep ---


def test_a_deep_plan_reads_a_sample_and_says_what_it_took(bench: Bench) -> None:
    done = command("plan", bench.write_recipe(), "--deep")
    assert done.returncode == 1
    assert "Distance to the base" in done.stdout
    assert "0 of 4 sources known from the store" in done.stdout
    assert "not fine-tuned from" in done.stderr
    looked = json.loads(command("plan", bench.write_recipe(), "--deep", "--json").stdout)["deep"]
    # Both matrices are small enough to be read whole, the base's once.
    assert looked["read_bytes"] == 5 * 4 * (24 * 18 + 9 * 20)
    assert looked["kinships"][str(bench.sources[3])]["norm"] > 1
    assert not bench.store.exists()


def test_a_deep_plan_knows_from_the_store_what_is_there(bench: Bench) -> None:
    bench.run(models=list(map(str, bench.sources[:3])))
    looked = kinship.deep_plan(bench.plan())
    assert set(looked.from_store) == set(map(str, bench.sources[:3]))
    assert looked.read_bytes == 2 * 4 * (24 * 18 + 9 * 20)
    assert kinship.deep_plan(bench.plan(models=admitting(bench)[:3])).read_bytes == 0


def test_a_sample_is_a_few_rows_of_a_few_matrices(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinship, "SAMPLE_MATRICES", 1)
    monkeypatch.setattr(kinship, "SAMPLE_ENTRIES", 40)
    looked = kinship.deep_plan(bench.plan())
    assert looked.read_bytes == 5 * 4 * 2 * 18
    assert [n for n, k in looked.kinships.items() if k is not None and k.norm > 0.7] == [
        str(bench.sources[3])
    ]
