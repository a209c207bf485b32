"""Adapters that PEFT made for the usual architectures, merged, out again as a full model and as an
adapter: transformers and PEFT load both, and their logits are those of dense SVDs in float64."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merging import Bench, dense_axis, numbers, stack_of
from safetensors.torch import load_file
from timm_like import TimmLikeConfig, TimmLikeResNet, settled
from tiny import write_model
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from svdmerge.recipe import TuneConfig
from svdmerge.storage.checkpoint import open_checkpoint
from svdmerge.training.backbone import build_backbone, load_weights
from svdmerge.training.export import export_adapter
from svdmerge.training.peft_export import WEIGHTS
from svdmerge.verify import verify

peft = pytest.importorskip("peft")

K = 0.3
IDS = torch.arange(24).reshape(2, 12) % 20
TOKENS = {"input_ids": IDS}
LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
WIDTHS: dict[str, Any] = LAYERS | {"vocab_size": 20, "intermediate_size": 24}


def images(size: int) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An architecture, and what two adapters of it adapt."""

    make: Callable[[], PreTrainedModel]
    model: str | None = None
    """What `tune.model` would name, if it is not the class of the configuration."""
    inputs: dict[str, Tensor] = field(default_factory=lambda: TOKENS)
    one: dict[str, Any]
    other: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trip:
    """Adapters that were merged."""

    case: Case
    kind: type[PreTrainedModel]
    bench: Bench
    expected: Tensor
    """Logits of the dense computation."""


