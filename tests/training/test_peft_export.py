"""PEFT itself loads what is exported, and base + adapter is the adapted model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm_like import TimmLikeConfig, TimmLikeResNet, settled
from tiny_backbone import Scaled
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
)
from tune_case import make_case, put_factors, save_model

from svdmerge.core import svd
from svdmerge.core.components import RankOneComponents
from svdmerge.errors import OutputError
from svdmerge.recipe import TuneConfig
from svdmerge.storage.checkpoint import open_checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.training.adapter import Adapted
from svdmerge.training.export import write_model
from svdmerge.training.peft_export import CONFIG, WEIGHTS, write_peft

peft = pytest.importorskip("peft")

BERT = BertConfig(
    vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=24, max_position_embeddings=12,
)  # fmt: skip
IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
IDS = {"input_ids": torch.arange(24).reshape(2, 12) % 20}


# Policies leave embeddings alone.
KEPT = (
    "embed_tokens.weight",
    "lm_head.weight",
    "embeddings.weight",
    "wte.weight",
    "wpe.weight",
    "position_embeddings",
)


def adapted(
    root: Path,
    model: PreTrainedModel,
    *,
    ranks: tuple[int, ...] = (4, 3),
    tuned: int = 2,
    task: str = "text",
) -> Adapted:
    """A merge that moved every matrix and vector, and changes of some leading singular values."""
    model.save_pretrained(root / "base")
    generator = torch.Generator().manual_seed(1)

    def noise(tensor: Tensor) -> Tensor:
        return 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    factors: dict[str, RankOneComponents] = {}
    changes: dict[str, RankOneComponents] = {}
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in sorted(state.items()):
            if not tensor.is_floating_point() or "running_" in name or name.endswith(KEPT):
                continue
            if tensor.dim() not in (2, 4):
                tensor += noise(tensor).float()
            else:
                found = svd.exact(noise(tensor).reshape(len(tensor), -1))
                factors[name] = found.slice(0, ranks[len(factors) % len(ranks)])
                tensor += factors[name].dense().reshape(tensor.shape).float()
                if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear):
                    c = factors[name].slice(0, tuned).to(torch.float32)
                    # One value crosses zero, one grows.
                    d = torch.tensor([-1.5, 0.7])[:tuned] * c.s[0]
                    changes[name] = RankOneComponents(u=c.u, s=d, vh=c.vh)
    model.save_pretrained(root / "merged")
    config = TuneConfig.model_validate({"train": "-", "test": "-", "task": task})
    stored = put_factors(Folder.at(root / "factors"), factors)
    stored_changes = {
        n: RankOneComponents(u=(c := stored.read(n, range(len(change)))).u, s=change.s, vh=c.vh)
        for n, change in changes.items()
    }
    return Adapted(
        base=open_checkpoint(str(root / "base")),
        merged=open_checkpoint(str(root / "merged")),
        factors=stored,
        config=config,
        changes=stored_changes,
    )


def outputs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).last_hidden_state


def full(root: Path, found: Adapted) -> Path:
    write_model(Folder.at(root / "full"), found, scratch=Folder.at(root / "scratch"))
    return root / "full"


def loaded(kind: type[PreTrainedModel], on: Path, adapter: Path) -> Any:
    """PEFT's model; a key of the file that the model lacks, or the other way, is an error."""
    model = peft.PeftModel.from_pretrained(kind.from_pretrained(on), adapter)
    held = set(load_file(adapter / WEIGHTS))
    assert held == set(peft.get_peft_model_state_dict(model))
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_base_and_adapter_give_the_adapted_language_models_logits(
    tmp_path: Path, tied: bool
) -> None:
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, tie_word_embeddings=tied,
    )  # fmt: skip
    found = adapted(tmp_path, LlamaForCausalLM(llama), task="causal_lm")
    write_peft(Folder.at(tmp_path / "peft"), found, on_merged=False)
    expected = LlamaForCausalLM.from_pretrained(full(tmp_path, found)).eval()
    model = loaded(LlamaForCausalLM, tmp_path / "base", tmp_path / "peft").eval()
    with torch.no_grad():
        assert (model(**IDS).logits - expected(**IDS).logits).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("kind", "config", "inputs"),
    [
        (BertModel, BERT, IDS),
        (GPT2Model, GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=12), IDS),
        (
            ResNetModel,
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
            {"pixel_values": IMAGES},
        ),
    ],
    ids=["linear", "transposed", "convolutions"],
)
def test_base_and_adapter_give_the_adapted_models_features(
    tmp_path: Path, kind: type[PreTrainedModel], config: Any, inputs: dict[str, Tensor]
) -> None:
    torch.manual_seed(0)
    found = adapted(tmp_path, kind(config))
    expected = outputs(kind.from_pretrained(full(tmp_path, found)), inputs)
    write_peft(Folder.at(tmp_path / "peft"), found, on_merged=False)
    model = loaded(kind, tmp_path / "base", tmp_path / "peft")
    assert (outputs(model, inputs) - expected).abs().max() <= 1e-5
    before = outputs(kind.from_pretrained(tmp_path / "base"), inputs)
    assert (before - expected).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(outputs(model, inputs), before)
    assert (outputs(model.merge_and_unload(), inputs) - expected).abs().max() <= 1e-5


