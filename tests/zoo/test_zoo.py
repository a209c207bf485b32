"""The main job on real checkpoints: a folder named by SVDMERGE_ZOO with `base` and its fine-tunes.

Run with `SVDMERGE_ZOO=... pytest -m zoo -s`; measured worst errors are printed.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from merging import (
    Bench,
    dense_axis,
    distance,
    factor_deltas,
    numbers,
    outcome,
    output_deltas,
    stored_blocks,
    tree,
    units,
    worst_distance,
)
from safetensors import safe_open

from svdmerge.storage.checkpoint import open_checkpoint
from svdmerge.synthetic import perturbed_copy
from svdmerge.verify import verify
from svdmerge.workflow import run

pytestmark = [pytest.mark.zoo, pytest.mark.timeout(1800)]
TEN_PERCENT = {"parameters": {"k": "10%"}}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The zoo, merged once in this process at k = 10 %."""
    zoo = Path(os.environ["SVDMERGE_ZOO"])
    sources = tuple(
        sorted(p for p in zoo.iterdir() if (p / "config.json").exists() and p.name != "base")
    )
    assert len(sources) == 8
    bench = Bench(root=tmp_path_factory.mktemp("zoo"), base=zoo / "base", sources=sources)
    bench.run(**TEN_PERCENT)
    return bench


def headers(model: Path) -> dict[str, tuple[list[int], str]]:
    with safe_open(model / "model.safetensors", "pt") as file:
        return {
            n: (file.get_slice(n).get_shape(), file.get_slice(n).get_dtype()) for n in file.keys()  # noqa: SIM118
        }  # fmt: skip


def test_the_output_has_exactly_the_bases_names_shapes_and_dtypes(bench: Bench) -> None:
    assert headers(bench.out) == headers(bench.base)


def test_transformers_loads_the_output_with_no_missing_or_unexpected_keys(bench: Bench) -> None:
    from transformers import AutoModel

    model, info = AutoModel.from_pretrained(bench.out, output_loading_info=True)
    base, base_info = AutoModel.from_pretrained(bench.base, output_loading_info=True)
    assert not info["missing_keys"]
    # A buffer that newer versions compute themselves is as unexpected in the base as here.
    assert set(info["unexpected_keys"]) == set(base_info["unexpected_keys"])
    assert set(info["unexpected_keys"]) <= {"embeddings.position_ids"}
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in base.named_parameters()
    }


def test_every_merged_difference_equals_an_independent_dense_float64_axis(bench: Bench) -> None:
    base = numbers(bench.base)
    expected = dense_axis(base, [numbers(s) for s in bench.sources], k=0.1)
    before_cast = worst_distance(factor_deltas(bench.plan(**TEN_PERCENT)), expected)
    in_float32 = worst_distance(output_deltas(bench.out, base), expected)
    told = f"{before_cast:.2e} before the cast, {in_float32:.2e} in float32"
    print(f"\n{len(expected)} differences: worst relative error {told}")  # noqa: T201
    assert before_cast <= 1e-5
    assert in_float32 <= 2e-5


def test_biases_and_norms_are_averages(bench: Bench) -> None:
    base, merged = numbers(bench.base), numbers(bench.out)
    sources = [numbers(s) for s in bench.sources]
    names = [n for n in base if base[n].ndim == 1 and "embed" not in n]
    errors = {
        n: distance(merged[n] - base[n], np.mean([s[n] - base[n] for s in sources], axis=0))
        for n in names
    }
    print(f"\n{len(names)} vectors: worst relative error {max(errors.values()):.2e} in float32")  # noqa: T201
    assert len(names) > 40
    assert max(errors.values()) <= 2e-5


def test_embeddings_and_position_ids_are_bit_equal_to_the_base(bench: Bench) -> None:
    base, merged = open_checkpoint(str(bench.base)), open_checkpoint(str(bench.out))
    names = [n for n in base.tensors if n.startswith("embeddings.")]
    assert "embeddings.position_ids" in names
    for name in names:
        assert merged.tensors[name].read_bytes() == base.tensors[name].read_bytes()


def test_the_output_proves_its_claims(bench: Bench) -> None:
    assert [c.claim for c in verify(str(bench.out)) if c.held is False] == []


def test_one_source_at_full_budget_comes_back(bench: Bench, tmp_path: Path) -> None:
    only = Bench(root=tmp_path, base=bench.base, sources=bench.sources[:1])
    only.run(parameters={"k": "100%"})
    source, merged = numbers(only.sources[0]), numbers(only.out)
    base = numbers(only.base)
    touched = [n for n in source if "embed" not in n and not np.array_equal(source[n], base[n])]
    errors = {n: distance(merged[n], source[n]) for n in touched}
    print(f"\n{len(touched)} tensors: worst relative error {max(errors.values()):.2e}")  # noqa: T201
    assert max(errors.values()) <= 1e-6
    shutil.rmtree(only.store)


def test_running_again_decomposes_nothing(bench: Bench) -> None:
    report = bench.run(**TEN_PERCENT)
    assert (report.status, units(report)) == ("unchanged", 0)


def test_another_order_and_ray_give_the_same_bytes(
    bench: Bench, tmp_path: Path, ray_session: None
) -> None:
    expected = outcome(bench.out)
    models = list(reversed(bench.raw()["models"]))
    changes = {"models": models, "store": str(tmp_path / "store"), "out": str(tmp_path / "out")}
    run(bench.recipe(**(TEN_PERCENT | changes)), address="local")
    assert outcome(tmp_path / "out") == expected
    ours, theirs = (tree(s, below="components") for s in (bench.store, tmp_path / "store"))
    assert ours == theirs


def test_raising_k_recomputes_no_stored_block(bench: Bench, tmp_path: Path) -> None:
    grown = Bench(root=tmp_path / "grown", base=bench.base, sources=bench.sources)
    fresh = Bench(root=tmp_path / "fresh", base=bench.base, sources=bench.sources)
    grown.run(parameters={"k": "5%"})
    before, files = stored_blocks(grown.store), tree(grown.store, below="components")
    grown.run(parameters={"k": "20%"})
    fresh.run(parameters={"k": "20%"})
    after = stored_blocks(grown.store)
    print(f"\n{before.total()} blocks at 5 %, {after.total()} at 20 %")  # noqa: T201
    assert set(after.values()) == {1}
    assert before.keys() < after.keys()
    assert files.items() <= tree(grown.store, below="components").items()
    assert outcome(grown.out) == outcome(fresh.out)


def test_a_ninth_source_decomposes_only_itself(bench: Bench, tmp_path: Path) -> None:
    ninth = perturbed_copy(
        open_checkpoint(str(bench.sources[0])), tmp_path / "ninth", seed=9, noise=0.02
    )
    models = [*bench.raw()["models"], str(ninth)]
    changes = TEN_PERCENT | {"models": models, "out": str(tmp_path / "out")}
    report = bench.run(**changes)
    stage = next(s for s in report.stages if s.name == "decompose")
    plan = bench.plan(**changes)
    print(f"\n{stage.num_units} units, {stage.num_matrices} matrices of {9 * len(plan.parameters)}")  # noqa: T201
    assert stage.num_units == len(plan.groups)
    assert stage.num_matrices == len(plan.parameters)
