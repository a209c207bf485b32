"""The proof of an output: it holds on a fresh one, and names the claim that damage breaks."""

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import tiny
import torch
from merging import Bench, micro_bench, micro_model, tiny_bench
from safetensors.torch import save_file

from svdmerge.errors import OutputError
from svdmerge.training.peft_report import REPORT
from svdmerge.verify import verify

FILES, FINITE, SAME = "have their sha256", "reload and are finite", "base and sources are as"
NAMES, UNTOUCHED, MERGED = "names, shapes and dtypes", "untouched tensors", "base + merged factors"


def broken(out: Path) -> dict[str, str]:
    """Claims that did not hold, with what was told."""
    return {c.claim: c.detail for c in verify(str(out)) if c.held is False}


def only(found: dict[str, str], *claims: str) -> bool:
    """Whether exactly these claims are broken."""
    return len(found) == len(claims) and all(any(c in f for f in found) for c in claims)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = micro_bench(tmp_path)
    bench.run()
    return bench


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"merge_method": "average"},
        {"max_shard_size": "8KB"},
        {"out_dtype": "float16"},
        {"out_dtype": "bfloat16"},
        {"policies": [{"match": "*", "policy": "base"}]},
        {"parameters": {"k": "100%", "salience": "relative", "scale": 0.3}},
    ],
)
def test_every_claim_of_a_fresh_output_holds(tmp_path: Path, changes: dict[str, object]) -> None:
    bench = tiny_bench(tmp_path)
    bench.run(**changes)
    checks = verify(str(bench.out))
    assert [c.claim for c in checks if c.held is False] == []
    assert len(checks) == 8


def test_an_output_without_its_manifest_is_none(bench: Bench) -> None:
    (bench.out / "svdmerge_manifest.json").unlink()
    with pytest.raises(OutputError, match="no output of svdmerge"):
        verify(str(bench.out))


@pytest.mark.parametrize("text", ["{", "[]", '{"plan_hash": "x"}'])
def test_a_malformed_manifest_is_an_error_with_its_place(bench: Bench, text: str) -> None:
    (bench.out / "svdmerge_manifest.json").write_text(text)
    with pytest.raises(OutputError, match=r"svdmerge_manifest\.json: malformed"):
        verify(str(bench.out))


def test_a_manifest_whose_files_are_none_is_malformed(bench: Bench) -> None:
    place = bench.out / "svdmerge_manifest.json"
    fields = json.loads(place.read_text())
    for files in ([], {"model.safetensors": 3}, {"model.safetensors": {}}):
        place.write_text(json.dumps(fields | {"files": files}))
        with pytest.raises(OutputError, match=r"svdmerge_manifest\.json: malformed"):
            verify(str(bench.out))


def test_a_flipped_bit_in_the_weights_breaks_their_sha256(bench: Bench) -> None:
    file = bench.out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found = broken(bench.out)
    assert any(FILES in claim and "model.safetensors" in found[claim] for claim in found)


def test_a_changed_weight_breaks_the_claim_of_its_tensor(bench: Bench) -> None:
    tensors = tiny.read_model(bench.out)
    tensors["b.weight"][0, 0] += 0.01
    save_file(tensors, bench.out / "model.safetensors")
    found = broken(bench.out)
    assert only(found, FILES, MERGED)
    assert any("b.weight is off by" in detail for detail in found.values())


def test_a_changed_integer_breaks_the_claim_of_what_is_untouched(bench: Bench) -> None:
    tensors = tiny.read_model(bench.out) | {"steps": torch.tensor([8])}
    save_file(tensors, bench.out / "model.safetensors")
    found = broken(bench.out)
    assert only(found, FILES, UNTOUCHED)
    assert any("steps" in detail for detail in found.values())


def test_a_nan_breaks_the_claim_that_weights_are_finite(bench: Bench) -> None:
    tensors = tiny.read_model(bench.out)
    tensors["a.bias"][3] = float("nan")
    save_file(tensors, bench.out / "model.safetensors")
    found = broken(bench.out)
    assert only(found, FILES, FINITE, MERGED)
    assert any("a.bias holds NaN or Inf" in detail for detail in found.values())


