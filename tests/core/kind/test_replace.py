import pytest
import torch
from kind_cases import GATE, Transformer
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModel,
    BertConfig,
    CodeGenConfig,
    DebertaV2Config,
    DistilBertConfig,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    ModernBertConfig,
    Phi3Config,
    PhiConfig,
    T5Config,
    ViTConfig,
)

from svdmerge.core.kind.gate import disjoint, gated
from svdmerge.core.kind.replace import Spec, decomposable, projections
from svdmerge.demo_models import DigitsTransformer
from svdmerge.errors import RecipeError

IDS = {"input_ids": torch.ones(2, 4, dtype=torch.long)}
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip
TWO = disjoint(["a", "b"])
FAMILIES = {
    "bert": (BertConfig(**SMALL, vocab_size=9), IDS, 6),
    "llama": (LlamaConfig(**SMALL, num_key_value_heads=1, vocab_size=9), IDS, 7),
    "gpt2": (
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9, bos_token_id=0, eos_token_id=0),
        IDS,
        4,
    ),
    "t5": (
        T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=9),
        IDS | {"decoder_input_ids": IDS["input_ids"]},
        6 + 10,
    ),
    "distilbert": (
        DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=9), IDS, 6
    ),
    "vit": (
        ViTConfig(**SMALL, image_size=8, patch_size=4),
        {"pixel_values": torch.ones(2, 3, 8, 8)},
        6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_of_known_transformers_are_found_by_name_and_the_model_still_runs(family):
    config, inputs, num = FAMILIES[family]
    model = AutoModel.from_config(config).eval()
    before = model(**inputs)[0]
    whole = Spec(gate=disjoint(["all"]), start="svd", num_learngenes=0.25, num_tailors=0.75)
    layers = decomposable(model, whole)
    assert len(layers) == num
    assert not any("pool" in path or "embed" in path for path in layers)
    with gated(model, "all"):
        torch.testing.assert_close(model(**inputs)[0], before, atol=1e-5, rtol=1e-4)


NAMED_IN_PART = {
    "phi": (PhiConfig(**SMALL, vocab_size=9), 6),
    "phi3": (Phi3Config(**SMALL, num_key_value_heads=1, vocab_size=9, pad_token_id=0), 4),
    "gptj": (GPTJConfig(n_embd=16, n_layer=1, n_head=2, rotary_dim=4, vocab_size=9), 6),
    "codegen": (
        CodeGenConfig(n_embd=16, n_layer=1, n_head=4, n_ctx=16, rotary_dim=2, vocab_size=9), 4
    ),
    "deberta": (DebertaV2Config(**SMALL, vocab_size=9), 6),
    "albert": (AlbertConfig(**SMALL, embedding_size=8, vocab_size=9), 6),
    "modernbert": (ModernBertConfig(**SMALL, vocab_size=9, pad_token_id=0), 4),
    "falcon": (
        FalconConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9), 4
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", NAMED_IN_PART)
def test_where_names_tell_some_projections_shapes_tell_the_rest(family):
    config, num = NAMED_IN_PART[family]
    found = projections(AutoModel.from_config(config))
    assert len(found) == num
    assert not any("pool" in path or "embed" in path for path in found)


def test_a_layer_to_two_widths_is_no_gated_mlp():
    block = nn.ModuleDict({"a": nn.Linear(8, 8), "modulation": nn.Linear(8, 16)})
    assert projections(nn.ModuleList([block])) == ["0.a"]


def test_a_half_precision_model_stays_one_within_a_gate():
    model = Transformer().to(torch.bfloat16)
    decomposable(model, Spec(gate=TWO))
    for classes in (torch.tensor([0, 1]), 1):
        with gated(model, classes):
            assert model(torch.ones(2, 5, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_unknown_names_are_told_by_shape_and_modulation_is_left_alone():
    model = DigitsTransformer(width=16, depth=2)
    for block in model.blocks:
        block.modulation = nn.Linear(16, 6 * 16)
    names = {path.rsplit(".", 1)[1] for path in projections(model)}
    assert names == {"query", "key", "value", "output", "up", "down"}
    assert len(projections(model)) == 12


def test_layers_start_alike_whatever_else_the_model_has():
    one, other = Transformer(), Transformer()
    other.extra = nn.Linear(3, 3)
    starts = [decomposable(m, Spec(gate=GATE))["blocks.1.attn.q"].u for m in (one, other)]
    assert torch.equal(*starts)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"num_learngenes": 10, "num_tailors": 9}, "blocks.0.attn.q: 10 learngenes and 9 tailors"),
        ({"num_learngenes": 4, "num_tailors": 2}, "2 tailors for 3 groups"),
        ({"num_learngenes": 0, "num_tailors": 3}, "0 learngenes"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(spec, told):
    with pytest.raises(RecipeError, match=told):
        decomposable(Transformer(), Spec(gate=GATE, **spec))


def test_a_model_without_projections_is_refused():
    with pytest.raises(RecipeError, match="no projection to replace"):
        decomposable(nn.Sequential(nn.Linear(4, 3)), Spec(gate=GATE))


def test_attention_that_reads_its_weights_itself_is_refused():
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16)
    with pytest.raises(RecipeError, match="MultiheadAttention"):
        decomposable(layer, Spec(gate=TWO))
