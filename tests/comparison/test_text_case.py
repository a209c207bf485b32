"""The text benchmark at its smallest: labels grouped, written, and learnt by every entrant."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from svdmerge.comparison.text_case import Sizes, TextTransformer, grouped, write_case
from svdmerge.comparison.text_entrants import (
    Study,
    dense_pretrained,
    entrants,
    interval,
    pretrained,
    quick,
)

WORDS = ("red", "blue", "one", "two", "cat", "dog")
SIZES = Sizes(num_old=4, old_groups=2, novel_groups=1, width=16, layers=1, heads=2, max_length=6)


def write_base(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(folder)
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {word: i for i, word in enumerate(WORDS, start=2)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    return folder


def write_texts(path: Path) -> Path:
    """Six labels, a word each, said once or twice."""
    rows = [(" ".join([word] * (1 + i % 2)), y) for i in range(4) for y, word in enumerate(WORDS)]
    pq.write_table(pa.table({"text": [r[0] for r in rows], "label": [r[1] for r in rows]}), path)
    return path


@pytest.fixture
def study(tmp_path):
    texts = str(write_texts(tmp_path / "texts.parquet"))
    base = str(write_base(tmp_path / "bert"))
    case = write_case(tmp_path / "case", base=base, train=texts, test=texts, sizes=SIZES)
    return quick(Study(case=case, out=tmp_path / "case"))


def test_old_and_novel_labels_are_apart_numbered_from_zero_and_all_in_a_superclass(study):
    texts = []
    for part, num in ((study.case.old, 4), (study.case.novel, 2)):
        table = pq.read_table(part.train).to_pydict()
        assert set(table["label"]) == set(range(num))
        assert sorted(y for labels in part.groups.values() for y in labels) == list(range(num))
        texts.append({text.split()[0] for text in table["text"]})
    assert not texts[0] & texts[1]
    assert len(texts[0] | texts[1]) == 6


def test_a_label_alone_in_its_cluster_joins_the_nearest():
    means = torch.tensor([[1.0, 0.0], [0.99, 0.1], [0.0, 1.0], [0.1, 0.99], [-1.0, 0.2]])
    found = grouped(means, num_groups=3)
    assert sorted(map(sorted, found.values())) == [[0, 1], [2, 3, 4]]


def test_padding_does_not_change_a_texts_features():
    config = json.loads(
        '{"vocab_size": 8, "embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 1,'
        ' "heads": 2, "max_length": 6}'
    )
    torch.manual_seed(0)
    model = TextTransformer(config)
    model.get_buffer("table").normal_()
    ids, mask = torch.tensor([[2, 3]]), torch.ones(1, 2, dtype=torch.long)
    padded = {
        "input_ids": torch.tensor([[2, 3, 5, 5]]), "attention_mask": torch.tensor([[1, 1, 0, 0]])
    }  # fmt: skip
    short = model({"input_ids": ids, "attention_mask": mask})
    torch.testing.assert_close(model(padded), short)


def test_every_entrant_learns_and_lora_trains_no_more_than_tailors_do(study):
    assert pretrained(study, 0).accuracy.keys() == dense_pretrained(study, 0).accuracy.keys()
    found = {name: entrant(study, 0) for name, entrant in entrants().items()}
    assert all(0.0 <= x.last <= 1.0 for x in found.values())
    kind, lora = (
        found["learngenes frozen + tailors"],
        found["whole dense model, LoRA of equal size"],
    )
    assert kind.trained < kind.parameters
    assert lora.trained <= kind.trained


def test_an_interval_is_the_mean_and_the_range():
    assert interval([0.5, 0.7]) == "60.0 (50.0 to 70.0)"
