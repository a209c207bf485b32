"""Adapters that PEFT wrote, and other trainers' spellings, are the differences that they apply."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
)

from svdmerge.errors import CheckpointError
from svdmerge.storage.adapter import CONFIG, WEIGHTS, Adapter, adapter_file, open_adapter
from svdmerge.storage.architecture import BaseNames
from svdmerge.storage.checkpoint import open_checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.low_rank import LowRank

peft = pytest.importorskip("peft")

BERT = BertConfig(
    vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=24, max_position_embeddings=12, num_labels=3,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=20, n_positions=12, n_embd=16, n_layer=2, n_head=2)
RESNET = ResNetConfig(
    num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
)


def adapt(model: PreTrainedModel, folder: Path, **options: Any) -> dict[str, Tensor]:
    """What the model's tensors are with an adapter whose factors are random; base and adapter are
    saved below the folder."""
    torch.manual_seed(0)
    model.save_pretrained(folder / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter) + (0.1 if "bias" in name else 0))
    adapted.save_pretrained(folder / "adapter")
    return {n: t.detach().double() for n, t in adapted.merge_and_unload().state_dict().items()}


def read(folder: Path) -> Adapter:
    base = open_checkpoint(str(folder / "base"))
    shapes = {name: ref.shape for name, ref in base.tensors.items()}
    place = Folder.at(folder / "adapter")
    found = adapter_file(place)
    assert found is not None
    return open_adapter(*found, base=BaseNames(shapes=shapes, config=base.config))


def dense(delta: LowRank) -> Tensor:
    """The difference, written out independently of the code that decomposes it."""
    scale = delta.scale * (float(delta.alpha.read()) if delta.alpha else 1.0)
    up = delta.up.read().double()
    if delta.down is None:
        return scale * up
    down = delta.down.read().double()
    found = torch.einsum("or,r...->o...", up.reshape(up.shape[:2]), down)
    return scale * (found.T if delta.transposed else found)


def assert_same(adapter: Adapter, folder: Path, wanted: dict[str, Tensor]) -> None:
    """Base with the adapter's differences is what PEFT makes of it, tensor by tensor."""
    base = open_checkpoint(str(folder / "base"))
    differing = 0
    for name, ref in base.tensors.items():
        got = ref.read().double()
        if name in adapter.whole:
            got = adapter.whole[name].read().double()
        if name in adapter.low_rank:
            got = got + dense(adapter.low_rank[name])
            differing += 1
        own = next(n for n in wanted if n == name or n.endswith("." + name))
        assert torch.allclose(got, wanted[own], atol=1e-6), name
    assert differing == len(adapter.low_rank) > 0


CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "bert": (
        lambda: BertModel(BERT), {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"]},
    ),
    "rslora and patterns": (
        lambda: BertModel(BERT),
        {
            "r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["query", "dense"],
            "rank_pattern": {"layer.1.attention.self.query": 2},
            "alpha_pattern": {"output.dense": 16}, "exclude_modules": ["pooler.dense"],
        },
    ),
    "biases": (
        lambda: BertModel(BERT),
        {"r": 3, "lora_bias": True, "target_modules": ["key"], "bias": "none"},
    ),
    "trained biases": (
        lambda: BertModel(BERT), {"r": 3, "target_modules": ["key"], "bias": "lora_only"},
    ),
    "conv1d, square and oblong": (
        lambda: GPT2LMHeadModel(GPT2),
        {"r": 4, "lora_alpha": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "embeddings": (
        lambda: BertModel(BERT), {"r": 2, "target_modules": ["word_embeddings", "query"]},
    ),
    "kernels": (
        lambda: ResNetModel(RESNET), {"r": 3, "target_modules": ["convolution"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_the_difference_that_peft_merges(case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    wanted = adapt(make(), tmp_path, **options)
    assert_same(read(tmp_path), tmp_path, wanted)


def test_what_is_saved_whole_replaces_the_bases_and_a_head_it_lacks_is_told(tmp_path: Path) -> None:
    model = BertForSequenceClassification(BERT)
    wanted = adapt(
        model, tmp_path, r=2, target_modules=["query"],
        modules_to_save=["classifier", "attention.output.LayerNorm"],
    )  # fmt: skip
    BertModel(BERT).save_pretrained(tmp_path / "headless")
    adapter = read(tmp_path)
    assert "classifier.weight" in adapter.whole
    assert_same(adapter, tmp_path, wanted)
    headless = {n: t.shape for n, t in open_checkpoint(str(tmp_path / "headless")).tensors.items()}
    found = open_adapter(
        Folder.at(tmp_path / "adapter"), WEIGHTS, base=BaseNames(shapes=headless, config={})
    )
    assert found.unplaced == ("classifier.bias", "classifier.weight")
    assert "encoder.layer.0.attention.self.query.weight" in found.low_rank


SHAPES = {"model.layers.0.self_attn.q_proj.weight": (6, 4), "unet.mid.to_out.0.weight": (5, 4)}


@pytest.mark.parametrize(
    ("down", "up", "tensor"),
    [
        ("lora_te_model_layers_0_self_attn_q_proj.lora_down.weight",
         "lora_te_model_layers_0_self_attn_q_proj.lora_up.weight",
         "model.layers.0.self_attn.q_proj.weight"),
        ("unet.mid.to_out.0.lora_A.weight", "unet.mid.to_out.0.lora_B.weight",
         "unet.mid.to_out.0.weight"),
        ("mid.processor.to_out_lora.down.weight", "mid.processor.to_out_lora.up.weight",
         "unet.mid.to_out.0.weight"),
        ("unet.mid.to_out.0.lora.down.weight", "unet.mid.to_out.0.lora.up.weight",
         "unet.mid.to_out.0.weight"),
    ],
)  # fmt: skip
def test_other_trainers_spellings_name_the_same_layers(
    tmp_path: Path, down: str, up: str, tensor: str
) -> None:
    m, n = SHAPES[tensor]
    tensors = {down: torch.ones(2, n), up: torch.ones(m, 2)}
    if "lora_te" in down:
        tensors["lora_te_model_layers_0_self_attn_q_proj.alpha"] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = open_adapter(
        Folder.at(tmp_path), "x.safetensors", base=BaseNames(shapes=SHAPES, config={})
    )
    expected = 3.0 if "lora_te" in down else 2.0  # alpha / rank * 2, or the plain product
    assert torch.equal(dense(adapter.low_rank[tensor]), torch.full((m, n), expected).double())


def broken(tmp_path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> str:
    """What is said of an adapter that something was done to."""
    adapt(BertModel(BERT), tmp_path, r=4, target_modules=["query"])
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    return str(caught.value)


QUERY = "base_model.model.encoder.layer.0.attention.self.query"


def test_half_a_layer_is_refused_by_name(tmp_path: Path) -> None:
    told = broken(tmp_path, lambda t, _: t.pop(f"{QUERY}.lora_B.weight"))
    assert "encoder.layer.0.attention.self.query has lora_A and no lora_B" in told


def test_ranks_that_differ_are_refused(tmp_path: Path) -> None:
    told = broken(tmp_path, lambda t, _: t.update({f"{QUERY}.lora_B.weight": torch.zeros(16, 3)}))
    assert "Their ranks differ" in told


def test_a_configuration_that_lies_of_the_rank_is_refused(tmp_path: Path) -> None:
    assert "says rank 8" in broken(tmp_path, lambda _, c: c.update(r=8))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 10**400, True, "8"])
def test_a_strength_that_is_no_number_is_refused(tmp_path: Path, alpha: object) -> None:
    assert "and alpha" in broken(tmp_path, lambda _, c: c.update(lora_alpha=alpha))


def test_a_pattern_takes_no_longer_for_being_malicious(tmp_path: Path) -> None:
    # Written afterwards: PEFT itself never ends with the first one.
    adapt(BertModel(BERT), tmp_path, r=4, target_modules=["query"])
    file = tmp_path / "adapter" / CONFIG
    patterns = {r"(([a-z.0-9]+)+)+Z": 9, ".*" * 20 + "Z": 9}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rank_pattern": patterns}))
    assert len(read(tmp_path).low_rank) == 2


@pytest.mark.parametrize("pattern", ["(", "((a{1000}){1000}){1000}", "(?!x)query"])
def test_what_is_no_pattern_is_told(tmp_path: Path, pattern: str) -> None:
    told = broken(tmp_path, lambda _, c: c.update(alpha_pattern={pattern: 9}))
    assert "has the pattern" in told


def test_a_layer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    told = broken(tmp_path, lambda t, _: t.update({f"{QUERY}.lora_A.weight": torch.zeros(4, 9)}))
    assert "do not fit" in told


def test_a_layer_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for part in ("lora_A", "lora_B"):
            tensors[f"base_model.model.other.{part}.weight"] = tensors.pop(f"{QUERY}.{part}.weight")

    assert "other is no layer of the base" in broken(tmp_path, rename)


@pytest.mark.parametrize(
    "name", ["lora_magnitude_vector.default.weight", "hada_w1_a", "lokr_w1", "lora_mid.weight"]
)
def test_what_is_no_lora_is_refused(tmp_path: Path, name: str) -> None:
    told = broken(tmp_path, lambda t, _: t.update({f"{QUERY}.{name}": torch.zeros(2)}))
    assert "is no part of a LoRA" in told


@pytest.mark.parametrize("change", [{"use_dora": True}, {"peft_type": "IA3"}])
def test_other_kinds_of_adapters_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    assert "Only LoRA" in broken(tmp_path, lambda _, c: c.update(change))


def test_a_pickled_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="safetensors"):
        adapter_file(Folder.at(tmp_path))
