"""Damaged sources are checkpoints like any other; what is damaged follows from names alone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import POSITION_IDS, QUERY, QUERY_BIAS, SCALAR, write_model
from torch import Tensor

from svdmerge.comparison.robustness import (
    ALTERATIONS,
    DROPPED,
    altered_sources,
    drop_tokens,
    fewer,
    random_low_rank,
)
from svdmerge.errors import TrainingError
from svdmerge.storage.checkpoint import open_checkpoint
from svdmerge.training.data import Examples

NUM = 5


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, list[Path]]:
    generator = torch.Generator().manual_seed(0)
    base = {
        QUERY: torch.randn(24, 24, generator=generator),
        QUERY_BIAS: torch.randn(24, generator=generator),
        SCALAR: torch.tensor(1.5),
        POSITION_IDS: torch.arange(4),
    }
    sources: list[Path] = []
    for i in range(NUM):
        moved = {QUERY: base[QUERY] + 0.1 * torch.randn(24, 24, generator=generator)}
        sources.append(write_model(tmp_path / f"s{i}", base | moved))
    return write_model(tmp_path / "base", base), sources


@pytest.mark.parametrize("kind", sorted(ALTERATIONS))
def test_each_damage_hits_as_many_as_it_says(
    kind: str, models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, sources = models
    how = ALTERATIONS[kind]
    found = altered_sources(kind, base=base, sources=sources, target="t", out=tmp_path / "out")
    changed = [p for p in found if p not in sources]
    assert len(changed) == (how.num_sources or NUM)
    assert len(found) == NUM + (len(changed) if how.added else 0)
    again = altered_sources(kind, base=base, sources=sources, target="t", out=tmp_path / "out")
    assert again == found
    for path in changed:
        tensors, expected = (open_checkpoint(str(p)).tensors for p in (path, base))
        assert tensors.keys() == expected.keys()
        read, start = (load_file(p / "model.safetensors") for p in (path, base))
        assert bool((read[QUERY] != start[QUERY]).any())
        # What did not differ from the base is no place for damage.
        assert torch.equal(read[QUERY_BIAS], start[QUERY_BIAS])
        assert torch.equal(read[POSITION_IDS], start[POSITION_IDS])


def test_pruning_leaves_a_tenth_of_a_difference(
    models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, sources = models
    found = altered_sources("pruned", base=base, sources=sources, target="t", out=tmp_path)
    left = load_file(found[0] / "model.safetensors")[QUERY]
    start = load_file(base / "model.safetensors")[QUERY]
    assert int((left != start).sum()) == 57  # a tenth of 576


def test_too_few_sources_are_an_error(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, sources = models
    with pytest.raises(TrainingError, match="3 sources"):
        altered_sources("unrelated", base=base, sources=sources[:3], target="t", out=tmp_path)


def test_unrelated_differences_have_the_norms_and_the_rank() -> None:
    given = {"w": torch.ones(20, 30), "b": torch.full((5,), 2.0)}
    found = random_low_rank(given, share=0.1, seed=0)
    assert int(torch.linalg.matrix_rank(found["w"])) == 2
    for name, d in given.items():
        torch.testing.assert_close(found[name].norm(), d.norm())
    assert abs(float((found["w"] * given["w"]).sum())) < float(given["w"].norm()) ** 2


def test_texts_lose_a_share_of_inner_tokens_in_every_column() -> None:
    def text(length: int) -> dict[str, Tensor]:
        return {"input_ids": torch.arange(length), "attention_mask": torch.ones(length)}

    given = Examples(
        inputs=[text(12), text(3)],
        labels=torch.tensor([0, 1]),
        padding={"input_ids": 0, "attention_mask": 0},
    )
    found = drop_tokens(given)
    assert not isinstance(found.inputs, Tensor)
    ids = found.inputs[0]["input_ids"].tolist()
    assert len(ids) == len(found.inputs[0]["attention_mask"]) == 12 - int(10 * DROPPED)
    assert ids == sorted(ids)
    assert (ids[0], ids[-1]) == (0, 11)
    assert found.inputs[1]["input_ids"].tolist() == [0, 1, 2]
    assert given.digest() != found.digest()


def test_fewer_sources_are_nested() -> None:
    paths = [Path(f"s{i}") for i in range(8)]
    two, four = (fewer(paths, num=n, target="t") for n in (2, 4))
    assert len(two) == 2
    assert set(two) < set(four)
