"""The cost of stage 2 against the number of sources measures what it says; no figure is tested."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from svdmerge.comparison.growth import growth
from svdmerge.storage.checkpoint import Checkpoint, open_checkpoint
from svdmerge.training.step_cost import Workload

TINY = BertConfig(
    vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=24, max_position_embeddings=12,
)  # fmt: skip
SMALL = Workload(num_texts=2, num_tokens=5, repeats=1)


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    torch.manual_seed(0)
    BertModel(TINY).save_pretrained(tmp_path / "base")
    return open_checkpoint(str(tmp_path / "base"))


def test_only_atlas_holds_more_for_more_sources(base: Checkpoint) -> None:
    held = {
        (kind, n): growth(
            base, kind=kind, num_sources=n, share=0.25, workload=SMALL, threads=1
        ).held_bytes
        for kind in ("ours", "atlas")
        for n in (2, 5)
    }
    assert held["ours", 2] == held["ours", 5]
    # W_0 and a difference of each source, all of one size.
    assert held["atlas", 5] * 3 == held["atlas", 2] * 6
