"""Texts through a transformers model and tokenizer that lie beside the weights; no hub."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)
from tune_case import put_factors, quiet

from svdmerge.core import svd
from svdmerge.errors import TrainingError
from svdmerge.recipe import TuneConfig
from svdmerge.storage.checkpoint import open_checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.training.backbone import build_backbone, load_weights
from svdmerge.training.data import load_target
from svdmerge.training.features import extract
from svdmerge.training.tune import tune

WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "plot", "a", "the", "very"]
CPU = torch.device("cpu")


def bert() -> BertConfig:
    return BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base model with tokenizer, and a target told by one word."""
    torch.manual_seed(0)
    BertModel(bert()).save_pretrained(tmp_path / "base")
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "base")
    texts = [f"{'the ' * (i % 4)}very {('bad', 'good')[i % 2]} film" for i in range(24)]
    # Every fifth label is wrong: were all told by the word, no gradient would be left to train on.
    table = pa.table({"text": texts, "label": [(i + (i % 5 == 0)) % 2 for i in range(24)]})
    pq.write_table(table, tmp_path / "examples.parquet")
    return tmp_path


def config(folder: Path, **changes: object) -> TuneConfig:
    place = str(folder / "examples.parquet")
    return TuneConfig.model_validate(
        {"train": place, "test": place, "per_class": 8, "epochs": 2, "num_values": 2} | changes
    )


def test_features_are_means_over_tokens_whatever_the_padding(folder: Path) -> None:
    base = open_checkpoint(str(folder / "base"))
    target = load_target(config(folder), base=base)
    backbone = build_backbone(config(folder), base=base)
    load_weights(backbone, checkpoint=base, base=base)
    found = extract(backbone, target.test, device=CPU)
    model = BertModel.from_pretrained(folder / "base").eval()
    for i in range(len(target.test)):
        row = target.test.inputs[i]
        assert isinstance(row, dict)
        with torch.no_grad():
            hidden = model(input_ids=row["input_ids"][None]).last_hidden_state
        torch.testing.assert_close(found[i], hidden[0].mean(dim=0), rtol=1e-4, atol=1e-5)


def test_texts_are_cut_at_max_length(folder: Path) -> None:
    base = open_checkpoint(str(folder / "base"))
    target = load_target(config(folder, max_length=3), base=base)
    assert max(len(row["input_ids"]) for row in target.test.inputs) == 3


def test_a_base_in_another_filesystem_is_read_the_same(folder: Path, memory_uri: str) -> None:
    for path in (folder / "base").iterdir():
        Folder.at(memory_uri).put(path.name, path.read_bytes())
    targets = [
        load_target(config(folder), base=open_checkpoint(place))
        for place in (str(folder / "base"), memory_uri)
    ]
    assert targets[0].train.digest() == targets[1].train.digest()


def test_a_checkpoint_saved_with_a_head_loads_into_its_backbone(folder: Path) -> None:
    torch.manual_seed(1)
    model = BertForSequenceClassification(bert())
    model.save_pretrained(folder / "headed")
    headed = open_checkpoint(str(folder / "headed"))
    backbone = build_backbone(config(folder), base=headed)
    load_weights(backbone, checkpoint=headed, base=headed)
    name = "bert.encoder.layer.0.output.dense.weight"
    held = backbone.module.state_dict()[backbone.module_name(name)]
    assert torch.equal(held, model.state_dict()[name])


def test_a_base_without_tokenizer_is_told(folder: Path) -> None:
    for path in (folder / "base").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(TrainingError, match="tokenizer cannot be loaded"):
        load_target(config(folder), base=open_checkpoint(str(folder / "base")))


def test_a_transformers_model_is_tuned_and_exported_whole(folder: Path) -> None:
    base = open_checkpoint(str(folder / "base"))
    name = "encoder.layer.0.attention.self.query.weight"
    generator = torch.Generator().manual_seed(0)
    factors = put_factors(
        Folder.at(folder / "factors"),
        {name: svd.exact(0.1 * torch.randn(16, 16, generator=generator)).slice(0, 4)},
    )
    result = tune(
        config(folder),
        base=base,
        merged=base,
        sources=[base],
        factors=factors,
        parameters={name: 4, "pooler.dense.weight": 0},
        run_folder=Folder.at(folder / "run"),
        out=Folder.at(folder / "tuned"),
        threads=1,
        use_ray=False,
        on_progress=quiet,
    )
    assert result.row("tuned").trained == 2
    model, info = BertModel.from_pretrained(folder / "tuned", output_loading_info=True)
    assert not info["missing_keys"]
    start = BertModel.from_pretrained(folder / "base").state_dict()
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, start[n])]
    assert changed == [name]
