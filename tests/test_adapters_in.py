"""LoRA adapters as sources: never densified, mixed with full fine-tunes, as PEFT applies them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merging import command
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from svdmerge.engine.decompose import load_source
from svdmerge.engine.plan import make_plan
from svdmerge.recipe import Recipe, parse_recipe
from svdmerge.storage.adapter import WEIGHTS
from svdmerge.storage.checkpoint import open_checkpoint
from svdmerge.workflow import run

peft = pytest.importorskip("peft")

CONFIG = BertConfig(
    vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=24, max_position_embeddings=12,
)  # fmt: skip
QUERY = "encoder.layer.0.attention.self.query.weight"
Weights = dict[str, Tensor]


def base_in(folder: Path) -> BertModel:
    torch.manual_seed(0)
    model = BertModel(CONFIG)
    model.save_pretrained(folder / "base")
    return model


def adapter_in(folder: Path, name: str, *, seed: int, **options: Any) -> Weights:
    """Save an adapter of the base with random factors; the model's weights with it, by PEFT."""
    model = BertModel.from_pretrained(folder / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder / name)
    return {n: t.detach().double() for n, t in adapted.merge_and_unload().state_dict().items()}


def tuned_in(folder: Path, name: str, *, seed: int) -> Weights:
    """Save a full fine-tune of the base; its weights."""
    model = BertModel.from_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / name)
    return {n: t.detach().double() for n, t in model.state_dict().items()}


def recipe(folder: Path, models: list[str], **fields: Any) -> Recipe:
    """Random changes are as large as a base that was never trained."""
    raw = {
        "base_model": str(folder / "base"), "parameters": {"k": "30%"},
        "models": [{"model": model, "admit": True} for model in models],
        "store": str(folder / "store"), "out": str(folder / "out"),
    }  # fmt: skip
    return parse_recipe(raw | fields)


def axis(base: Weights, sources: list[Weights], *, share: float) -> Weights:
    """AXIS by dense SVDs in float64, written independently: top k over all, vectors averaged."""
    merged: Weights = {}
    for name, start in base.items():
        deltas = [s[name] - start for s in sources]
        if "embeddings" in name:
            merged[name] = start
        elif start.dim() == 2:
            triples = [
                (s, np.outer(u, v)) for d in deltas for s, u, v in zip(*_svd(d), strict=True)
            ]
            kept = sorted(triples, key=lambda t: -t[0])[: max(1, int(share * min(start.shape)))]
            merged[name] = start + torch.tensor(sum(s * outer for s, outer in kept))
        else:
            merged[name] = start + torch.stack(deltas).mean(0)
    return merged


def _svd(delta: Tensor) -> tuple[Any, Any, Any]:
    u, s, vh = np.linalg.svd(delta.numpy(), full_matrices=False)
    return s, u.T, vh


def assert_merged(folder: Path, wanted: Weights) -> None:
    found = load_file(folder / "out" / "model.safetensors")
    assert set(found) <= set(wanted)
    for name, tensor in found.items():
        assert torch.allclose(tensor.double(), wanted[name], atol=2e-6), name


def test_adapters_of_mixed_ranks_and_a_full_model_merge_as_dense_ones(tmp_path: Path) -> None:
    base = {n: t.double() for n, t in base_in(tmp_path).state_dict().items()}
    sources = [
        adapter_in(tmp_path, "a", seed=1, r=4, lora_alpha=8, target_modules=["query", "dense"]),
        adapter_in(
            tmp_path, "b", seed=2, r=2, use_rslora=True, target_modules=["query", "key"],
            rank_pattern={"key": 3}, lora_bias=True,
        ),
        tuned_in(tmp_path, "c", seed=3),
    ]  # fmt: skip
    run(recipe(tmp_path, [str(tmp_path / n) for n in "abc"]), address="none")
    assert_merged(tmp_path, axis(base, sources, share=0.3))


def test_the_base_with_an_adapter_is_the_adapter(tmp_path: Path) -> None:
    base_in(tmp_path)
    adapter_in(tmp_path, "a", seed=1, r=4, target_modules=["query"])
    alone = make_plan(recipe(tmp_path, [str(tmp_path / "a")]))
    named = make_plan(recipe(tmp_path, [f"{tmp_path}/base+{tmp_path}/a"]))
    assert alone.hash == named.hash


def test_an_adapter_on_another_model_comes_on_top_of_it(tmp_path: Path) -> None:
    base = {n: t.double() for n, t in base_in(tmp_path).state_dict().items()}
    tuned = tuned_in(tmp_path, "c", seed=3)
    change = adapter_in(tmp_path, "a", seed=1, r=4, target_modules=["query", "dense"])
    both = {n: t + change[n] - base[n] for n, t in tuned.items()}
    run(recipe(tmp_path, [f"{tmp_path}/c+{tmp_path}/a"]), address="none")
    assert_merged(tmp_path, axis(base, [both], share=0.3))