CASES = {
    "bert": Case(
        make=lambda: BertForSequenceClassification(
            BertConfig(**WIDTHS, max_position_embeddings=12, num_labels=3)
        ),
        one={"target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
        other={"target_modules": ["query", "dense"], "lora_bias": True, "use_rslora": True},
    ),
    "gpt2": Case(
        make=lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=12)
        ),
        one={"target_modules": ["c_attn"], "fan_in_fan_out": True},
        other={"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "llama": Case(
        make=lambda: LlamaForCausalLM(LlamaConfig(**WIDTHS, num_key_value_heads=1)),
        one={"target_modules": ["q_proj", "v_proj"]},
        other={"target_modules": "all-linear", "rank_pattern": {"q_proj": 5}},
    ),
    "mixture of experts": Case(
        make=lambda: MixtralForCausalLM(
            MixtralConfig(
                **WIDTHS, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2
            )
        ),
        one={"target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS},
        other={
            "target_modules": ["q_proj", "o_proj"],
            "target_parameters": [*EXPERTS, "gate.weight"],
            "rank_pattern": {"experts.gate_up_proj": 4},
        },
    ),
    "shared experts": Case(
        make=lambda: Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                **WIDTHS, num_key_value_heads=1, num_experts=3, num_experts_per_tok=2,
                moe_intermediate_size=12, shared_expert_intermediate_size=28,
            )
        ),
        one={"target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS},
        other={"target_modules": ["shared_expert.gate_proj", "shared_expert.down_proj"]},
    ),
    "stacks of experts": Case(
        make=lambda: GptOssForCausalLM(
            GptOssConfig(
                **WIDTHS, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
                head_dim=8,
            )
        ),
        one={"target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS},
        other={"target_modules": ["q_proj"], "target_parameters": EXPERTS[:1]},
    ),
    "vit": Case(
        make=lambda: ViTForImageClassification(
            ViTConfig(**LAYERS, intermediate_size=24, image_size=16, patch_size=8, num_labels=3)
        ),
        inputs=images(16),
        one={"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]},
        other={"target_modules": ["q_proj", "o_proj", "fc1", "fc2", "projection"]},
    ),
    "convolutions": Case(
        make=lambda: settled(TimmLikeResNet(TimmLikeConfig())),
        model="timm_like:build",
        inputs=images(8),
        one={"target_modules": ["conv1", "conv2"], "modules_to_save": ["fc"]},
        other={"target_modules": ["conv2", "downsample.0", "fc"]},
    ),
    "t5": Case(
        make=lambda: T5ForConditionalGeneration(
            T5Config(
                vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                decoder_start_token_id=0,
            )
        ),
        inputs={"input_ids": IDS, "decoder_input_ids": IDS.flip(1)},
        one={"target_modules": ["q", "v"]},
        other={"target_modules": ["q", "k", "o", "wi", "wo"]},
    ),
}  # fmt: skip


def adapter_in(
    folder: Path, kind: type[PreTrainedModel], base: Path, *, seed: int, **options: Any
) -> dict[str, Any]:
    """Save a random adapter of the base; the tensors of the model that PEFT merges it to."""
    adapted = peft.get_peft_model(kind.from_pretrained(base), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "dense")
    return numbers(folder / "dense")


def dense_model(folder: Path, base: Path, sources: list[dict[str, Any]]) -> Path:
    """The base with AXIS's merged differences, all of it dense and in float64 until saved."""
    start = numbers(base)
    merged = dense_axis(start, sources, k=K)
    tensors: dict[str, Tensor] = {}
    for name, array in load_file(base / "model.safetensors").items():
        parts = [merged[m] for m in stack_of(name, start[name]) or [name] if m in merged]
        delta = torch.tensor(np.array(parts)).reshape(array.shape) if parts else 0
        tensors[name] = (array + delta).to(array.dtype)
    write_model(folder, tensors, None)
    (folder / "config.json").write_text((base / "config.json").read_text())
    return folder


def loaded(kind: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """The model of a folder, which has exactly the tensors that it needs."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs)["logits"]


@pytest.fixture(scope="module", params=CASES)
def trip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trip:
    """Two adapters merged, and what the dense computation makes of them."""
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("trip")
    torch.manual_seed(0)
    model = case.make()
    kind, base = type(model), folder / "base"
    model.save_pretrained(base)
    sources = [
        adapter_in(folder / "one", kind, base, seed=1, r=4, lora_alpha=6, **case.one),
        adapter_in(folder / "other", kind, base, seed=2, r=3, **case.other),
    ]
    dense = dense_model(folder / "dense", base, sources)
    adapters = (folder / "one" / "adapter", folder / "other" / "adapter")
    bench = Bench(root=folder, base=base, sources=adapters)
    bench.run(parameters={"k": K})
    expected = logits(loaded(kind, dense), case.inputs)
    return Trip(case=case, kind=kind, bench=bench, expected=expected)


def test_the_merged_models_logits_are_those_of_dense_svds(trip: Trip) -> None:
    assert (
        logits(loaded(trip.kind, trip.bench.base), trip.case.inputs) - trip.expected
    ).abs().max() > 1e-2
    found = logits(loaded(trip.kind, trip.bench.out), trip.case.inputs)
    assert (found - trip.expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["mixture of experts", "stacks of experts"])
def test_experts_can_be_averaged(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.make()
    model.save_pretrained(tmp_path / "base")
    source = adapter_in(tmp_path / "one", type(model), tmp_path / "base", seed=1, r=4, **case.one)
    adapter = tmp_path / "one" / "adapter"
    bench = Bench(root=tmp_path, base=tmp_path / "base", sources=(adapter,))
    bench.run(policies=[{"match": "*experts*", "policy": "average"}])
    base, merged = numbers(bench.base), numbers(bench.out)
    experts = [n for n in base if "experts" in n and abs(source[n] - base[n]).max() > 0.1]
    assert experts
    assert max(abs(merged[n] - source[n]).max() for n in experts) <= 1e-5


def test_every_claim_of_the_output_holds(trip: Trip) -> None:
    checks = verify(str(trip.bench.out))
    assert [c.claim for c in checks if c.held is False] == []
    distances = checks[-1].detail
    assert distances.startswith("base "), distances


def test_tuning_starts_from_the_same_logits(trip: Trip) -> None:
    model = trip.case.model or f"transformers:{trip.kind.__name__}"
    config = TuneConfig(train="-", test="-", model=model)
    base = open_checkpoint(str(trip.bench.base))
    backbone = build_backbone(config, base=base)
    load_weights(backbone, checkpoint=open_checkpoint(str(trip.bench.out)), base=base)
    found = logits(backbone.module, trip.case.inputs)
    assert (found - trip.expected).abs().max() <= 1e-4


def test_so_are_those_of_the_base_with_the_merged_adapter(trip: Trip, tmp_path: Path) -> None:
    export_adapter(
        str(trip.bench.out), str(tmp_path), form="peft", model=trip.case.model, places={}
    )
    adapted = peft.PeftModel.from_pretrained(trip.kind.from_pretrained(trip.bench.base), tmp_path)
    assert set(load_file(tmp_path / WEIGHTS)) == set(peft.get_peft_model_state_dict(adapted))
    assert (logits(adapted, trip.case.inputs) - trip.expected).abs().max() <= 1e-4