def test_on_the_merged_model_only_the_tuned_changes_are_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = adapted(tmp_path, BertModel(BERT))
    expected = outputs(BertModel.from_pretrained(full(tmp_path, found)), IDS)
    write_peft(Folder.at(tmp_path / "peft"), found, on_merged=True)
    model = loaded(BertModel, tmp_path / "merged", tmp_path / "peft")
    assert (outputs(model, IDS) - expected).abs().max() <= 1e-5
    names = load_file(tmp_path / "peft" / WEIGHTS)
    assert {n.rsplit(".", 2)[1] for n in names} == {"lora_A", "lora_B"}
    assert {min(t.shape) for t in names.values()} == {2}


def test_ranks_are_each_matrixs_own_and_a_changed_value_costs_none(tmp_path: Path) -> None:
    found = adapted(tmp_path, BertModel(BERT))
    write_peft(Folder.at(tmp_path / "peft"), found, on_merged=False)
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    assert {config["r"], *config["rank_pattern"].values()} == {3, 4}
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_a_layer_whose_name_ends_like_an_adapted_ones_stays_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = settled(TimmLikeResNet(TimmLikeConfig()))
    model.save_pretrained(tmp_path / "base")
    conv1 = svd.exact(torch.randn(8, 27, dtype=torch.float64)).slice(0, 2)
    with torch.no_grad():
        model.conv1.weight += conv1.dense().reshape(8, 3, 3, 3).float()
    model.save_pretrained(tmp_path / "merged")
    found = Adapted(
        base=open_checkpoint(str(tmp_path / "base")),
        merged=open_checkpoint(str(tmp_path / "merged")),
        factors=put_factors(Folder.at(tmp_path / "factors"), {"conv1.weight": conv1}),
        config=TuneConfig(train="-", test="-", model="timm_like:build"),
        changes={},
    )
    write_peft(Folder.at(tmp_path / "peft"), found, on_merged=False)
    adapter = loaded(TimmLikeResNet, tmp_path / "base", tmp_path / "peft").eval()
    inputs = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(adapter(inputs)["logits"], model(inputs)["logits"], atol=1e-5)


def test_a_changed_tensor_of_no_module_is_refused_by_name(tmp_path: Path) -> None:
    found = scaled(tmp_path, {"scale": torch.zeros(1)})
    with pytest.raises(OutputError, match="scale: the merge changed it"):
        write_peft(Folder.at(tmp_path / "peft"), found, on_merged=False)
    assert not (tmp_path / "peft").exists()


def test_a_module_that_peft_would_save_twice_is_refused_by_name(tmp_path: Path) -> None:
    # Of `outer` a tensor of its own changed; PEFT takes `outer.in_outer` for it too.
    found = scaled(tmp_path, {"outer.gain": torch.zeros(1)})
    with pytest.raises(OutputError, match=r"outer\.in_outer: PEFT would save it twice"):
        write_peft(Folder.at(tmp_path / "peft"), found, on_merged=False)


def scaled(root: Path, moved: dict[str, Tensor]) -> Adapted:
    """A merge that changed nothing but tensors that lie in no layer."""
    case = make_case(root)
    state = {name: t.contiguous() for name, t in Scaled({}).state_dict().items()}
    for name, tensors in (("base", state), ("merged", state | moved)):
        save_model(root / name, tensors, {})
    return Adapted(
        base=open_checkpoint(str(root / "base")),
        merged=open_checkpoint(str(root / "merged")),
        factors=put_factors(Folder.at(root / "none"), {}),
        config=case.config(model="tiny_backbone:build_scaled"),
        changes={},
    )