def test_components_of_an_adapter_are_those_of_the_dense_difference(tmp_path: Path) -> None:
    base = {n: t.double() for n, t in base_in(tmp_path).state_dict().items()}
    dense = adapter_in(tmp_path, "a", seed=1, r=4, lora_alpha=3, target_modules=["query"])
    wanted = recipe(tmp_path, [str(tmp_path / "a")], parameters={"k": "100%"})
    run(wanted, address="none")
    plan = make_plan(wanted)
    stored = load_source(plan, plan.sources[0])
    (spectrum,) = stored.spectra()[QUERY]
    values = torch.linalg.svdvals(dense[QUERY] - base[QUERY])
    assert spectrum.solver == "factored"
    assert len(spectrum.s) == 4
    assert spectrum.bound == 0.0
    np.testing.assert_allclose(spectrum.s, values[:4], rtol=1e-6)
    found = stored.read(QUERY, range(4)).dense()
    assert torch.allclose(found.double(), dense[QUERY] - base[QUERY], atol=1e-6)


def test_a_larger_budget_deepens_adapters_too(tmp_path: Path) -> None:
    base = {n: t.double() for n, t in base_in(tmp_path).state_dict().items()}
    sources = [adapter_in(tmp_path, "a", seed=1, r=8, target_modules=["query"])]
    for k in (1, 6):
        run(recipe(tmp_path, [str(tmp_path / "a")], parameters={"k": k}), address="none")
        assert_merged(tmp_path, axis(base, sources, share=k / 16))


@pytest.mark.parametrize("method", ["average", "ties", "tsv_m", "knots"])
def test_other_methods_take_adapters(tmp_path: Path, method: str) -> None:
    base_in(tmp_path)
    dense = [
        adapter_in(tmp_path, n, seed=i, r=2, target_modules=["query"]) for i, n in enumerate("ab")
    ]
    for name, tensors in zip("cd", dense, strict=True):
        (tmp_path / name).mkdir()
        kept = {
            n: t.float().contiguous() for n, t in tensors.items() if n != "embeddings.position_ids"
        }
        save_file(kept, tmp_path / name / "model.safetensors")
    # As deep as the adapters: TSV-M would give the rounding of dense copies directions of its own.
    parameters = {"k": 4} if method == "tsv_m" else {}
    outcomes: list[Weights] = []
    for pair in ("ab", "cd"):
        models = [str(tmp_path / n) for n in pair]
        run(recipe(tmp_path, models, merge_method=method, parameters=parameters), address="none")
        outcomes.append(load_file(tmp_path / "out" / "model.safetensors"))
    for name, tensor in outcomes[0].items():
        assert torch.allclose(tensor, outcomes[1][name], atol=1e-5), name


def test_a_hundred_adapters_are_merged_from_their_own_bytes_alone(tmp_path: Path) -> None:
    base_in(tmp_path)
    adapter_in(tmp_path, "a0", seed=0, r=2, target_modules=["query"])
    first = load_file(tmp_path / "a0" / WEIGHTS)
    for i in range(1, 100):
        (tmp_path / f"a{i}").mkdir()
        torch.manual_seed(i)
        save_file({n: torch.randn_like(t) for n, t in first.items()}, tmp_path / f"a{i}" / WEIGHTS)
        config = (tmp_path / "a0" / "adapter_config.json").read_text()
        (tmp_path / f"a{i}" / "adapter_config.json").write_text(config)
    report = run(recipe(tmp_path, [str(tmp_path / f"a{i}") for i in range(100)]), address="none")
    (decomposed,) = [s for s in report.stages if s.name == "decompose"]
    assert decomposed.bytes_read == 100 * sum(t.nbytes for t in first.values())


def test_what_an_adapter_changes_of_what_stays_the_bases_is_told(tmp_path: Path) -> None:
    base_in(tmp_path)
    adapter_in(tmp_path, "a", seed=1, r=2, target_modules=["word_embeddings", "query"])
    report = run(recipe(tmp_path, [str(tmp_path / "a")]), address="none")
    assert any("stay the base's" in line and "word_embeddings" in line for line in report.warnings)


def test_an_adapter_of_another_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    base_in(tmp_path)
    adapter_in(tmp_path, "a", seed=1, r=2, target_modules=["query"])
    other = BertConfig(**(CONFIG.to_dict() | {"hidden_size": 8, "num_attention_heads": 2}))
    BertModel(other).save_pretrained(tmp_path / "base")
    path = tmp_path / "recipe.yml"
    raw = {"base_model": str(tmp_path / "base"), "models": [str(tmp_path / "a")]}
    path.write_text(json.dumps(raw))
    done = command("plan", path, cwd=tmp_path)
    assert done.returncode == 1
    assert "do not fit" in done.stderr


def test_the_output_loads_with_transformers_and_gives_the_dense_models_outputs(
    tmp_path: Path,
) -> None:
    base = {n: t.double() for n, t in base_in(tmp_path).state_dict().items()}
    dense = [
        adapter_in(tmp_path, n, seed=i, r=3, target_modules=["query", "value"])
        for i, n in enumerate("ab")
    ]
    run(recipe(tmp_path, [str(tmp_path / n) for n in "ab"]), address="none")
    loaded = BertModel.from_pretrained(tmp_path / "out").eval()
    expected: nn.Module = BertModel(CONFIG).eval()
    wanted = axis(base, dense, share=0.3)
    expected.load_state_dict({n: t.float() for n, t in wanted.items()})
    ids = torch.arange(24).reshape(2, 12) % 20
    with torch.no_grad():
        got, told = (m(input_ids=ids).last_hidden_state for m in (loaded, expected))
    assert torch.allclose(got, told, atol=1e-4)
    assert open_checkpoint(str(tmp_path / "out")).tensors
