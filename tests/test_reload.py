"""What `verify` says of outputs that transformers and PEFT can open, and of those they cannot."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import Bench, numbers
from safetensors.torch import load_file, save_file
from tiny_merges import BERT, LLAMA, merged
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel

from svdmerge.claims import Check, Unchecked
from svdmerge.reload import run_transformers
from svdmerge.training.export import export_adapter
from svdmerge.verify import verify

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return merged(tmp_path_factory.mktemp("reload"), *BERT)


@pytest.fixture(scope="module")
def adapter(bench: Bench) -> Path:
    export_adapter(str(bench.out), str(bench.root / "lora"), form="peft", places={})
    return bench.root / "lora"


def check(place: Path, claim: str) -> Check:
    (found,) = (c for c in verify(str(place)) if claim in c.claim)
    return found


def test_transformers_opens_the_output_and_distances_are_those_of_dense_tensors(
    bench: Bench,
) -> None:
    found = verify(str(bench.out))
    assert [c.held for c in found] == [True] * 8
    loads = next(c for c in found if "transformers" in c.claim)
    assert loads.detail.startswith("BertForSequenceClassification")
    base, out, *sources = (numbers(m) for m in (bench.base, bench.out, *bench.sources))
    told = dict(pair.split(" ") for pair in found[-1].detail.split(", "))
    size = sum((t**2).sum() for t in base.values()) ** 0.5
    for name, model in zip(
        ("base", *(s.name for s in bench.sources)), (base, *sources), strict=True
    ):
        off = sum(((out[n] - model[n]) ** 2).sum() for n in base) ** 0.5
        assert abs(float(told[name]) - off / size) < 6e-3 * off / size


def test_without_transformers_the_claim_is_not_checked_and_the_way_out_told(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = check(bench.out, "transformers")
    assert found.held is None
    assert "pip install 'svdmerge[hf]'" in found.detail


def test_a_configuration_that_names_no_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "micro"}')
    with pytest.raises(Unchecked, match="names no model of transformers"):
        run_transformers(str(tmp_path))


def test_a_configuration_that_does_not_fit_the_weights_breaks_the_claim(tmp_path: Path) -> None:
    bench = merged(tmp_path, *LLAMA)
    config = json.loads((bench.out / "config.json").read_text())
    (bench.out / "config.json").write_text(json.dumps(config | {"hidden_size": 8, "head_dim": 4}))
    assert check(bench.out, "transformers").held is False


@pytest.mark.parametrize(
    "model",
    [
        ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=8, image_size=8, patch_size=4)),
        T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1,
                                            num_heads=2, decoder_start_token_id=0)),
    ],
    ids=["image", "encoder and decoder"],
)  # fmt: skip
def test_other_kinds_of_models_have_a_fixed_input_too(tmp_path: Path, model: Any) -> None:
    model.save_pretrained(tmp_path)
    name, outputs = run_transformers(str(tmp_path))
    again = run_transformers(str(tmp_path))[1]
    assert name == type(model).__name__
    assert outputs
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))


def test_an_adapter_of_full_rank_gives_the_merged_models_outputs(adapter: Path) -> None:
    found = verify(str(adapter))
    assert [c.held for c in found] == [True] * 3
    assert "off the merged model's by" in found[-1].detail


def test_an_adapter_that_changed_breaks_its_claims(bench: Bench, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("lora_B.weight"))
    try:
        save_file(tensors | {name: 2 * tensors[name]}, file)
        assert [c.held for c in verify(str(adapter))] == [False, True, False]
        save_file({n: t for n, t in tensors.items() if n != name}, file)
        found = check(adapter, "PEFT")
        assert "do not agree on" in found.detail
        save_file(tensors | {name: tensors[name] * torch.nan}, file)
        assert [c.held for c in verify(str(adapter))] == [False] * 3
    finally:
        file.write_bytes(whole)


def test_an_adapter_of_lower_rank_is_off_by_what_it_leaves_out(bench: Bench) -> None:
    place = bench.root / "lora-1"
    export_adapter(str(bench.out), str(place), form="peft", rank=1, places={})
    assert [c.held for c in verify(str(place))] == [True] * 3
