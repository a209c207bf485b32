"""Merges of tiny random models that transformers built."""

from pathlib import Path
from typing import Any

import torch
from merging import Bench
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

SIZES: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 12,
}  # fmt: skip
BERT = (BertForSequenceClassification, BertConfig(**SIZES, num_labels=3))
LLAMA = (LlamaForCausalLM, LlamaConfig(**SIZES))


def merged(root: Path, kind: type[PreTrainedModel], config: Any, **changes: Any) -> Bench:
    """Three fine-tunes that move every tensor but embeddings, merged."""
    for number in range(4):
        torch.manual_seed(0)
        model = kind(config)
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter) if number else 0.0
        model.save_pretrained(root / f"model-{number}")
    sources = tuple(root / f"model-{number}" for number in (1, 2, 3))
    bench = Bench(root=root, base=root / "model-0", sources=sources, admit=True)
    bench.run(parameters={"k": "60%"}, **changes)
    return bench
