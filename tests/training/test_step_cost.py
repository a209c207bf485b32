"""The step's benchmark measures what it says; its figures themselves are no test."""

from pathlib import Path

import pytest
import torch
from test_text_backbone import bert
from transformers import BertModel

from svdmerge.storage.checkpoint import Checkpoint, open_checkpoint
from svdmerge.training.step_cost import (
    FLOOR,
    Workload,
    random_factors,
    step_costs,
)

SMALL = Workload(num_texts=2, num_tokens=5, repeats=1)


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    torch.manual_seed(0)
    BertModel(bert()).save_pretrained(tmp_path / "base")
    return open_checkpoint(str(tmp_path / "base"))


def test_every_share_is_timed_in_both_forms_beside_the_frozen_model(base: Checkpoint) -> None:
    costs = {c.name: c for c in step_costs(base, shares=(0.25,), workload=SMALL, threads=1)}
    assert costs[FLOOR].ratio == 1.0
    assert costs["N = 25%, auto"].trained == costs["N = 25%, low-rank"].trained == 6 * 4
    assert all(c.seconds > 0 for c in costs.values())


def test_factors_are_of_one_size_however_many_sources(base: Checkpoint) -> None:
    sizes = [
        {name: len(c) for name, c in random_factors(base, share=0.5, num_sources=n).items()}
        for n in (1, 3, 20)
    ]
    assert sizes[0] == sizes[1] == sizes[2]
    assert not any(name.startswith("pooler") for name in sizes[0])