@pytest.mark.parametrize("change", ["renamed", "dropped", "reshaped", "recast"])
def test_other_names_shapes_or_dtypes_break_their_claim_and_what_rests_on_it(
    bench: Bench, change: str
) -> None:
    tensors = tiny.read_model(bench.out)
    found = tensors.pop("b.weight")
    if change == "renamed":
        tensors["c.weight"] = found
    elif change == "reshaped":
        tensors["b.weight"] = found.T.contiguous()
    elif change == "recast":
        tensors["b.weight"] = found.half()
    save_file(tensors, bench.out / "model.safetensors")
    assert only(broken(bench.out), FILES, NAMES, UNTOUCHED, MERGED)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "svdmerge_recipe.yml", "provenance/components.parquet"],
)
def test_a_missing_file_is_named_and_no_claim_it_proves_holds(bench: Bench, name: str) -> None:
    (bench.out / name).unlink()
    found = broken(bench.out)
    assert any(FILES in claim and f"{name}: missing" in found[claim] for claim in found)
    if name == "model.safetensors":
        assert only(found, FILES, FINITE, NAMES, UNTOUCHED, MERGED)
    if name == "svdmerge_recipe.yml":
        assert only(found, FILES, SAME)


@pytest.mark.parametrize("name", ["extra.safetensors", "model.safetensors.index.json"])
def test_stray_weights_are_named(bench: Bench, name: str) -> None:
    if name.endswith(".json"):
        (bench.out / name).write_text('{"weight_map": {}}')
    else:
        shutil.copy(bench.out / "model.safetensors", bench.out / name)
    found = broken(bench.out)
    assert any(FILES in claim and f"{name}: not of this output" in found[claim] for claim in found)


def test_another_base_is_told(bench: Bench) -> None:
    micro_model(bench.base, seed=0)
    os.utime(bench.base / "model.safetensors", ns=(1, 1))
    assert only(broken(bench.out), SAME)


def test_a_lost_source_is_told(bench: Bench) -> None:
    shutil.rmtree(bench.sources[1])
    found = broken(bench.out)
    assert only(found, SAME)
    assert any(str(bench.sources[1]) in detail for detail in found.values())


def test_lost_factors_leave_the_claim_unproved(bench: Bench) -> None:
    shutil.rmtree(bench.store)
    assert only(broken(bench.out), MERGED)


def test_the_base_in_place_of_the_merge_is_told_where_the_cast_is_as_coarse(
    tmp_path: Path,
) -> None:
    """A fine-tune's differences may be smaller than half a unit of bfloat16's last place."""
    base = tiny.tiny_base(tmp_path / "base", dtype=torch.bfloat16)
    sources = tuple(
        tiny.tiny_source(tmp_path / f"source-{i}", base, i, scale=0.004) for i in (1, 2)
    )
    bench = Bench(root=tmp_path, base=base, sources=sources)
    bench.run()
    assert broken(bench.out) == {}
    shutil.copy(base / "model.safetensors", bench.out / "model.safetensors")
    place, file = bench.out / "svdmerge_manifest.json", bench.out / "model.safetensors"
    fields = json.loads(place.read_text())
    claim = {"size": file.stat().st_size, "sha256": sha256(file.read_bytes()).hexdigest()}
    place.write_text(json.dumps(fields | {"files": fields["files"] | {file.name: claim}}))
    found = broken(bench.out)
    assert only(found, MERGED)
    assert any("of its values are as expected" in detail for detail in found.values())


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_malformed_report_of_an_adapter_is_an_error_with_its_place(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / REPORT).write_text(text)
    with pytest.raises(OutputError, match=f"{REPORT}: malformed"):
        verify(str(tmp_path))


def test_an_adapter_whose_files_are_gone_breaks_its_claims(tmp_path: Path) -> None:
    fields = {"base": "b", "merged": "m", "model": "transformers:X", "files": {}, "matrices": {}}
    fields |= {"tuned": False, "rank": None, "relative_error": 0.0, "whole": []}
    (tmp_path / REPORT).write_text(json.dumps(fields))
    told = {c.claim: c for c in verify(str(tmp_path))}
    assert told["2 files have their sha256"].held is False
    assert told["weights are finite"].detail.endswith("adapter_model.safetensors: missing")
